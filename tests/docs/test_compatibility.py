"""docs/compatibility.md says what the tests are: nothing is marked by hand, nothing is old."""

import importlib
import subprocess
import sys

import pytest

from .pages import ROOT

pytest.importorskip("diffusers")
pytest.importorskip("peft", minversion="0.18", reason="a column is about PEFT")


@pytest.fixture(scope="module")
def maker():
    """The script, as a module; its neighbour is found as the script itself finds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        return importlib.import_module("make_compatibility")


def whole_suite(config):
    """Says whether this very run has collected every test."""
    option = config.option
    narrowed = option.keyword or option.markexpr or option.deselect or option.ignore
    return not narrowed and set(config.args) <= {"tests", str(ROOT / "tests"), str(ROOT)}


@pytest.mark.slow
def test_the_page_is_what_the_tests_say(request, maker):
    if whole_suite(request.config):  # pytest has just collected them all: no need to ask again
        text = maker.page(maker.named(request.session.items))
        assert maker.PAGE.read_text(encoding="utf-8") == text, "run scripts/make_compatibility.py"
        return
    command = [sys.executable, str(ROOT / "scripts" / "make_compatibility.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_cell_without_a_test_is_not_marked(maker):
    column = maker.Column("x", "", ("t.py::test_a",), refused="t.py::test_b")
    found = {"t.py::test_a": [{"sd3"}], "t.py::test_b": [{"wan"}]}
    cells = [maker.mark(column, row, {row}, found) for row in ("sd3", "wan", "dit")]
    assert cells == [maker.YES, maker.REFUSED, maker.UNTESTED]
    only = column._replace(only="dit")
    assert maker.mark(only, "sd3", {"sd3"}, found) == maker.UNTESTED
    assert maker.mark(only, "dit", {"dit"}, found) == maker.YES
    assert maker.mark(only, "dit", {"dit"}, {}) == maker.UNTESTED


def test_every_family_and_architecture_has_a_row(maker):
    from diffscaler_core.families import FAMILIES

    titles = set(maker.rows().values())
    split = {"unet2d_condition"}  # two rows
    assert {f.title for f in FAMILIES.values() if f.name not in split} <= titles
    assert {"Stable Diffusion XL", "Krea 2", "LTX-2", "Wan VACE"} <= titles
    text = maker.PAGE.read_text(encoding="utf-8")
    assert all(f"| {title} |" in text for title in titles)

"""docs/compatibility_nodes.md says what the tests are, as docs/compatibility.md does."""

import importlib
import subprocess
import sys

import pytest

from .pages import ROOT
from .test_compatibility import whole_suite

pytest.importorskip("diffusers")
pytest.importorskip("peft", minversion="0.18", reason="a row is about PEFT")


@pytest.fixture(scope="module")
def maker():
    """The script, as a module; its neighbour is found as the script itself finds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        return importlib.import_module("make_beside")


@pytest.mark.slow
def test_the_page_is_what_the_tests_say(request, maker):
    if whole_suite(request.config):  # pytest has just collected them all: no need to ask again
        text = maker.page({item.nodeid for item in request.session.items})
        assert maker.PAGE.read_text(encoding="utf-8") == text, "run scripts/make_beside.py"
        return
    command = [sys.executable, str(ROOT / "scripts" / "make_beside.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_row_without_its_test_is_refused(maker):
    row = maker.Row("x", "strength", maker.RIGHT, ("t.py::test_a[sd3]", "t.py::test_b"))
    maker.check([row], {"t.py::test_a[sd3]", "t.py::test_b[1]"})
    for names in ({"t.py::test_a[flux]", "t.py::test_b"}, {"t.py::test_a[sd3]"}):
        with pytest.raises(SystemExit, match="there is no test"):
            maker.check([row], names)

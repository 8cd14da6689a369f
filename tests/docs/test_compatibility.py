"""docs/compatibility.md says what the tests are: nothing is marked by hand, nothing is old."""

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft", minversion="0.18", reason="a column is about PEFT")


@pytest.fixture(scope="module")
def maker(script_module):
    return script_module("make_compatibility")


@pytest.mark.slow
def test_the_page_is_what_the_tests_say(maker, check_page):
    check_page(maker, lambda items: maker.page(maker.named(items)))


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

"""docs/compatibility_nodes.md says what the tests are, as docs/compatibility.md does."""

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft", minversion="0.18", reason="a row is about PEFT")


@pytest.fixture(scope="module")
def maker(script_module):
    return script_module("make_beside")


@pytest.mark.slow
def test_the_page_is_what_the_tests_say(maker, check_page):
    check_page(maker, lambda items: maker.page({item.nodeid for item in items}))


def test_a_row_without_its_test_is_refused(maker):
    row = maker.Row("x", "strength", maker.RIGHT, ("t.py::test_a[sd3]", "t.py::test_b"))
    maker.check([row], {"t.py::test_a[sd3]", "t.py::test_b[1]"})
    for names in ({"t.py::test_a[flux]", "t.py::test_b"}, {"t.py::test_a[sd3]"}):
        with pytest.raises(SystemExit, match="there is no test"):
            maker.check([row], names)

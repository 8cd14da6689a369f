"""docs/systems.md says what the tests are, as docs/compatibility.md does."""

import pytest

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def maker(script_module):
    return script_module("make_systems")


@pytest.mark.slow
def test_the_page_is_what_the_tests_say(maker, check_page):
    check_page(maker, lambda items: maker.page({item.nodeid for item in items}))


def test_a_system_works_only_with_tests_that_exist(maker):
    claimed = maker.System("X", "0000.00000", "x", tests=("t.py::test_a",))
    assert claimed.state == "works"
    assert maker.System("X", "0000.00000", "x", library="Y", tests=("t.py::test_a",)).state == (
        "composes with Y"
    )
    assert maker.System("X", "0000.00000", "x", library="Y").state == "not yet"
    maker.check([claimed], {"t.py::test_a[1]"})
    with pytest.raises(SystemExit, match=r"there is no test t\.py::test_a"):
        maker.check([claimed], {"t.py::test_b"})


def test_a_system_that_works_has_a_page(maker):
    assert [row.title for row in maker.SYSTEMS if row.tests and not row.page] == []

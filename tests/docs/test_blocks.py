"""No block is forgotten: each is in a known language, and what is not run is listed once."""

import importlib
import json
import re
import sys

import pytest

from .pages import NOT_RUN, PAGES, ROOT, RUN, SHOWN, blocks, commands

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page):
    text = PAGES[page].read_text(encoding="utf-8")
    assert len(re.findall(r"^ *```", text, re.M)) == 2 * len(blocks(page)), "an open fence"
    for block in blocks(page):
        assert block.language in RUN + SHOWN, f"{page}, line {block.line}: {block.language!r}"


def test_what_is_not_run_still_stands_there_and_why():
    every = {command for page in PAGES for command in commands(page)}
    for line, reason in NOT_RUN.items():
        assert line in every, f"no page says {line!r} any more"
        assert reason.why
        if reason.instead:
            file, _, name = reason.instead.partition("::")
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), reason.instead


@pytest.mark.parametrize("page", PAGES)
def test_data_is_read(page):
    for block in blocks(page, "json"):
        json.loads(block.text)
    for block in blocks(page, "toml"):
        tomllib.loads(block.text)


@pytest.mark.parametrize("page", PAGES)
def test_extras_are_there(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    known = extras["project"]["optional-dependencies"].keys()
    for names in re.findall(r"diffscaler\[([\w,]+)\]", PAGES[page].read_text(encoding="utf-8")):
        assert set(names.split(",")) <= known, names

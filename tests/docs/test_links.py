"""Links, pictures, and the files and tests that pages name: all are there."""

import re

import pytest

from .pages import PAGES, ROOT, blocks_of

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def prose(page):
    """Returns a page's text without its code blocks and comments."""
    text = PAGES[page].read_text(encoding="utf-8")
    for block in blocks_of(text):
        text = text.replace(block.text, "")
    return re.sub(r"<!--.*?-->", "", text, flags=re.S)


def anchors(text):
    """Returns what GitHub calls the headings of a page."""
    names = []
    for title in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", title).lower()
        names.append(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return names


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert file.exists(), f"{page} links to {target}"
        assert file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_stand_behind_a_claim_exist(page):
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", prose(page)):
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    pattern = r"`(?:python )?((?:tests|benchmarks|scripts|docs|pocket|assets|workflows)/[\w./-]+)"
    for named in re.findall(pattern, prose(page)):
        assert (ROOT / named).exists(), f"{page} names {named}"


def test_every_answer_of_the_faq_says_what_holds_it():
    answers = re.split(r"^### ", prose("docs/faq.md"), flags=re.M)[1:]
    assert len(answers) > 15
    for answer in answers:
        assert re.search(r"^\*Held by\* `", answer, re.M), answer.splitlines()[0]

"""The site: mkdocs builds it without a network, and nothing on it comes from elsewhere."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .pages import ROOT

pytest.importorskip("mkdocs", reason='pip install -e ".[docs]"')
pytest.importorskip("mkdocstrings")
pytest.importorskip("material")

#: The packages whose public names the API reference has to show.
SHOWN = (
    "diffscaler_core",
    "diffscaler_core.training",
    "diffscaler_core.extraction",
    "diffscaler_core.evaluation",
    "diffscaler_core.peft",
)
BUILD = """
import socket, sys

def refuse(*args, **kwargs):
    raise OSError("the site must build without a network")

socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(["build", "--strict", "--site-dir", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built(site):
    pages = {p.stem for p in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= {p.parent.name for p in site.glob("*/index.html")}
    assert "One frozen diffusion model" in (site / "index.html").read_text(encoding="utf-8")
    assert "Keep a Changelog" in (site / "changelog/index.html").read_text(encoding="utf-8")


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\ssrc=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link\b[^>]*\srel=\"(?:stylesheet|preconnect)\"[^>]*>", text)
        assert not [one for one in loaded if re.search(r"(https?:)?//", one)], page
        assert 'data-md-component="source"' not in text, "the theme asks GitHub on each visit"


def test_every_link_within_the_site_leads_somewhere(site):
    """Also from pages that GitHub shows otherwise: pictures from outside of docs/ are there."""
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"<(?:a|img)\b[^>]*\s(?:href|src)=\"([^\"#?]+)", text):
            if not re.match(r"\w+:", target):
                assert (page.parent / target).resolve().exists(), f"{page}: {target}"


def test_the_api_reference_has_every_public_name(site):
    text = (site / "api/index.html").read_text(encoding="utf-8")
    shown = {
        name.rpartition(".")[2] for name in re.findall(r"id=\"(diffscaler_core[\w.]*)\"", text)
    }
    said = set(re.findall(r"<code>(\w+)</code>", text))
    for module in SHOWN:
        if module.endswith("peft"):
            pytest.importorskip("peft", minversion="0.18")
        public = importlib.import_module(module)
        for name in public.__all__:
            found = shown if callable(getattr(public, name)) else said
            assert name in found, f"{module}.{name}"
    importlib.import_module("diffscaler_core.pipelines")
    every = dir(importlib.import_module("diffusers").DiffusionPipeline)
    methods = {name for name in every if "diffscaler" in name}
    assert len(methods) > 10
    assert methods <= shown, methods - shown

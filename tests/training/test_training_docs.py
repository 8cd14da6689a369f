"""docs/training.md is right: its flags are there, its table is complete; tests/docs runs it."""

import dataclasses
import re
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
typer_testing = pytest.importorskip("typer.testing")

from diffscaler_core.training.config import TrainingConfig  # noqa: E402
from diffscaler_core.training.settings import SECTIONS, SETTINGS, RunSettings  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_every_flag_it_names_is_one():
    flags = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", TEXT)) - {"num"}
    known = {name.replace("_", "-") for name in SETTINGS} | {"plan", "from"}
    assert flags <= known, flags - known


def test_the_table_has_every_key_in_its_section_with_its_default():
    rows = re.findall(r"^\| (.+?) \|(.*?)\| .+ \|$", TEXT.partition("## Every key")[2], re.M)
    section, found = "", {}
    for first, default in rows:
        if first.startswith("**"):
            section = re.sub(r"[*`\[\]]", "", first).replace("before any section", "")
            assert section in SECTIONS
        elif first.startswith("`"):
            found[first.strip("`")] = (section, default.strip("` "))
    assert list(found) == list(SETTINGS)
    defaults = {
        f.name: f.default
        for kind in (RunSettings, TrainingConfig)
        for f in dataclasses.fields(kind)
    }
    for name, (section, default) in found.items():
        assert section == SETTINGS[name].section, name
        value = defaults.get(name)
        if default:
            plain = f"{value:g}" if isinstance(value, float) else str(value)
            said = plain.lower() if isinstance(value, bool) else plain
            assert default.strip('"') == said, name
        elif name not in ("name", "base", "data", "out", "prior", "validation"):
            assert value is None or value is dataclasses.MISSING, name

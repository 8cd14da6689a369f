"""docs/auto_rank.md is right: its commands and its Python run."""

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
typer_testing = pytest.importorskip("typer.testing")

from diffscaler_core.commands import app  # noqa: E402

from .test_training_docs import QUICK, here  # noqa: E402

__all__ = ["here"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "auto_rank.md"
TEXT = PAGE.read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_its_picture_is_there_and_small():
    (picture,) = re.findall(r"!\[.+\]\((.+)\)", TEXT)
    assert (PAGE.parent / picture).stat().st_size < 150_000


@pytest.mark.slow
def test_every_command_runs(here, monkeypatch):
    monkeypatch.setattr("diffscaler_core.training.rank_choice.LOOKS", 4)
    quick = QUICK.replace("--rank 2 ", "") + " --steps 1 --resume never"
    lines = [line.partition("#")[0].strip() for line in "".join(blocks("sh")).splitlines()]
    assert len(lines) == 3
    for line in lines:
        words = [*shlex.split(line)[1:], *shlex.split(quick)]
        result = typer_testing.CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{line}\n{result.output}"
        assert "rank for 90 %" in result.output


@pytest.mark.slow
def test_the_python_runs(here, monkeypatch):
    monkeypatch.setattr("diffscaler_core.training.rank_choice.LOOKS", 4)
    (block,) = blocks("python")
    found = {}
    exec(compile(block.replace("128", "32"), "docs/auto_rank.md", "exec"), found)
    ranks = {n: len(own.get("down", ())) for n, own in found["task"].layers.items()}
    assert ranks == {f"transformer.{n}": r for n, r in found["choice"].ranks.items()}

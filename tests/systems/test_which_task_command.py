"""`diffscaler which-task` and what it says, on the pocket base at half its size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("diffusers")
typer_testing = pytest.importorskip("typer.testing")

from diffscaler_core.commands import app  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "assets" / "pocket"
INK = ROOT / "assets" / "examples" / "ink"
QUICK = ("--base", POCKET, "--stages", "6:1", "--size", "64", "--device", "cpu")
TASKS = [
    *("--task", POCKET / "diffscaler" / "ink.safetensors"),
    *("--task", f"glow={POCKET / 'diffscaler' / 'neon.safetensors'}"),
]


def run(*arguments: object) -> Any:
    words = [str(one) for one in ("which-task", *arguments)]
    return typer_testing.CliRunner().invoke(app, words)


def test_one_picture_gives_a_table_and_a_chart(tmp_path: Path) -> None:
    chart = tmp_path / "chart.png"
    result = run(INK / "fox.png", *TASKS, *QUICK, "--chart", chart)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("ink: beats the base by ")
    assert [line.split()[0] for line in lines[3:5]] == ["ink", "glow"]
    with Image.open(chart) as image:
        assert image.width > 400


def test_a_folder_gives_a_line_each_and_json_all_figures(tmp_path: Path) -> None:
    for name in ("fox", "cat"):
        shutil.copy(INK / f"{name}.png", tmp_path)
    (tmp_path / "notes.txt").write_text("no picture")
    plain = run(tmp_path, *TASKS, *QUICK)
    assert plain.exit_code == 0, plain.output
    assert [line.split(" (")[0] for line in plain.stdout.splitlines()] == [
        f"{tmp_path / 'cat.png'}: ink",
        f"{tmp_path / 'fox.png'}: ink",
    ]
    found = json.loads(run(tmp_path, *TASKS, *QUICK, "--json").stdout)
    assert [(Path(one["picture"]).name, one["answer"]) for one in found] == [
        ("cat.png", "ink"),
        ("fox.png", "ink"),
    ]
    assert found[0]["forwards"] == 18
    assert {fit["name"] for fit in found[0]["ranking"]} == {"ink", "glow"}


def test_prompts_are_candidates_with_a_task_and_without() -> None:
    prompts = ("--prompts", "ink=fox,house", "--prompts", "fox")
    result = run(INK / "fox.png", *TASKS[:2], *prompts, *QUICK, "--json")
    found = json.loads(result.stdout)
    assert {fit["name"] for fit in found["ranking"]} == {"ink: fox", "ink: house", "fox"}
    assert found["best"] == "ink: fox"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gone.png", *TASKS), "no file 'gone.png'"),
        ((ROOT / "LICENSE", *TASKS), "no picture that Pillow knows"),
        ((INK.parent / "loras", *TASKS), "no picture in"),
        ((INK / "fox.png",), "there is no candidate"),
        ((INK / "fox.png", *TASKS, "--prompts", "neon=cat"), "no such task"),
        ((INK / "fox.png", *TASKS, "--prompts", "unicorn"), "unicorn"),
        ((INK / "fox.png", *TASKS, "--stages", "4-2"), "write them as probes:kept"),
        ((INK / "fox.png", *TASKS, *TASKS[:2]), "two tasks would be called 'ink'"),
        ((INK / "fox.png", *TASKS, "--size", "63"), "must be a multiple of 16"),
        ((INK, *TASKS, "--chart", "c.png"), "one picture's ranking"),
        (
            (INK / "fox.png", "--task", POCKET / "diffscaler" / "edges.safetensors"),
            "takes control pictures",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[object, ...], said: str) -> None:
    quick = (*QUICK[:2], *("--size", "64", "--device", "cpu"))
    result = run(*quick, *arguments)
    assert result.exit_code == 1, result.output
    assert said in result.stderr
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr

"""`diffscaler eval` from the command line, and its page."""

import json

import pytest

typer_testing = pytest.importorskip("typer.testing")

from diffscaler_core.commands import app  # noqa: E402

from .conftest import POCKET, ROOT  # noqa: E402

INK = ROOT / "assets" / "examples" / "ink"
TASK = POCKET / "diffscaler" / "ink.safetensors"
QUICK = (
    "--pictures 6 --steps 2 --batch 3 --size 64 --validation 2 --drift 2 --columns 3 --device cpu"
)
PAGE = ROOT / "docs" / "evaluation.md"


def run(*arguments):
    words = [str(argument) for argument in arguments]
    return typer_testing.CliRunner().invoke(app, ["eval", *words])


def quick(out, *more):
    told = ("--base", POCKET, "--task", TASK, "--reference", INK, "--out", out)
    return run(*told, *QUICK.split(), *more)


def test_a_table_and_a_grid(tmp_path):
    out = tmp_path / "deep" / "out"
    result = quick(out)
    assert result.exit_code == 0, result.output
    assert "against ink" in result.stdout
    assert "Fréchet" in result.stdout
    assert "pocket features" in result.stdout
    assert "singular" in result.stderr
    names = {path.name for path in out.iterdir()}
    assert names == {"table.md", "table.csv", "table.json", "grid.png", "rows"}
    again = quick(out, "--json")  # from the kept rows
    assert again.exit_code == 0, again.output
    told = json.loads(again.stdout)
    assert told == json.loads((out / "table.json").read_text())
    assert [row["name"] for row in told["rows"]] == ["references through the VAE", "base", "ink"]
    assert told["rows"][2]["drift_off"] == 0


def test_tasks_and_references_are_named(tmp_path):
    more = ("--task", f"second={TASK}", "--reference", f"second={INK}", "--drift", 0, "--json")
    result = quick(tmp_path, *more, "--validation", 0, "--prompts", "cat, dog")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["name"] for row in rows][1:] == ["base", "ink", "second"]
    assert rows[2]["frechet"] == rows[3]["frechet"]
    assert rows[2]["validation_loss"] is None


def test_ctrl_c_keeps_what_is_done(tmp_path, monkeypatch):
    from diffscaler_core.evaluation.measure import Measurement

    monkeypatch.setattr(
        Measurement, "_with_costs", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    result = quick(tmp_path)
    assert result.exit_code == 130
    assert "interrupted after 2 rows" in result.stderr
    assert len(json.loads((tmp_path / "table.json").read_text())["rows"]) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", TASK], "two rows would be called 'ink'"),
        (["--task", f"base={TASK}"], "two rows would be called 'base'"),
        (["--task", "nothing.safetensors"], "nothing.safetensors"),
        (["--reference", "elsewhere"], "several references for all tasks"),
        (["--reference", "neon=elsewhere"], "'neon' have pictures, but are no tasks"),
        (["--reference", f"ink={INK}", "--reference", "ink=x"], "two references for task 'ink'"),
        (["--features", "vgg"], "unknown feature network 'vgg'"),
        (["--words", "no.safetensors"], "no.safetensors"),
        (["--prompts", "unicorn"], "unicorn"),
        (["--pictures", "2"], "pictures must be at least 6, got 2"),
        (["--size", "60"], "size 60 must be a multiple of 16"),
        (["--neighbours", "0"], "neighbours must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, more, message):
    result = quick(tmp_path, *more)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.strip().count("\n") <= 2  # what was going on, and the mistake
    assert not (tmp_path / "table.json").exists()

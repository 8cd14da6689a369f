"""The command line as a whole: its help, its exit codes, its JSON, and every kind of mistake."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
typer_testing = pytest.importorskip("typer.testing")

from diffscaler_core import load_task  # noqa: E402
from diffscaler_core.commands import app, table  # noqa: E402
from diffscaler_core.commands.table import COMMANDS  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
POCKET, EXAMPLES = ROOT / "assets" / "pocket", ROOT / "assets" / "examples"
#: What makes a command quick, said after everything else.
QUICK = {
    "train": "--steps 2 --size 32 --batch 2 --rank 2 --sample-steps 1 --validation-times 1 "
    "--device cpu",
    "eval": "--pictures 6 --steps 1 --batch 3 --size 64 --validation 0 --drift 0 --columns 3 "
    "--device cpu",
    "extract": "--targets attention",
    "partition": "--size 48 --device cpu",
    "train-router": "--size 48 --draws 2 --steps 5 --device cpu",
    "features": "--size 48 --times 0.1,1 --device cpu",
    "translate": "--steps 1 --size 64 --device cpu",
    "which-task": "--stages 2:1 --size 64 --device cpu",
}


def run(*arguments: object, **more: Any) -> Any:
    return typer_testing.CliRunner().invoke(app, [str(one) for one in arguments], **more)


def program(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs the program as a shell does."""
    command = [sys.executable, "-m", "diffscaler_core.cli", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def examples(name: str) -> list[str]:
    module = importlib.import_module(COMMANDS[name].module, table.__package__)
    lines: tuple[str, ...] = module.EXAMPLES[name]
    return [line for line in lines if re.match(r"diffscaler |accelerate launch ", line)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the examples name, each as real as it can be."""
    here = tmp_path_factory.mktemp("prepared")
    for name in ("ink", "neon"):
        shutil.copy(POCKET / "diffscaler" / f"{name}.safetensors", here)
    for name in ("task", "my_task", "step-800", "step-1000", "runs/a", "runs/b"):
        (here / "runs").mkdir(exist_ok=True)
        shutil.copy(here / "ink.safetensors", here / f"{name}.safetensors")
    shutil.copy(EXAMPLES / "loras" / "ink_lora.safetensors", here / "my_lora.safetensors")
    assert run("convert", here / "my_lora.safetensors", here / "my_task.safetensors").exit_code == 0
    values = load_file(POCKET / "diffusion_models" / "diffscaler_pocket.safetensors")
    save_file(values, here / "base.safetensors")
    tuned = {k: v + 0.01 if v.ndim == 2 and "attn" in k else v for k, v in values.items()}
    save_file(tuned, here / "tuned.safetensors")
    shutil.copytree(EXAMPLES / "ink", here / "pictures" / "ink-kept")
    shutil.copytree(EXAMPLES / "ink", here / "pictures" / "flowers-kept")
    (here / "pictures" / "flowers").mkdir()
    for i in range(4):
        picture = Image.new("RGB", (40, 40), (60 * i, 90, 30))
        picture.paste((255, 255, 255), (2 * i, 3, 2 * i + 9, 12))
        picture.save(here / "pictures" / "flowers" / f"{i}.png")
    (here / "flowers.toml").write_text(
        'base = "assets/pocket"\ndata = "pictures/flowers"\nout = "flowers.safetensors"\n'
    )
    return here


@pytest.fixture
def here(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with those files."""
    folder = tmp_path / "here"
    shutil.copytree(prepared, folder)
    (folder / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(folder)
    return folder


# --- help -----------------------------------------------------------------------------------------


def test_help_groups_the_commands_into_panels() -> None:
    shown = run("--help", env={"COLUMNS": "120"}).stdout
    titles = re.findall(r"╭─ (\w+) ─", shown)
    assert titles == ["Options", "Train", "Look", "Convert", "Measure", "Draw"]
    for name, place in COMMANDS.items():
        before, _, _ = shown.partition(f"│ {name} ")
        assert re.findall(r"╭─ (\w+) ─", before)[-1] == place.panel
        assert place.help in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_is_the_tables_and_has_examples(name: str) -> None:
    place = COMMANDS[name]
    module = importlib.import_module(place.module, table.__package__)
    assert getattr(module, place.function).__doc__.strip().splitlines()[0] == place.help
    shown = run(name, "--help", env={"COLUMNS": "300"})
    assert shown.exit_code == 0
    assert place.help in shown.stdout
    assert examples(name)
    assert all(line in shown.stdout for line in examples(name))
    assert "--json" in shown.stdout
    assert run(name, "-h").exit_code == 0


def test_every_example_is_of_a_command_in_the_table() -> None:
    for module in {importlib.import_module(p.module, table.__package__) for p in COMMANDS.values()}:
        assert set(module.EXAMPLES) <= set(COMMANDS)


@pytest.mark.parametrize("arguments", ["--help", "--version", "", "trian", "--verison"])
def test_help_waits_for_no_heavy_library(arguments: str) -> None:
    code = (
        "import sys\nfrom diffscaler_core import cli\n"
        f"sys.argv = ['diffscaler', *{arguments.split()!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'PIL'} & sys.modules.keys()\n"
        "sys.stdout.write(f'HEAVY {sorted(heavy)}')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("HEAVY []"), result.stdout + result.stderr


# --- examples -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "line"), [(name, line) for name in COMMANDS for line in examples(name)]
)
def test_every_example_runs(name: str, line: str, here: Path) -> None:
    words = shlex.split(line)
    own = words[words.index(name) :]  # what stands before is `diffscaler`, or accelerate's
    result = run(*own, *shlex.split(QUICK.get(name, "")))
    assert result.exit_code == 0, result.output
    for flag in ("-o", "--out"):
        if flag in own:
            assert Path(own[own.index(flag) + 1]).exists()


# --- JSON -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_all_there_is_on_stdout(name: str, here: Path) -> None:
    line = examples(name)[0]
    result = run(*shlex.split(line)[1:], *shlex.split(QUICK.get(name, "")), "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert isinstance(told, dict)
    assert told


def test_json_of_a_plan(here: Path) -> None:
    result = run("train", "flowers.toml", *shlex.split(QUICK["train"]), "--plan", "--json")
    assert result.exit_code == 0, result.output
    (plan,) = json.loads(result.stdout)["tasks"]
    assert plan["pictures"] == 4
    assert plan["steps"] == 2
    assert plan["step_seconds"] > 0
    assert sum(plan["parts"].values()) > 0
    assert not (here / "flowers.safetensors").exists()


def test_json_of_a_training(here: Path) -> None:
    result = run("train", "flowers.toml", *shlex.split(QUICK["train"]), "--json")
    assert result.exit_code == 0, result.output
    (told,) = json.loads(result.stdout)["tasks"]
    task = load_task(told["file"])
    assert (told["name"], told["parameters"]) == ("flowers", task.num_parameters)
    assert told["training"]["steps_done"] == 2


def test_json_of_what_is_refused_is_nothing(here: Path) -> None:
    result = run("info", "gone.safetensors", "--json")
    assert result.exit_code == 1
    assert result.stdout == ""


def test_combine_limits_tasks_to_noise_levels(here: Path) -> None:
    from diffscaler_core import combine_tasks, load_task

    own = load_task("my_task.safetensors")
    options = ("--weights", "0.3,1,1", "--ranges", ":0,0:1.5,all", "--name", "rising")
    assert run("combine", *["my_task.safetensors"] * 3, *options, "-o", "o.safetensors")
    found = load_task("o.safetensors")
    wanted = combine_tasks([own] * 3, [0.3, 1, 1], ranges=[(None, 0.0), (0.0, 1.5), None])
    assert found.info["windows"] == wanted.info["windows"]
    assert found.info["windows"]["edges"] == [1.5, 0.0]
    assert found.name == "rising"


# --- mistakes -------------------------------------------------------------------------------------

#: Command -> a call that is right, with {source} for a file that is read and {out} for one written.
CALLS = {
    "train": "--base assets/pocket --data {source} --out {out}",
    "train-router": "--base assets/pocket --part a=pictures/flowers --part b=pictures/ink-kept "
    "--words {source} --out {out}",
    "features": "--base assets/pocket --data pictures --task {source} --out {out}",
    "info": "{source}",
    "convert": "{source} {out}",
    "extract": "{source} base.safetensors --out {out}",
    "combine": "{source} neon.safetensors --out {out}",
    "resize": "{source} --rank 2 --out {out}",
    "average": "{source} step-1000.safetensors --out {out}",
    "eval": "--base assets/pocket --task {source} --reference pictures/ink-kept --out {out}",
}
#: What is read -> what the message must say.
SOURCES = {
    "gone.safetensors": "gone",
    "gone/gone.safetensors": "gone",
    "junk.safetensors": "junk",
    "empty.safetensors": "empty",
    "text.txt": "text.txt",
    "a_folder": "a_folder",
    "cut.safetensors": "cut",
    "pickle.ckpt": "pickle.ckpt",
}
OUTS = {
    "out.ckpt": "must end in .safetensors",
    "out": "must end in .safetensors",
    "folder.safetensors": "folder.safetensors",
    "text.txt/out.safetensors": "text.txt",
}
GOOD = {
    "train": "pictures/flowers",
    "convert": "my_lora.safetensors",
    "extract": "tuned.safetensors",
}


@pytest.fixture
def mistakes(here: Path) -> Path:
    (here / "junk.safetensors").write_bytes(b"\xff" * 64)
    (here / "empty.safetensors").write_bytes(b"")
    (here / "text.txt").write_text("text")
    (here / "a_folder").mkdir()
    (here / "folder.safetensors").mkdir()
    (here / "cut.safetensors").write_bytes((here / "ink.safetensors").read_bytes()[:5000])
    torch.save({"a": torch.zeros(2)}, here / "pickle.ckpt")
    return here


def refused(result: Any, code: int, *said: str) -> str:
    """Checks that a call ended as a mistake should; returns what was complained of."""
    told: str = result.stderr
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert result.stdout == ""
    for words in said:
        assert words in re.sub(r"\s*│\n│\s*|\s+", " ", told), told
    if code == 1:
        assert told.startswith("diffscaler: ")
        assert len(told.strip().splitlines()) == 1, told
    return told


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", CALLS)
def test_what_cannot_be_read_is_one_line(name: str, source: str, mistakes: Path) -> None:
    call = CALLS[name].format(source=source, out="out.safetensors")
    refused(run(name, *call.split()), 1, SOURCES[source])
    assert not (mistakes / "out.safetensors").exists()


@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("info", "eval")])
def test_what_cannot_be_written_is_one_line(name: str, out: str, mistakes: Path) -> None:
    call = CALLS[name].format(source=GOOD.get(name, "ink.safetensors"), out=out)
    refused(run(name, *call.split()), 1, OUTS[out])


def test_an_out_folder_that_cannot_be_is_one_line(mistakes: Path) -> None:
    call = CALLS["eval"].format(source="ink.safetensors", out="text.txt/out")
    refused(run("eval", *call.split(), *QUICK["eval"].split()), 1, "text.txt")


@pytest.mark.parametrize("base", ["gone", "a_folder", "text.txt", "no/such/base", "~nobody/base"])
@pytest.mark.parametrize("name", ["train", "eval"])
def test_an_unknown_base_is_one_line(name: str, base: str, mistakes: Path) -> None:
    source = GOOD.get(name, "ink.safetensors")
    call = CALLS[name].format(source=source, out="out.safetensors").replace("assets/pocket", base)
    refused(run(name, *call.split()), 1, base)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train --base assets/pocket --data pictures/flowers --method ditscaler", "ditscaler"),
        ("train --base assets/pocket --data pictures/flowers --rank -3", "rank"),
        ("train --base assets/pocket --data pictures/flowers --optimizer adam", "adam"),
        ("train --base assets/pocket --data pictures/flowers --dtype int3", "int3"),
        ("train --base assets/pocket --data pictures/flowers --device tpux", "tpux"),
        ("train --base assets/pocket", "--data"),
        ("train --data pictures/flowers", "--base"),
        ("train gone.toml", "gone.toml"),
        ("train junk.safetensors", "junk.safetensors"),
        ("combine ink.safetensors -o out.safetensors --weights one", "'one'"),
        ("combine ink.safetensors neon.safetensors -o out.safetensors --weights 1", "1"),
        ("combine my_task.safetensors -o o.safetensors --ranges 0", "low:high"),
        ("combine my_task.safetensors -o o.safetensors --ranges 1:0", "lower and a higher"),
        ("combine my_task.safetensors -o o.safetensors --ranges :0,0:", "1 tasks and 2 ranges"),
        ("combine ink.safetensors -o o.safetensors --ranges :0", "only hidden units"),
        ("resize ink.safetensors -o out.safetensors", "rank"),
        ("resize ink.safetensors -o out.safetensors --rank -1", "rank"),
        ("resize ink.safetensors -o out.safetensors --energy 7", "energy"),
        ("average ink.safetensors step-800.safetensors -o o.safetensors --weights x", "'x'"),
        ("extract tuned.safetensors base.safetensors -o o.safetensors --dtype int3", "int3"),
        ("extract tuned.safetensors base.safetensors -o o.safetensors --rank many", "many"),
        ("extract tuned.safetensors base.safetensors -o o.safetensors --targets [", "["),
        ("extract tuned.safetensors base.safetensors -o o.safetensors --device tpux", "tpux"),
        ("extract tuned.safetensors ink.safetensors -o o.safetensors", "ink"),
        ("convert my_task.safetensors o.safetensors --to webui", "webui"),
        ("convert my_lora.safetensors o.safetensors --base gone", "gone"),
        ("convert ink.safetensors o.safetensors --to kohya", "ink"),
        ("convert base.safetensors o.safetensors", "base.safetensors"),
        ("info ink.safetensors gone.safetensors", "gone.safetensors"),
        ("eval --base assets/pocket --task ink.safetensors --reference gone --out o", "gone"),
        (
            "eval --base assets/pocket --task ink.safetensors --reference a_folder --out o",
            "a_folder",
        ),
        (
            "eval --base assets/pocket --task ink.safetensors --reference pictures/ink-kept "
            "--out o --features gone",
            "gone",
        ),
    ],
)
def test_a_wrong_value_is_one_line(line: str, said: str, mistakes: Path) -> None:
    refused(run(*line.split()), 1, said)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train --basse assets/pocket", "--base"),
        ("train --stepss 3", "--steps"),
        ("train --steps many", "--steps"),
        ("info --layer ink.safetensors", "--layers"),
        ("convert a b --strikt", "--strict"),
        ("convert only_one", "target"),
        ("extract a b --outt c", "--out"),
        ("extract a b", "--out"),
        ("combine a b --wieghts 1,2 -o c", "--weights"),
        ("resize a -o b --rnak 3", "--rank"),
        ("average a b -o c --weigths 1,2", "--weights"),
        ("eval --bas x", "--base"),
        ("eval --base x", "--task"),
        ("trian", "train"),
        ("extrakt a b", "extract"),
        ("--versoin", "--version"),
    ],
)
def test_wrong_usage_is_code_2_and_a_suggestion(line: str, said: str, here: Path) -> None:
    told = refused(run(*line.split(), env={"COLUMNS": "200"}), 2, said)
    assert "Usage: " in told


# --- exit codes, and what stands behind an error --------------------------------------------------


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_debug_shows_where_an_error_came_from(how: str) -> None:
    asked = ("--debug",) if how == "flag" else ()
    result = program(
        *asked, "info", "gone.safetensors", DIFFSCALER_DEBUG="1" if how == "environment" else ""
    )
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "FileNotFoundError" in result.stderr
    assert result.stderr.rstrip().endswith("diffscaler: no file 'gone.safetensors'")


def _raising(error: BaseException) -> Callable[[str], Any]:
    class Command:
        def make_context(self, *_: Any, **__: Any) -> Any:
            raise error

    return lambda name: Command()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "diffscaler: stopped"),
        (PermissionError(13, "Permission denied", "/x"), 1, "Permission denied: '/x'"),
        (OSError("disk full"), 1, "disk full"),
        (ModuleNotFoundError("no kornia", name="kornia"), 1, "needs the library kornia"),
    ],
)
def test_every_end_has_its_code(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "load", _raising(error))
    result = run("info", "x")
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "load", _raising(ZeroDivisionError("ours")))
    assert isinstance(run("info", "x").exception, ZeroDivisionError)


def test_exit_codes_are_documented() -> None:
    shown = run("--help", env={"COLUMNS": "200"}).stdout
    for words in (
        "0 done",
        "1 refused",
        "2 wrong usage",
        "130 stopped by Ctrl-C",
        "143 by SIGTERM",
    ):
        assert words in shown


# --- completion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_show_completion_prints_a_script(shell: str) -> None:
    plain = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # else: of the shell around it
    result = program("--show-completion", shell, **plain)
    assert result.returncode == 0, result.stderr
    assert "_COMPLETE" in result.stdout


def completed(line: str) -> set[str]:
    words = line.split(" ")
    code = "import sys; sys.argv[0] = 'diffscaler'; from diffscaler_core.cli import main; main()"
    env = {
        **os.environ,
        "_DIFFSCALER_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    return set(result.stdout.split())


def test_commands_and_their_options_complete() -> None:
    assert completed("diffscaler ") == set(COMMANDS)
    assert completed("diffscaler e") == {"extract", "eval"}
    assert completed("diffscaler train --lr") == {
        *("--lr", "--lr-scale-shift", "--lr-prompts", "--lr-control")
    }

"""The commands of every page run, one after the other, with less work than a reader gives them.

What cannot run here is in `pages.NOT_RUN`; any other line that is no command of ours fails.
"""

import shlex
import subprocess

import pytest

from .pages import NOT_RUN, PAGES, commands, pages_with

pytest.importorskip("diffusers")
typer_testing = pytest.importorskip("typer.testing")

from diffscaler_core.commands import app  # noqa: E402

#: What makes a command quick: flags that come last, and win.
TRAIN = "--size 32 --batch 2 --sample-steps 1 --validation-times 1 --device cpu"
EVAL = (
    "--pictures 6 --steps 2 --batch 3 --size 64 --validation 2 --drift 2 --columns 3 --device cpu"
)
#: Bases that are not here -> the one that is.
BASES = {"stabilityai/stable-diffusion-3.5-medium": "assets/pocket", "…": "assets/pocket"}
#: Commands of a shell that are run as they stand.
SHELL = ("cp ",)
#: Page -> the fixture of what its commands find; else `here`.
PLACES = {
    "README.md": "models",
    "docs/convert.md": "models",
    "docs/extract.md": "models",
    "docs/start_comfyui.md": "comfyui",
}


def told(page, command, steps):
    """Returns a command's words, made quick."""
    words = [BASES.get(word, word) for word in shlex.split(command)[1:]]
    if words[0] == "eval":
        return [*words, *EVAL.split()]
    if words[0] != "train":
        return words
    if page == "docs/training_helpers.md":  # at 32 pixels a picture has as many tokens as a prompt
        return [*words, *TRAIN.replace("32", "48").split(), "--rank", "2", "--steps", str(steps)]
    if page == "docs/auto_rank.md":
        return [*words, *TRAIN.split(), "--steps", "1", "--resume", "never"]
    return [*words, *TRAIN.split(), "--rank", "2", "--steps", str(steps)]


def run(page, command, steps):
    """Runs one command; returns what it said."""
    if command.startswith(SHELL):
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        return done.stdout
    assert command.startswith("diffscaler "), f"{page}: neither run nor in NOT_RUN: {command}"
    result = typer_testing.CliRunner().invoke(app, told(page, command, steps))
    assert result.exit_code == 0, f"{command}\n{result.output}"
    return result.output


def run_of(page):
    """Returns the commands of a page that are run: what the README measures is run on its page."""
    measured = [c for c in commands("docs/evaluation.md") if page == "README.md"]
    return [c for c in commands(page) if c not in NOT_RUN and c not in measured]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in pages_with("sh") if run_of(page)])
def test_the_commands_of_a_page_run(page, request, monkeypatch):
    if any("--stream" in command for command in run_of(page)):
        pytest.importorskip("datasets", reason="one command reads a stream")
    here = request.getfixturevalue(PLACES.get(page, "here"))
    monkeypatch.setattr("diffscaler_core.training.rank_choice.LOOKS", 4)
    steps, said = 1, {}
    for command in run_of(page):
        steps += "--steps" in command  # what asks for more steps gets more
        said[command] = run(page, command, steps)
    for file in EXPECTED.get(page, ()):
        assert (here / file).is_file(), file
    if page == "docs/auto_rank.md":
        assert all("rank for 90 %" in output for output in said.values())


#: Page -> files that are there at its end.
EXPECTED = {
    "README.md": ("task.safetensors",),
    "docs/control.md": ("my_edges.safetensors", "my_depth.safetensors"),
    "docs/convert.md": ("task.safetensors", "other.safetensors"),
    "docs/evaluation.md": ("out/ink/table.md", "out/ink/grid.png"),
    "docs/extract.md": ("mine.safetensors",),
    "docs/start_comfyui.md": (
        "models/diffscaler/ink.safetensors",
        "models/vae/diffscaler_pocket_vae.safetensors",
    ),
    "docs/training.md": (
        "flowers/curve.png",
        "flowers/flowers-best.safetensors",
        "runs/two/ink.safetensors",
        "neon.safetensors",
        "depth.safetensors",
        "roses.safetensors",
    ),
    "docs/translate.md": ("cat_neon.png",),
}


def test_the_tables_name_pages_with_commands():
    assert EXPECTED.keys() | PLACES.keys() <= set(pages_with("sh"))
    every = " ".join(command for page in PAGES for command in commands(page))
    assert all(base in every for base in BASES)


def test_the_configuration_files_are_read(here):
    from diffscaler_core.training.config_file import read_config

    assert read_config(here / "edges.toml").config.control == "edges"
    assert read_config(here / "flowers.toml").config.validate_every == 50
    assert len(read_config(here / "two.toml").tasks) == 2

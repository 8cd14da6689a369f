"""docs/training.md is right: its commands run, its files are read, its table is complete."""

import dataclasses
import io
import re
import shlex
import tarfile
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("diffusers")
typer_testing = pytest.importorskip("typer.testing")

from diffscaler_core.commands import app  # noqa: E402
from diffscaler_core.training.config import TrainingConfig  # noqa: E402
from diffscaler_core.training.config_file import read_config  # noqa: E402
from diffscaler_core.training.settings import SECTIONS, SETTINGS, RunSettings  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
QUICK = "--size 32 --batch 2 --rank 2 --sample-steps 1 --validation-times 1 --device cpu"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line.partition("#")[0].strip() for line in lines if line.startswith("diffscaler ")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder in which the page's commands are typed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    for number, name in enumerate(("flowers", "flowers-kept", "ink", "neon", "depth")):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for i in range(4):
            image = Image.new("RGB", (40, 32), (60 * i, 50 * number, 90))
            image.paste((255, 255, 255), (2 * i, 3, 2 * i + 9, 12))
            image.save(folder / f"{i}.png")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        for i, word in enumerate(("cat", "dog", "cat", "fox")):
            picture = tmp_path / "pictures" / "ink" / f"{i}.png"
            tar.add(picture, f"{i}.png")
            info = tarfile.TarInfo(f"{i}.txt")
            info.size = len(word)
            tar.addfile(info, io.BytesIO(word.encode()))
    for block in blocks("toml"):
        name = re.match(r"# (\S+\.toml)\n", block)[1]
        (tmp_path / name).write_text(block)
    return tmp_path


@pytest.mark.slow
def test_every_command_runs(here):
    pytest.importorskip("datasets", reason="one command reads a stream")
    steps = 1
    for command in commands():
        words = shlex.split(command)[1:]
        if words[0] == "train":
            steps += "--steps" in words  # what asks for more steps gets more
            words += [*shlex.split(QUICK), "--steps", str(steps)]
        result = typer_testing.CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{command}\n{result.output}"
    assert (here / "flowers" / "curve.png").is_file()
    assert (here / "flowers" / "flowers-best.safetensors").is_file()
    assert (here / "runs" / "two" / "ink.safetensors").is_file()
    assert (here / "neon.safetensors").is_file()
    assert (here / "depth.safetensors").is_file()
    assert (here / "roses.safetensors").is_file()


@pytest.mark.slow
def test_the_python_runs(here):
    (block,) = blocks("python")
    code = block.replace("steps=600", "steps=2, batch=2, sample_steps=1").replace("128", "32")
    assert code.count("steps=2") == 1
    exec(compile(code, "docs/training.md", "exec"), {})
    assert (here / "flowers.safetensors").is_file()
    assert (here / "runs" / "python" / "log.jsonl").is_file()


def test_every_file_is_read(here):
    assert len(blocks("toml")) == 3
    assert read_config(here / "edges.toml").config.control == "edges"
    assert read_config(here / "flowers.toml").config.validate_every == 50
    assert len(read_config(here / "two.toml").tasks) == 2


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

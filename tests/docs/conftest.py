"""The folder in which a reader follows the pages: what their examples take for granted."""

import importlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from .pages import PAGES, ROOT, blocks


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small are several times slower on many threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def script_module() -> Callable[[str], Any]:
    """Gives a script as a module; its neighbours are found as the script itself finds them."""

    def load(name: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(ROOT / "scripts")
            return importlib.import_module(name)

    return load


@pytest.fixture
def check_page(request: pytest.FixtureRequest) -> Callable[[Any, Callable[[list[Any]], str]], None]:
    """Compares a page that a script writes from pytest's items with what it should be."""

    def check(maker: Any, text: Callable[[list[Any]], str]) -> None:
        name = f"scripts/{maker.__name__}.py"
        if _is_whole_suite(request.config):  # pytest has collected them all: no need to ask again
            found = maker.PAGE.read_text(encoding="utf-8")
            assert text(request.session.items) == found, f"run {name}"
            return
        command = [sys.executable, str(ROOT / name), "--check"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]

    return check


def _is_whole_suite(config: pytest.Config) -> bool:
    option = config.option
    narrowed = option.keyword or option.markexpr or option.deselect or option.ignore
    return not narrowed and set(config.args) <= {"tests", str(ROOT / "tests"), str(ROOT)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a test: assets, pictures, streams, and the pages' TOML files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    for number, name in enumerate(("flowers", "flowers-kept", "ink", "neon", "depth")):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for i in range(4):
            image = Image.new("RGB", (40, 32), (60 * i, 50 * number, 90))
            image.paste((255, 255, 255), (2 * i, 3, 2 * i + 9, 12))
            image.save(folder / f"{i}.png")
    shutil.copytree(tmp_path / "pictures", tmp_path / "pictures_depth")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        for i, word in enumerate(("cat", "dog", "cat", "fox")):
            tar.add(tmp_path / "pictures" / "ink" / f"{i}.png", f"{i}.png")
            info = tarfile.TarInfo(f"{i}.txt")
            info.size = len(word)
            tar.addfile(info, io.BytesIO(word.encode()))
    for page in PAGES:
        for block in blocks(page, "toml"):
            named = re.match(r"# (\S+\.toml)\n", block.text)
            assert named, f"{page}, line {block.line}: a TOML block begins with its file's name"
            assert not (tmp_path / named[1]).exists(), f"{page}: a second {named[1]}"
            (tmp_path / named[1]).write_text(block.text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def models(here: Path) -> Path:
    """Beside that: a base, a fine-tune of it, as files and folders, and a LoRA for it."""
    from diffscaler_core import export_lora, new_task
    from diffscaler_core.pocket import load_pipeline

    model = load_pipeline("assets/pocket").transformer
    for name, folder in (("base", "stable-diffusion-3.5-medium"), ("tuned", "my-finetune")):
        if name == "tuned":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.002 * torch.randn_like(parameter)
        model.save_pretrained(here / folder / "transformer")
        save_file(model.state_dict(), here / f"{name}.safetensors")
    task = new_task(model, "lora", rank=2, name="mine")
    export_lora(task, here / "my_lora.safetensors", "kohya")
    return here


@pytest.fixture
def comfyui(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ComfyUI's folder with the pack in it: the current folder of a test."""
    folder = here / "ComfyUI"
    (folder / "custom_nodes").mkdir(parents=True)
    (folder / "models").mkdir()
    pack = folder / "custom_nodes" / "diffscaler"
    shutil.copytree(ROOT / "assets" / "pocket", pack / "assets" / "pocket")
    monkeypatch.chdir(folder)
    return folder

import re

import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("huggingface_hub")

from diffscaler_core import DiffScalerError, load_task, new_task, save_task
from diffscaler_core.hub import FILE_NAME, find_task_file
from diffscaler_core.training.command import model_card


@pytest.fixture
def task(sd3):
    facts = {"training": {"steps": 9, "images": 3}, "prompts": ["rose"], "license": "cc0-1.0"}
    task = new_task(sd3.model, rank=2, name="flowers").with_info(**facts)
    return task.replace(conditioning={"context": torch.zeros(1, 3, 12)})


class Hub:
    """HfApi, as far as an upload goes: keeps what it was given."""

    def __init__(self, error=None):
        self.repositories, self.files, self.error = [], {}, error

    def create_repo(self, repository, *, private, exist_ok):
        assert private
        assert exist_ok
        self.repositories.append(repository)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.error:
            raise self.error
        from pathlib import Path

        assert repo_id in self.repositories
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}


def head_of(text):
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return yaml.safe_load(found[1]), text[found.end() :]


def test_the_card_says_what_it_is_and_how_it_is_used(task):
    text = model_card.card_text("me/flowers", {FILE_NAME: task}, "them/base", ["step-000009.png"])
    head, body = head_of(text)
    assert head["base_model"] == "them/base"
    assert head["license"] == "cc0-1.0"
    assert "diffscaler" in head["tags"]
    assert 'pipe.load_diffscaler("me/flowers")' in body
    assert "![Samples](step-000009.png)" in body
    assert "`rose`" in body
    assert "steps 9, images 3" in body


def test_no_path_of_a_machine_goes_into_a_card(task, tmp_path):
    base = tmp_path / "me" / "base"
    base.mkdir(parents=True)
    text = model_card.card_text("me/flowers", {FILE_NAME: task}, str(base))
    assert str(tmp_path) not in text
    assert "base_model" not in head_of(text)[0]


def test_an_upload_holds_card_samples_and_a_file_that_loads(task, tmp_path):
    out, sheet, hub = tmp_path / "f.safetensors", tmp_path / "step-000009.png", Hub()
    save_task(task, out)
    Image.new("RGB", (4, 4)).save(sheet)
    gone = tmp_path / "step-000010.png"
    where = model_card.push("me/flowers", {out: task}, "them/base", [sheet, gone], api=hub)
    assert where == "https://huggingface.co/me/flowers"
    assert set(hub.files) == {"README.md", FILE_NAME, "step-000009.png"}
    loaded = tmp_path / "loaded"
    loaded.mkdir()
    (loaded / FILE_NAME).write_bytes(hub.files[FILE_NAME])
    assert load_task(find_task_file(loaded)).name == "flowers"


def test_several_tasks_keep_their_own_names(task, tmp_path):
    files = [save_task(task, tmp_path / f"{name}.safetensors") for name in ("a", "b")]
    folder = model_card.write_card_folder(
        tmp_path / "up", "me/two", {file: task for file in files}, "them/base"
    )
    assert {p.name for p in folder.iterdir()} == {"README.md", "a.safetensors", "b.safetensors"}
    text = (folder / "README.md").read_text()
    assert 'weight_name="a.safetensors"' in text
    assert "2 DiffScaler" not in text  # a link stands between
    assert "2 [DiffScaler]" in text


def test_a_hub_that_refuses_is_one_line(task, tmp_path):
    out = save_task(task, tmp_path / "f.safetensors")
    with pytest.raises(DiffScalerError, match=r"upload to 'me/x' failed .*no way.*saved here"):
        model_card.push("me/x", {out: task}, "b", api=Hub(OSError("no way\nat all")))


@pytest.mark.parametrize("name", ["me", "me/", "a/b/c", "../x", "me/x y", "/me/x"])
def test_what_is_no_repository_is_refused_at_once(name):
    with pytest.raises(DiffScalerError, match="owner/name"):
        model_card.check_repository(name)
    assert model_card.check_repository("me/x-1.0_b") == "me/x-1.0_b"

import json
import re

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
typer_testing = pytest.importorskip("typer.testing")

from diffscaler_core import cli, load_task, new_task, save_task  # noqa: E402
from diffscaler_core.commands import app  # noqa: E402
from diffscaler_core.training import bases  # noqa: E402


def run(*arguments):
    return typer_testing.CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def base(sd3, tmp_path, monkeypatch):
    """A folder that `train` takes for a base, with a tiny SD3 in it."""
    folder = tmp_path / "base"
    folder.mkdir()
    monkeypatch.setattr("diffscaler_core.training.command.load_base", lambda *a: sd3)
    return folder


def train(base, pictures, out, *more):
    settings = ["--steps", 3, "--rank", 2, "--batch", 4, "--size", 16, "--device", "cpu"]
    return run("train", "--base", base, "--data", pictures, "--out", out, *settings, *more)


def test_a_folder_of_pictures_becomes_a_task_file(base, pictures, words_file, tmp_path):
    out = tmp_path / "tasks" / "colours.safetensors"
    png = tmp_path / "samples.png"
    result = train(
        base, pictures, out, "--words", words_file, "--preview", png, "--save-dtype", "float16"
    )
    assert result.exit_code == 0, result.output
    assert "3 of 3 steps, 6 pictures, loss" in result.stderr
    task = load_task(out)
    assert task.name == "colours"
    assert task.info["training"]["steps_done"] == 3
    assert {t.dtype for own in task.layers.values() for t in own.values()} == {torch.float16}
    assert task.modelspec["thumbnail"].startswith("data:image/jpeg;base64,")
    with Image.open(png) as image:
        assert image.size == (64, 16)  # two prompts, two pictures each
    shown = run("info", out)
    assert shown.exit_code == 0
    assert "colours" in shown.stdout
    facts = json.loads(run("info", out, "--json").stdout)
    assert facts["name"] == "colours"
    assert facts["layers"] == len(task.layers)
    assert "thumbnail" not in facts["modelspec"]
    assert str(tmp_path) not in json.dumps(facts)


def test_new_classes_get_prompts_of_their_own(base, pictures, words_file, tmp_path):
    (pictures / "red").rename(pictures / "pink")
    (pictures / "blue").rename(pictures / "grey")
    out = tmp_path / "new.safetensors"
    assert train(base, pictures, out, "--words", words_file).exit_code == 0
    assert load_task(out).prompts == ("grey", "pink")


def test_words_beside_the_base_are_found(base, pictures, words, tmp_path):
    save_task(words, base / "diffscaler" / "words.safetensors")
    out = tmp_path / "t.safetensors"
    assert train(base, pictures, out).exit_code == 0
    again = tmp_path / "again.safetensors"
    assert train(base, pictures, again, "--from", out).exit_code == 0
    assert load_task(again).info["training"]["steps_done"] == 3


def test_combine_writes_what_both_do(sd3, tmp_path):
    paths = []
    for i in range(2):
        task = new_task(sd3.model, rank=2, name=f"t{i}", seed=i)
        layers = {n: {p: t + 0.1 for p, t in own.items()} for n, own in task.layers.items()}
        paths.append(save_task(task.replace(layers=layers), tmp_path / f"t{i}.safetensors"))
    out = tmp_path / "both.safetensors"
    result = run("combine", *paths, "--weights", "0.5,2", "--out", out)
    assert result.exit_code == 0, result.output
    assert "task 't0+t1'" in result.stdout
    both = load_task(out)
    name = next(iter(both.layers))
    expected = 0.5 * load_task(paths[0]).layers[name]["scale"]
    expected = expected + 2 * load_task(paths[1]).layers[name]["scale"]
    torch.testing.assert_close(both.layers[name]["scale"], expected)


def one_line(result, message):
    assert result.exit_code == 1
    *bar, line = result.stderr.splitlines()
    assert all(text.startswith("training ") for text in bar)
    assert line.startswith("diffscaler: ")
    assert re.search(message, line), line
    assert "Traceback" not in result.output


def test_mistakes_are_one_line_and_exit_code_one(base, pictures, words_file, tmp_path):
    out = tmp_path / "t.safetensors"
    empty = tmp_path / "empty"
    empty.mkdir()
    known = ("--words", words_file)
    one_line(run("info", tmp_path / "no.safetensors"), r"no file '.*no\.safetensors'")
    one_line(train(base, empty, out, *known), "holds no picture")
    one_line(train(base, tmp_path / "nowhere", out, *known), "is no folder")
    one_line(train(base, pictures, tmp_path / "t.ckpt", *known), "must end in .safetensors")
    one_line(train(base, pictures, out, "--method", "lorra", *known), "known: diffscaler")
    one_line(train(base, pictures, out, "--size", "13", *known), "multiple of 4")
    one_line(train(base, pictures, out, "--prompts", "encoded", *known), "text encoder")
    one_line(train(base, pictures, out), "null prompt")
    (pictures / "red" / "broken.png").write_bytes(b"no")
    one_line(train(base, pictures, out, *known), r"1 of 7 pictures cannot be used: .red/broken")
    assert train(base, pictures, out, "--skip-bad", *known).exit_code == 0
    one_line(run("combine", out, "--weights", "a", "--out", out), "are no numbers")
    one_line(run("combine", out, out, "--weights", "1", "--out", out), "as many of each")
    assert not list(tmp_path.glob("*.part"))


def test_a_base_that_is_none_is_one_line(pictures, tmp_path):
    out = tmp_path / "t.safetensors"
    one_line(train(tmp_path, pictures, out), "is no base: it holds neither model_index.json")
    one_line(train(tmp_path / "nowhere", pictures, out), "no folder .*owner/name")


def test_a_diverged_run_keeps_the_last_good_state(
    base, sd3, pictures, words_file, tmp_path, monkeypatch
):
    import dataclasses

    calls = []

    def predict(*arguments):
        calls.append(1)
        return sd3.predict(*arguments) * (float("inf") if len(calls) == 3 else 1)

    broken = dataclasses.replace(sd3, predict=predict)
    monkeypatch.setattr("diffscaler_core.training.command.load_base", lambda *a: broken)
    out = tmp_path / "t.safetensors"
    one_line(train(base, pictures, out, "--words", words_file), "step 3 of 3.*last-good")
    assert load_task(tmp_path / "t-last-good.safetensors").info["training"]["steps_done"] == 2
    assert not out.exists()


def test_ctrl_c_saves_the_state_so_far(base, sd3, pictures, words_file, tmp_path, monkeypatch):
    import dataclasses

    calls = []

    def predict(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sd3.predict(*arguments)

    slow = dataclasses.replace(sd3, predict=predict)
    monkeypatch.setattr("diffscaler_core.training.command.load_base", lambda *a: slow)
    out = tmp_path / "t.safetensors"
    result = train(base, pictures, out, "--words", words_file)
    assert result.exit_code == 130
    assert "stopped early, 2 of 3 steps" in result.stderr
    assert load_task(out).info["training"]["steps_done"] == 2


def test_a_diffusers_folder_is_loaded(tmp_path):
    import diffusers

    model = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    pipe = bases.load_base(str(tmp_path / "ddpm"), "bfloat16", "cpu")
    assert pipe.unet.dtype == torch.bfloat16


def test_the_entry_point_runs_the_app(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["diffscaler", "--version"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert re.fullmatch(r"\d+\.\d+.*\n", capsys.readouterr().out)

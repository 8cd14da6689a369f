import dataclasses
import json
import os
import re
import signal

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
typer_testing = pytest.importorskip("typer.testing")

from diffscaler_core import cli, load_task, new_task, save_task  # noqa: E402
from diffscaler_core.commands import app  # noqa: E402
from diffscaler_core.training.bases import load as bases  # noqa: E402
from diffscaler_core.training.run_folder import read_log  # noqa: E402
from diffscaler_core.training.settings import SETTINGS  # noqa: E402

from .runs import farthest, same  # noqa: E402


def run(*arguments, **more):
    return typer_testing.CliRunner().invoke(app, [str(argument) for argument in arguments], **more)


def train(base, pictures, out, *more):
    settings = ["--steps", 3, "--rank", 2, "--batch", 4, "--size", 16, "--device", "cpu"]
    quick = ["--sample-steps", 2]
    return run("train", "--base", base, "--data", pictures, "--out", out, *settings, *quick, *more)


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
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", task.modelspec["date"])
    with Image.open(png) as image:
        assert image.size == (64, 16)  # two prompts, two pictures each
    folder = tmp_path / "tasks" / "colours"
    assert {"config.toml", "log.jsonl", "samples", "checkpoints"} <= {
        path.name for path in folder.iterdir()
    }
    assert [line["step"] for line in read_log(folder / "log.jsonl")] == [1, 2, 3]
    shown = run("info", out)
    assert shown.exit_code == 0
    assert "colours" in shown.stdout
    facts = json.loads(run("info", out, "--json").stdout)
    assert facts["name"] == "colours"
    assert facts["layers"] == len(task.layers)
    assert "thumbnail" not in facts["modelspec"]
    assert str(tmp_path) not in json.dumps(facts)


def test_a_file_says_what_flags_say_and_flags_win(base, pictures, words_file, tmp_path):
    flags = tmp_path / "flags.safetensors"
    assert train(base, pictures, flags, "--words", words_file, "--name", "t").exit_code == 0
    file = tmp_path / "run.toml"
    file.write_text(
        f"base = '{base}'\ndata = '{pictures}'\nout = '{tmp_path / 'file.safetensors'}'\n"
        f"[task]\nname = 't'\nrank = 2\n[training]\nsteps = 99\nbatch = 4\n"
        f"[pictures]\nsize = 16\n[prompts]\nwords = '{words_file}'\n"
        f"[validation]\nsample_steps = 2\n[run]\ndevice = 'cpu'\n"
    )
    result = run("train", file, "--steps", 3)
    assert result.exit_code == 0, result.output
    assert same(load_task(flags), load_task(tmp_path / "file.safetensors"))
    # what the run wrote down is a file for `train` as well
    again = tmp_path / "again.safetensors"
    written = tmp_path / "file" / "config.toml"
    assert run("train", written, "--out", again, "--folder", tmp_path / "f").exit_code == 0
    assert same(load_task(flags), load_task(again))


def test_the_plan_trains_nothing_and_keeps_its_word(base, sd3, pictures, words_file, tmp_path):
    before = {name: tensor.clone() for name, tensor in sd3.model.state_dict().items()}
    out = tmp_path / "t.safetensors"
    result = train(base, pictures, out, "--words", words_file, "--plan")
    assert result.exit_code == 0, result.output
    assert not out.exists()
    assert not (tmp_path / "t").exists()
    assert all(torch.equal(before[n], t) for n, t in sd3.model.state_dict().items())
    plan = result.stdout
    assert "measured over 2 steps" in plan
    assert "estimated" in plan
    trained = int(re.search(r"trained +([\d,]+)", plan)[1].replace(",", ""))
    assert train(base, pictures, out, "--words", words_file).exit_code == 0
    assert load_task(out).num_parameters == trained
    said = float(re.search(r"file +about ([\d.]+) KiB", plan)[1])
    assert said == pytest.approx(out.stat().st_size / 1024, rel=0.4)  # + thumbnail, facts


def test_validation_and_checkpoints_are_told_and_logged(base, pictures, words_file, tmp_path):
    out = tmp_path / "t.safetensors"
    more = ["--validation-share", 0.34, "--validate-every", 2, "--save-every", 2, "--steps", 4]
    result = train(base, pictures, out, "--words", words_file, *more, "--sample-every", 2)
    assert result.exit_code == 0, result.output
    for line in ("step 2: validation loss", "step 2: samples in", "step 2: checkpoint saved"):
        assert line in result.stderr
    assert "best validation loss" in result.stderr
    log = read_log(tmp_path / "t" / "log.jsonl")
    assert [line["step"] for line in log if "validation" in line] == [2, 4]
    assert load_task(tmp_path / "t" / "t-best.safetensors").info["name"] == "t"
    assert len(list((tmp_path / "t" / "samples").glob("*.png"))) == 2


def test_validation_pictures_of_their_own(base, pictures, words_file, tmp_path):
    other = tmp_path / "other"
    (pictures / "blue").rename(pictures / "green")
    (other / "blue").mkdir(parents=True)
    (pictures / "red" / "0.png").rename(other / "blue" / "0.png")
    out = tmp_path / "t.safetensors"
    told = ["--words", words_file, "--validation", other]
    result = train(base, pictures, out, *told)
    assert result.exit_code == 0, result.output
    assert "validation loss" in result.stderr
    assert load_task(out).info["training"]["images"] == 5
    one_line(
        train(base, pictures, tmp_path / "l.safetensors", *told, "--prompts", "learned"),
        "1 prompts stand only in the validation pictures.*'blue'",
    )


def test_views_shapes_and_the_cache(base, sd3, pictures, words_file, tmp_path, monkeypatch):
    encoded = []

    def encode(pixels):
        encoded.append(tuple(pixels.shape[2:]))
        return sd3.encode(pixels)

    kept = dataclasses.replace(sd3, encode=encode, encoder_key="tiny")
    monkeypatch.setattr("diffscaler_core.training.command.train.load_base", lambda *a: kept)
    Image.new("RGB", (64, 24), "green").save(pictures / "red" / "wide.png")
    told = ["--words", words_file, "--buckets", "--crops", 1, "--flip", "--name", "t"]
    told += ["--cache", tmp_path / "cache"]
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    result = train(base, pictures, first, *told)
    assert result.exit_code == 0, result.output
    assert len(set(encoded)) > 1, "a wide picture keeps its shape"
    encoded.clear()
    assert train(base, pictures, second, *told).exit_code == 0
    assert not encoded, "what is in the cache is not encoded again"
    assert farthest(load_task(first), load_task(second)) < 1e-6


def test_prior_pictures_take_part(base, pictures, words_file, tmp_path):
    prior = tmp_path / "green"  # a word that the base knows
    prior.mkdir()
    Image.new("RGB", (32, 32), "green").save(prior / "0.png")
    told = ["--words", words_file, "--name", "t"]
    with_them, without = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    result = train(base, pictures, with_them, *told, "--prior", prior)
    assert result.exit_code == 0, result.output
    assert train(base, pictures, without, *told).exit_code == 0
    assert farthest(load_task(with_them), load_task(without)) > 1e-6
    one_line(train(base, pictures, without, *told, "--prior", prior, "--buckets"), "one shape")


def test_advice_is_shown_where_the_run_is(base, pictures, words_file, tmp_path):
    result = train(base, pictures, tmp_path / "t.safetensors", "--words", words_file, "--batch", 8)
    assert "t: 6 pictures are few" in result.stderr
    assert "t: a batch of 8 shows the same picture twice" in result.stderr
    assert result.exit_code == 0


def test_several_tasks_in_one_run(base, pictures, words_file, tmp_path):
    file = tmp_path / "two.toml"
    file.write_text(
        f"base = '{base}'\nfolder = '{tmp_path / 'two'}'\n"
        f"steps = 2\nbatch = 2\nrank = 2\nsize = 16\ndevice = 'cpu'\nsample_steps = 2\n"
        f"words = '{words_file}'\n"
        f"[[tasks]]\nname = 'warm'\ndata = '{pictures / 'red'}'\nprompts = 'learned'\n"
        f"[[tasks]]\ndata = '{pictures / 'blue'}'\nout = '{tmp_path / 'cold.safetensors'}'\n"
        f"prompts = 'learned'\n"
    )
    result = run("train", file)
    assert result.exit_code == 0, result.output
    warm, cold = (
        load_task(tmp_path / "two" / "warm.safetensors"),
        load_task(tmp_path / "cold.safetensors"),
    )
    assert (warm.name, cold.name) == ("warm", "cold")
    assert (warm.prompts, cold.prompts) == (("warm",), ("cold",))
    assert "thumbnail" in warm.modelspec
    tasks = [line["task"] for line in read_log(tmp_path / "two" / "log.jsonl")]
    assert tasks == ["warm", "cold"] * 2
    # alone, a task becomes the same
    alone = [*("--steps", 2, "--batch", 2), "--words", words_file, "--prompts", "learned"]
    out = tmp_path / "alone.safetensors"
    assert train(base, pictures / "red", out, "--name", "warm", *alone).exit_code == 0
    for name, own in load_task(out).layers.items():
        for part, tensor in own.items():
            torch.testing.assert_close(warm.layers[name][part], tensor, atol=2e-4, rtol=1e-3)


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
    """The last line is the error; before it stands only what the run said on its way."""
    assert result.exit_code == 1, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("diffscaler: ")
    assert result.stderr.count("diffscaler: ") == 1
    assert re.search(message, line), line
    assert "Traceback" not in result.output


def test_mistakes_are_one_line_and_exit_code_one(base, pictures, words_file, tmp_path):
    out = tmp_path / "t.safetensors"
    empty = tmp_path / "empty"
    empty.mkdir()
    known = ("--words", words_file)
    one_line(run("info", tmp_path / "no.safetensors"), r"no file '.*no\.safetensors'")
    one_line(run("train", tmp_path / "no.toml"), r"no file '.*no\.toml'")
    one_line(run("train", "--data", pictures), "no base was given")
    one_line(train(base, empty, out, *known), "holds no picture")
    one_line(train(base, tmp_path / "nowhere", out, *known), "is no folder")
    one_line(train(base, pictures, tmp_path / "t.ckpt", *known), "must end in .safetensors")
    one_line(train(base, pictures, out, "--method", "lorra", *known), "known: diffscaler")
    one_line(train(base, pictures, out, "--size", "13", *known), "multiple of 4")
    one_line(train(base, pictures, out, "--prompts", "encoded", *known), "text encoder")
    one_line(train(base, pictures, out), "null prompt")
    one_line(train(base, pictures, out, "--push-to-hub", "me", *known), "'owner/name'")
    one_line(train(base, pictures, out, "--log-with", "pen", *known), "known: tensorboard")
    (pictures / "red" / "broken.png").write_bytes(b"no")
    one_line(train(base, pictures, out, *known), r"1 of 7 pictures cannot be used: .red/broken")
    result = train(base, pictures, out, "--skip-bad", *known)
    assert result.exit_code == 0
    assert "skipped red/broken.png" in result.stderr
    one_line(run("combine", out, "--weights", "a", "--out", out), "are no numbers")
    one_line(run("combine", out, out, "--weights", "1", "--out", out), "as many of each")
    assert not list(tmp_path.glob("*.part"))


def test_a_mistake_is_found_before_anything_is_loaded(pictures, tmp_path, monkeypatch):
    def load_base(*arguments):
        raise AssertionError("nothing must be loaded yet")

    monkeypatch.setattr("diffscaler_core.training.command.train.load_base", load_base)
    file = tmp_path / "run.toml"
    file.write_text(f"base = 'b'\ndata = '{pictures}'\n\n[training]\nlr = -1\n")
    one_line(run("train", file), "run.toml line 5: lr must be above 0, got -1")
    file.write_text(f"base = 'b'\ndata = '{pictures}'\n")
    one_line(run("train", file, "--words", tmp_path / "no.safetensors"), "no file")


def test_of_several_processes_one_complains(pictures, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    result = run("train", "--data", pictures)
    assert (result.exit_code, result.output) == (1, "")


def test_a_base_that_is_none_is_one_line(pictures, tmp_path):
    out = tmp_path / "t.safetensors"
    one_line(train(tmp_path, pictures, out), "is no base: it holds neither model_index.json")
    one_line(train(tmp_path / "nowhere", pictures, out), "no folder .*owner/name")


def failing(sd3, monkeypatch, at, act):
    """Makes the base do something at its n-th step's prediction."""
    calls = [-1]  # the look before the first step does not count

    def predict(*arguments):
        calls.append(1)
        factor = act() if len(calls) - 2 == at else None
        return sd3.predict(*arguments) * (1 if factor is None else factor)

    broken = dataclasses.replace(sd3, predict=predict)
    monkeypatch.setattr("diffscaler_core.training.command.train.load_base", lambda *a: broken)


def test_a_diverged_run_keeps_the_last_good_state(
    base, sd3, pictures, words_file, tmp_path, monkeypatch
):
    failing(sd3, monkeypatch, 3, lambda: float("inf"))
    out = tmp_path / "t.safetensors"
    one_line(train(base, pictures, out, "--words", words_file), "step 3 of 3.*last-good")
    assert load_task(tmp_path / "t-last-good.safetensors").info["training"]["steps_done"] == 2
    assert not out.exists()


def test_ctrl_c_saves_the_state_so_far_and_the_same_command_goes_on(
    base, sd3, pictures, words_file, tmp_path, monkeypatch
):
    out, whole = tmp_path / "t.safetensors", tmp_path / "whole.safetensors"
    told = ("--words", words_file, "--steps", 5, "--name", "t")
    assert train(base, pictures, whole, *told).exit_code == 0
    failing(sd3, monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    result = train(base, pictures, out, *told)
    assert result.exit_code == 130, result.output
    assert "stopped early, 3 of 5 steps" in result.stderr
    assert load_task(out).info["training"]["steps_done"] == 3
    monkeypatch.setattr("diffscaler_core.training.command.train.load_base", lambda *a: sd3)
    result = train(base, pictures, out, *told)
    assert result.exit_code == 0, result.output
    assert "going on after step 3" in result.stderr
    assert farthest(load_task(out), load_task(whole)) < 1e-6
    assert [line["step"] for line in read_log(tmp_path / "t" / "log.jsonl")] == [1, 2, 3, 4, 5]
    result = train(base, pictures, out, *told)
    assert "it is finished" in result.stderr
    assert "thumbnail" in load_task(out).modelspec  # from the samples of before
    result = train(base, pictures, out, *told, "--resume", "never")
    assert "going on" not in result.stderr
    assert result.exit_code == 0


def test_every_setting_is_a_flag_with_help_in_few_words():
    result = run("train", "--help", env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for name in SETTINGS:
        assert f"--{name.replace('_', '-')}" in result.stdout
    panels = re.findall(r"─ ([A-Z][\w ,]+?) ─", result.stdout)
    assert panels[:3] == ["Arguments", "Options", "Common"]
    assert "Examples:" in result.stdout


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


def test_ranks_are_chosen_planned_and_printed(base, pictures, words_file, tmp_path):
    out = tmp_path / "auto.safetensors"
    more = ["--words", words_file, "--rank", "auto", "--rank-budget", "60%"]
    planned = train(base, pictures, out, *more, "--plan")
    assert planned.exit_code == 0, planned.output
    assert re.search(r"ranks +ranks \d+ to \d+ on \d+ of \d+ layers", planned.stdout)
    result = train(base, pictures, out, *more)
    assert result.exit_code == 0, result.output
    assert "rank for 90 %" in result.stderr
    assert "transformer_blocks.0.attn.to_q" in result.stderr
    ranks = {len(own.get("down", ())) for own in load_task(out).layers.values()}
    assert len(ranks) > 1
    assert 0 in ranks
    file = tmp_path / "auto" / "config.toml"
    assert 'rank = "auto"' in file.read_text()
    assert 'rank_budget = "60%"' in file.read_text()
    again = run("train", file)
    assert again.exit_code == 0, again.output
    refused = train(base, pictures, out, "--rank", "wide")
    assert refused.exit_code == 1
    assert "rank must be" in refused.stderr

"""`diffscaler train` with control pictures: what it is told, what it says, what comes out."""

import io
import re

import pytest
import torch
from PIL import Image, ImageOps

pytest.importorskip("diffusers")
typer_testing = pytest.importorskip("typer.testing")

from diffscaler_core import DiffScalerError, load_task, new_task, save_task  # noqa: E402
from diffscaler_core.training import TrainingConfig, TrainingData, prompts_for  # noqa: E402
from diffscaler_core.training.advice import after_validation, before_training  # noqa: E402
from diffscaler_core.training.command.display import Display  # noqa: E402
from diffscaler_core.training.command.model_card import card_text  # noqa: E402
from diffscaler_core.training.command.plan import format_plan, plan_task  # noqa: E402
from diffscaler_core.training.config_file import dump, read_config  # noqa: E402
from diffscaler_core.training.progress import History, Progress, by_noise  # noqa: E402
from diffscaler_core.training.run_folder import RunFolder, read_log  # noqa: E402

from .runs import same  # noqa: E402
from .test_command import one_line, run, train  # noqa: E402


@pytest.fixture
def told(words_file):
    return ["--words", words_file, "--name", "t"]


def beside(pictures, name="pictures_control"):
    """Writes the pictures' negatives beside them."""
    folder = pictures.with_name(name)
    for path in pictures.rglob("*.png"):
        out = folder / path.relative_to(pictures)
        out.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            ImageOps.invert(image).save(out)
    return folder


def test_edges_are_made_of_the_pictures_and_a_control_task_comes_out(
    base,
    pictures,
    told,
    tmp_path,
):
    out = tmp_path / "edges.safetensors"
    more = ["--control", "edges", "--validation-share", 0.7, "--control-rank", 3]
    result = train(base, pictures, out, *told, *more, "--save-dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "3 steps are few for a control task" in result.stderr
    assert re.search(
        r"validation loss [\d.]+ .*[\d.]+ with another picture's control", result.stderr
    )
    assert re.search(r"by noise [\d–%., ]+%", result.stderr)
    task = load_task(out)
    assert task.info["control"]["kind"] == "edges"
    assert task.info["control"]["rank"] == 3
    assert {t.dtype for t in task.extras.values()} == {torch.bfloat16}
    best = load_task(tmp_path / "edges" / "t-best.safetensors")
    assert best.extras.keys() == task.extras.keys()
    (last,) = [e for e in read_log(tmp_path / "edges" / "log.jsonl") if "validation_other" in e]
    assert last["step"] == 3
    assert "control" in run("info", out).stdout
    # the file that the run wrote down does it again
    again = tmp_path / "again.safetensors"
    written = tmp_path / "edges" / "config.toml"
    assert run("train", written, "--out", again, "--folder", tmp_path / "f").exit_code == 0
    assert same(load_task(again), task)


def test_pairs_come_from_a_folder_from_beside_or_from_a_list(
    base,
    pictures,
    told,
    tmp_path,
    words_file,
):
    one_line(
        train(base, pictures, tmp_path / "x.safetensors", *told, "--control", "negative"),
        "pictures_control' is no folder; give the folder of control pictures, or have them made",
    )
    beside(pictures), beside(pictures, "elsewhere")
    outs = [tmp_path / f"{name}.safetensors" for name in ("beside", "named")]
    more = ["--control", "negative"]
    assert train(base, pictures, outs[0], *told, *more).exit_code == 0
    more += ["--control-from", pictures.with_name("elsewhere")]
    result = train(base, pictures, outs[1], *told, *more)
    assert result.exit_code == 0, result.output
    first, second = map(load_task, outs)
    assert same(first, second)
    assert first.info["control"]["kind"] == "negative"
    (pictures.with_name("elsewhere") / "red" / "1.png").unlink()
    for plan in ([], ["--plan"]):
        one_line(
            train(base, pictures, outs[1], *told, *more, *plan),
            r"1 of 6 pictures cannot be used: .*red/1.png .no control picture of that name",
        )
    lines = [
        '{"file_name": "red/0.png", "text": "red", "sketch": "blue/0.png"}',
        '{"file_name": "red/1.png", "text": "red", "sketch": "blue/1.png"}',
    ]
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    more = ["--control", "sketch", "--control-from", "sketch"]
    result = train(base, pictures, tmp_path / "l.safetensors", *told, *more, "--batch", 2)
    assert result.exit_code == 0, result.output


def test_validation_pictures_have_their_own_controls(base, pictures, told, tmp_path):
    controls, other = beside(pictures), tmp_path / "other" / "red"
    other.mkdir(parents=True)
    (pictures / "red" / "0.png").rename(other / "0.png")
    (pictures / "red" / "1.png").rename(other / "new.png")
    more = ["--validation", other.parent, "--control", "negative"]
    out = tmp_path / "t.safetensors"
    one_line(train(base, pictures, out, *told, *more), "other_control' is no folder")
    moved = tmp_path / "other_control" / "red"
    moved.mkdir(parents=True)
    for name, old in (("0.png", "0.png"), ("new.png", "1.png")):
        (controls / "red" / old).rename(moved / name)
    for source in ([], ["--control-from", controls]):
        result = train(base, pictures, out, *told, *more, *source, "--resume", "never")
        assert result.exit_code == 0, result.output
        assert "with another picture's control" in result.stderr


def test_a_control_task_goes_on_and_nobody_says_again_what_it_is(
    base,
    pictures,
    told,
    tmp_path,
):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert train(base, pictures, first, *told, "--control", "blur").exit_code == 0
    result = train(base, pictures, second, *told, "--from", first)
    assert result.exit_code == 0, result.output
    task = load_task(second)
    assert task.info["control"]["kind"] == "blur"
    assert not same(task, load_task(first))
    plain = tmp_path / "plain.safetensors"
    assert train(base, pictures, plain, *told).exit_code == 0
    one_line(
        train(base, pictures, second, *told, "--from", plain, "--control", "edges"),
        "takes no control pictures, but this run is to train control 'edges'",
    )


def test_tasks_of_one_run_may_take_different_controls_or_none(
    base,
    pictures,
    words_file,
    tmp_path,
):
    file = tmp_path / "three.toml"
    out = tmp_path / "three"
    file.write_text(
        f"base = '{base}'\nfolder = '{out}'\nsteps = 2\nbatch = 2\nrank = 2\nsize = 16\n"
        f"device = 'cpu'\nsample_steps = 2\nwords = '{words_file}'\n"
        f"[[tasks]]\nname = 'plain'\ndata = '{pictures}'\n"
        f"[[tasks]]\nname = 'edges'\ndata = '{pictures}'\ncontrol = 'edges'\n"
        f"[[tasks]]\nname = 'fill'\ndata = '{pictures}'\ncontrol = 'a hole'\n"
        f"control_from = 'mask'\n"
    )
    result = run("train", file)
    assert result.exit_code == 0, result.output
    tasks = {name: load_task(out / f"{name}.safetensors") for name in ("plain", "edges", "fill")}
    kinds = {n: (t.info.get("control") or {}).get("kind") for n, t in tasks.items()}
    assert kinds == {"plain": None, "edges": "edges", "fill": "a hole"}
    with Image.open(out / "samples" / "step-000002-edges.png") as sheet:
        assert sheet.size == (64, 48)  # six pictures, each after its control, four in a row
    again = run("train", out / "config.toml", "--folder", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert same(load_task(tmp_path / "again" / "fill.safetensors"), tasks["fill"])


def test_a_stream_has_its_controls_made(base, pictures, told, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": sorted(map(str, pictures.rglob("*.png"))), "text": ["red"] * 6}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "table")
    out = tmp_path / "t.safetensors"
    more = ["--stream", "--control", "edges"]
    result = train(base, f"datasets:{tmp_path / 'table'}", out, *told, *more)
    assert result.exit_code == 0, result.output
    assert load_task(out).is_control


def test_settings_are_read_written_and_refused(tmp_path):
    text = 'base = "b"\ndata = "p"\n[control]\ncontrol = "edges"\ncontrol_drop = 0.2\n'
    path = tmp_path / "run.toml"
    path.write_text(text)
    read = read_config(path)
    assert (read.config.control, read.config.control_drop) == ("edges", 0.2)
    assert read.tasks[0].control == "edges"
    path.write_text(dump(read.config, read))
    assert read_config(path) == read_config(path)
    assert read_config(path).config == read.config
    plain = dump(TrainingConfig())
    assert "\ncontrol = " not in plain
    for wrong, said in (
        ('control_from = "edges"\n', "say also what they show"),
        ("[control]\ncontrol_drop = 1.0\n", "control_drop must be 0 to 0.9"),
        ('control_embedding = "clone"\n', "known: affiner, copy"),
        ('control = "a"\n[control]\ncontrol_rank = 2\n', "line 4: "),
    ):
        path.write_text('base = "b"\ndata = "p"\n' + wrong)
        with pytest.raises(DiffScalerError) as caught:
            read_config(path)
        assert said in str(caught.value)
        assert str(caught.value).startswith("run.toml")


@pytest.mark.parametrize("embedding", ["affiner", "copy"])
def test_the_plan_counts_the_control_affiner(sd3, words, embedding):
    data = TrainingData(
        torch.randn(1, 4, 4, 8, 8),
        torch.zeros(4).long(),
        ("red",),
        control=torch.ones(1, 4, 4, 8, 8),
    )
    prompts = prompts_for(sd3, ("red",), words=words)
    config = TrainingConfig(rank=2, control="edges", control_embedding=embedding, batch=2)
    with_it = plan_task(sd3, config, data, prompts)
    plain = TrainingData(data.latents, data.index, data.prompts)
    without = plan_task(sd3, TrainingConfig(rank=2, batch=2), plain, prompts)
    task = new_task(sd3.model, rank=2, control="edges", control_embedding=embedding)
    own = sum(t.numel() for t in task.extras.values())
    assert with_it.parts["control"] == own == with_it.trained - without.trained
    assert "control" not in without.parts
    assert with_it.activation_bytes > without.activation_bytes
    text = format_plan([with_it])
    assert re.search(r"control +edges, through pos_embed.proj, rank 16\n", text)
    assert f"control {own:,}" in text
    assert "\ncontrol " not in format_plan([without])


def test_the_card_says_what_the_control_shows_and_how_it_is_given(sd3, tmp_path):
    pytest.importorskip("huggingface_hub")
    edges = new_task(sd3.model, rank=2, name="lines", control="edges")
    text = card_text("me/lines", {"lines.safetensors": edges}, "them/base")
    assert "## Control" in text
    assert "`lines` takes a control picture that shows: edges (the trainer makes them" in text
    assert "with pipe.diffscaler_control(" in text
    assert "*DiffScaler Control*" in text
    save_task(edges, tmp_path / "t.safetensors")
    both = {"a.safetensors": edges, "b.safetensors": new_task(sd3.model, rank=2, name="b")}
    assert card_text("me/x", both, "them/base").count("takes a control picture") == 1
    plain = card_text("me/x", {"b.safetensors": both["b.safetensors"]}, "them/base")
    assert "## Control" not in plain


def test_advice_speaks_of_steps_of_layers_and_of_a_control_nobody_goes_by():
    few = before_training(TrainingConfig(control="edges", steps=400), 500)
    assert any("400 steps are few for a control task" in line for line in few)
    assert before_training(TrainingConfig(control="edges", steps=1000), 500) == ()
    layerless = TrainingConfig(control="edges", method="prompts", steps=1000)
    assert any("hardly controls" in line for line in before_training(layerless, 500))
    history = History()
    history.validated(10, 0.5)
    history.others.append((10, 0.501))
    assert after_validation(history) == ()
    (line,) = after_validation(history, last=True)
    assert "hardly goes by its control: the validation loss is 0.5 " in line
    history.others.append((20, 0.6))
    assert after_validation(history, last=True) == ()
    assert History.of(history.state()).others == history.others
    old = {k: v for k, v in history.state().items() if k != "others"}
    assert History.of(old).others == []


def test_a_terminal_is_told_both_losses_and_the_bands():
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=300)
    bands = (0.5, 0.25, float("nan"), 0.125)
    now = Progress(5, 20, 0.5, 0.25, validation=0.5, validation_other=0.75, bands=bands)
    with Display(console, 20, RunFolder("run")) as display:
        display(now)
    text = console.file.getvalue()
    assert "step 5: validation loss 0.5000 (best so far), 0.7500 with another" in text
    assert "by noise 0–25 % 0.500, 25–50 % 0.250, 75–100 % 0.125" in text
    assert by_noise(()) == ""

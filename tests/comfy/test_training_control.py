"""Control tasks trained on ComfyUI's own models: the same numbers and names as in diffusers."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from .test_training import POCKET, ROOT, Bench, changed, farthest, pictures, pocket_inputs
from .test_training_on_server import _node, _runs, base

INK = ROOT / "assets" / "examples" / "ink"


@pytest.fixture(scope="module")
def bench(part: Any, tiny: Any) -> Bench:
    return Bench(part, tiny)


def with_control(data: Any) -> Any:
    """The same pictures, each with a control that tells something of it."""
    import dataclasses

    return dataclasses.replace(data, control=data.latents.sign())


def extras_apart(one: Any, two: Any) -> float:
    assert one.extras.keys() == two.extras.keys()
    return max(float((t - two.extras[name]).abs().max()) for name, t in one.extras.items())


def test_both_hosts_train_the_same_control_task(both: Any, train: Any, words: Any) -> None:
    data, told = with_control(pictures(train)), []
    config = changed(train, control="edges", control_drop=0.3, steps=4)
    tasks = []
    for denoiser in both:
        losses: list[float] = []
        tasks.append(
            train.train_task(
                denoiser,
                data,
                config,
                words=words,
                validation=with_control(pictures(train, 4)),
                on_step=lambda now, losses=losses: losses.append(now.loss),
            )
        )
        told.append(losses)
    assert told[0] == pytest.approx(told[1], rel=1e-4)
    assert farthest(*tasks) < 1e-4
    assert extras_apart(*tasks) < 1e-4
    assert sorted(tasks[0].extras) == [
        f"control.transformer.pos_embed.proj.{name}" for name in ("down", "scale", "shift", "up")
    ]
    assert any(bool(t.any()) for n, t in tasks[0].extras.items() if n.endswith("up"))
    validated = [task.info["training"]["validation_loss_other_control"] for task in tasks]
    assert validated[0] == pytest.approx(validated[1], rel=1e-3)


@pytest.mark.parametrize("name", ["tiny_sd3", "tiny_flux", "tiny_unet", "tiny_flux_float8_e4m3fn"])
def test_a_control_starts_as_nothing_learns_and_leaves_the_model_alone(
    bench: Bench, clean: Any, name: str
) -> None:
    model = clean(bench.load(name))
    data, prompts = bench.data(model)
    data = with_control(data)
    config = changed(bench.train, control="edges", drop=0.0, control_drop=0.0, steps=6, lr=2e-2)
    denoiser = bench.denoiser(model)

    def loss(task: Any = None, **more: Any) -> float:
        return bench.train.validation_loss(denoiser, data, prompts, task, **more)

    base = loss()
    fresh = bench.part("diffscaler_core.training.loop").fresh_task(denoiser, config)
    assert loss(fresh) == base
    task = bench.train.train_task(denoiser, data, config, prompts=prompts)
    assert loss(task) < base
    assert loss(task, others=True) != loss(task)
    assert loss() == base
    assert all(bool(t.any()) for t in task.extras.values())


@pytest.mark.parametrize("name", ["tiny_sd3", "tiny_flux"])
def test_checkpointing_and_offloading_change_no_gradient_of_a_control(
    bench: Bench, clean: Any, name: str
) -> None:
    model = clean(bench.load(name))
    data, prompts = bench.data(model)

    def run(**settings: Any) -> Any:
        config = changed(bench.train, control="edges", drop=0.0, **settings)
        return bench.train.train_task(
            bench.denoiser(model), with_control(data), config, prompts=prompts
        )

    plain, checkpointed = run(), run(checkpointing=True)
    model.model.model_lowvram = True  # as a partial load leaves it
    try:
        offloaded = run()
    finally:
        model.model.model_lowvram = False
    for other in (checkpointed, offloaded):
        assert max(farthest(plain, other), extras_apart(plain, other)) < 1e-6


def test_tasks_with_and_without_control_share_a_run(bench: Bench) -> None:
    model = bench.load("tiny_sd3")
    data, prompts = bench.data(model)
    config = changed(bench.train, drop=0.0)
    run = bench.train.TaskRun
    runs = [
        run("plain", data, prompts),
        run("edges", with_control(data), prompts, control="edges"),
    ]
    together = bench.train.train_tasks(bench.denoiser(model), runs, config)
    for one in runs:
        alone = bench.train.train_tasks(bench.denoiser(model), [one], config)[one.name]
        assert farthest(together[one.name], alone) < 1e-5
        assert not one.control or extras_apart(together[one.name], alone) < 1e-5
    assert not together["plain"].is_control


def test_a_control_trained_on_the_node_is_shown_saved_and_runs_in_both_hosts(
    part: Any, pocket: Any, words: Any
) -> None:
    job, core = part("nodes.training_job"), part("diffscaler_core")
    inputs = pocket_inputs(part, pocket, words, name="edges", control_from="edges", steps=4)
    inputs["settings"] = {**inputs["settings"], "validation_share": 0.3}
    with torch.inference_mode():  # as a node runs
        task, losses, samples, summary = job.train(inputs)
    assert task.info["control"]["kind"] == "edges"
    assert len(losses["loss"]) == 4
    assert "loss by noise: " in summary
    assert "validation loss with another picture's control: " in summary
    # control, result, control, result: a control of edges is black and white, nearly
    sheet = samples[0]
    side = sheet.shape[1] // 4
    first = sheet[:side, :side]
    assert float(first.mean()) < 0.5
    (file,) = Path(part("nodes.training_folder").folder_paths.get_output_directory()).glob(
        "diffscaler/runs/edges-*/edges.safetensors"
    )
    saved = core.load_task(file)
    assert extras_apart(saved, task) == 0
    pipe = part("diffscaler_core.pocket").load_pipeline(POCKET)
    control = part("diffscaler_core.control").Control(torch.ones(1, 16, 8, 8))
    with core.attach(pipe.transformer, saved) as attachment:
        attachment.set_controls({"edges": control})


def images_of(names: list[str], side: int = 96) -> Tensor:
    import numpy as np

    found = []
    for name in names:
        with Image.open(INK / f"{name}.png") as image:
            small = image.convert("RGB").resize((side, side))
        found.append(torch.from_numpy(np.asarray(small, np.float32) / 255))
    return torch.stack(found)


@pytest.fixture
def sources(part: Any, pocket: Any, words: Any, monkeypatch: Any) -> Callable[..., Any]:
    """Gives the pictures of a run, without training on them."""
    job = part("nodes.training_job")

    def found(**changes: Any) -> Any:
        inputs = pocket_inputs(part, pocket, words, name="sources", **changes)
        config = job.config_of(inputs, pocket)
        denoiser = part("nodes.training").denoiser_of(pocket, inputs["vae"])
        source = job._source(inputs, denoiser, config, {})
        folder, _ = part("nodes.training_folder").run_folder(
            inputs, config, source.data, source.prompts
        )
        return config, source, folder.path

    return found


def test_controls_come_from_images_a_folder_or_the_pictures_themselves(
    part: Any, sources: Any
) -> None:
    names = ["cat", "dog", "fox"]
    shown, captions = images_of(names), ["cat", "dog", "fox"]
    given = {"folder": "(none)", "images": [shown], "captions": captions}
    flipped = [shown.flip(2)]
    config, source, first = sources(**given, control="mirrored", control_images=flipped)
    assert config.control == "mirrored"
    plainly = sources(**{**given, "images": flipped})
    assert not plainly[0].control
    torch.testing.assert_close(source.data.control, plainly[1].data.latents, rtol=0, atol=1e-5)
    _, made, second = sources(**given, control_from="grey")
    grey = shown @ torch.tensor([0.299, 0.587, 0.114])
    of_grey = sources(**{**given, "images": [grey[..., None].expand(-1, -1, -1, 3)]})[1].data
    assert float((made.data.control - of_grey.latents).abs().max()) < 0.2  # rounded to 8 bits
    root = Path(part("nodes.training_data").folder_paths.get_input_directory())
    for folder in ("mine", "mine sketches"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy(INK / f"{name}.png", root / folder)
            shutil.copy(INK / f"{name}.txt", root / folder)
    _, paired, third = sources(folder="mine", control="sketch", control_folder="mine sketches")
    assert torch.equal(paired.data.control, paired.data.latents)
    # each is a run of its own, and so is the same with other control pictures
    _, _, fourth = sources(**given, control="mirrored", control_images=[shown])
    assert len({first, second, third, fourth}) == 4
    assert sources(**given, control="mirrored", control_images=flipped)[2] == first


def test_control_images_go_with_latents_too(part: Any, sources: Any, words: Any) -> None:
    context, pooled = words.prompt("cat")
    latents = [{"samples": torch.randn(2, 16, 8, 12)}, {"samples": torch.randn(1, 16, 8, 8)}]
    control = images_of(["cat", "dog", "fox"])
    given = {
        "folder": "(none)",
        "latents": latents,
        "positive": [[[context, {"pooled_output": pooled}]]],
        "negative": [[[context, {"pooled_output": pooled}]]],
    }
    _, source, _ = sources(**given, control="drawing", control_images=[control])
    assert [tuple(c.shape) for c in source.data.controls] == [(1, 2, 16, 8, 12), (1, 1, 16, 8, 8)]
    error = part("diffscaler_core").DiffScalerError
    with pytest.raises(error, match="needs the pictures themselves, not their latents"):
        sources(**given, control_from="edges")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"control": "depth"}, "needs one source of them, got none"),
        (
            {"control_from": "edges", "control_folder": "example: ink drawings"},
            "got control_from 'edges' and control_folder 'example: ink drawings'",
        ),
        ({"control_folder": "example: ink drawings"}, "say in 'control' what"),
        ({"control": "x", "control_images": [torch.zeros(2, 64, 64, 3)]}, "belong to images"),
        (
            {
                "folder": "(none)",
                "images": [torch.zeros(3, 64, 64, 3)],
                "control": "x",
                "control_images": [torch.zeros(2, 64, 64, 3)],
            },
            "3 images but 2 control images",
        ),
        (
            {
                "folder": "(none)",
                "images": [torch.zeros(3, 64, 64, 3)],
                "control": "x",
                "control_folder": "example: ink drawings",
            },
            "a control_folder belongs to a folder of pictures",
        ),
        (
            {
                "folder": "(none)",
                "images": [torch.zeros(1, 64, 64, 3)],
                "control": "x",
                "control_images": [torch.zeros(1, 8, 8, 3)],
            },
            "control image 1 of 1: 8x8 is too small for 64x64",
        ),
    ],
)
def test_controls_that_cannot_be_had_are_one_line(
    part: Any, sources: Any, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(part("diffscaler_core").DiffScalerError) as caught:
        sources(**changes)
    assert said in str(caught.value)


def test_a_control_task_goes_on_as_what_it_is(part: Any, sources: Any, pocket: Any) -> None:
    core = part("diffscaler_core")
    hollow = part("nodes.keymap").diffusers_model(pocket.model)
    task = core.new_task(hollow, rank=2, control="edges")
    config, source, folder = sources(task=task, control_from="edges")
    assert config.control == "edges"
    assert source.data.control is not None
    other = task.replace(extras={name: t + 1 for name, t in task.extras.items()})
    assert sources(task=other, control_from="edges")[2] != folder
    with pytest.raises(core.DiffScalerError, match="needs one source of them, got none"):
        sources(task=task)


def test_the_settings_of_a_control_reach_the_trainer(part: Any, sources: Any) -> None:
    more = {"control_drop": 0.2, "control_rank": 5, "control_embedding": "copy"}
    config = sources(control_from="edges", settings=more)[0]
    assert (config.control_drop, config.control_rank, config.control_embedding) == (0.2, 5, "copy")
    assert config.lr_control == pytest.approx(3e-2)
    assert sources(control_from="edges", settings={"lr_control": 0.5})[0].lr_control == 0.5


def test_a_control_is_trained_and_then_used_on_a_real_server(server: Any) -> None:
    graph = base(name="canny", control_from="edges", steps=4)
    graph["settings"]["inputs"] |= {"control_drop": 0.2, "validation_share": 0.2}
    graph["pictures"] = _node("LoadImage", image="cat.png")
    shutil.copy(INK / "cat.png", server.log.parent / "input" / "cat.png")
    graph["edges"] = _node("Canny", image=["pictures", 0], low_threshold=0.1, high_threshold=0.2)
    graph["prompt"] = _node("DiffScalerTaskConditioning", task=["words", 0], prompt="cat")
    graph["control"] = _node(
        "DiffScalerControl",
        model=["model", 0],
        positive=["prompt", 0],
        negative=["prompt", 0],
        task=["train", 0],
        vae=["vae", 0],
        image=["edges", 0],
        strength=1.0,
    )
    graph["latent"] = _node("EmptySD3LatentImage", width=128, height=128, batch_size=1)
    graph["sampled"] = _node(
        "KSampler",
        model=["control", 0], positive=["control", 1], negative=["control", 2],
        latent_image=["latent", 0], seed=0, steps=2, cfg=1.0, sampler_name="euler",
        scheduler="normal", denoise=1.0,
    )  # fmt: skip
    graph["decoded"] = _node("VAEDecode", samples=["sampled", 0], vae=["vae", 0])
    graph["image"] = _node("SaveImage", images=["decoded", 0], filename_prefix="controlled")
    entry = server.run(graph)
    (summary,) = entry["outputs"]["show"]["text"]
    assert "steps: 4" in summary
    assert "with another picture's control" in summary
    (folder,) = _runs(server, "canny")
    assert (folder / "canny.safetensors").is_file()
    assert server.images({"outputs": {"x": entry["outputs"]["image"]}})
    wrong = base(name="canny", control="depth", steps=1)
    with pytest.raises(Exception, match="DiffScalerTrainTask failed") as failure:
        server.run(wrong)
    assert "needs one source of them, got none" in str(failure.value)

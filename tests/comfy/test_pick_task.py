"""Which task made a picture, asked of real ComfyUI models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

POCKET = Path(__file__).resolve().parents[2] / "assets" / "pocket"
INK = POCKET.parent / "examples" / "ink"


class Flat:
    """A VAE for tiny models: 8x8 pixels a latent, in as many channels as the model has."""

    latent_dim = 2
    output_device = torch.device("cpu")

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.first_stage_model = torch.nn.Linear(1, 1)

    def encode(self, image: Tensor) -> Tensor:
        small = torch.nn.functional.avg_pool2d(image.movedim(-1, 1) * 2 - 1, 8)
        return small.repeat(1, 6, 1, 1)[:, : self.channels]

    def spacial_compression_encode(self) -> int:
        return 8


@pytest.fixture
def pick(part: Any) -> Any:
    node = part("nodes.pick_task").DiffScalerPickTask

    def run(model: Any, vae: Any, image: Tensor, *tasks: Any, **more: Any) -> SimpleNamespace:
        node.hidden = SimpleNamespace(unique_id=None)
        given = {"probes": 4, "threshold": 2.0, "if_none": "no task", "seed": 0, **more}
        slots = {f"task{i}": task for i, task in enumerate(tasks)}
        with torch.inference_mode():  # as ComfyUI runs nodes
            result = node.execute(model, vae, image, slots, **given)
        return SimpleNamespace(
            **dict(zip(("task", "name", "report", "chart"), result.args, strict=True))
        )

    return run


def picture(seed: int = 0, count: int = 1, size: int = 64) -> Tensor:
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


def as_unet(task: Any) -> Any:
    """The task under a U-Net's name in pipelines."""
    layers = {name.replace("transformer.", "unet.", 1): own for name, own in task.layers.items()}
    return task.replace(layers=layers)


def fresh(task: Any, name: str) -> Any:
    """A task that changes nothing."""
    layers = {n: {k: torch.zeros_like(t) for k, t in own.items()} for n, own in task.layers.items()}
    return task.replace(layers=layers).with_info(name=name)


@pytest.mark.parametrize(
    ("name", "channels"),
    [("tiny_sd3", 16), ("tiny_flux", 16), ("tiny_flux_float8_e4m3fn", 16), ("tiny_unet", 4)],
)
def test_every_family_is_asked_in_mixed_batches(
    tiny: Any, pick: Any, clean: Any, name: str, channels: int
) -> None:
    with torch.inference_mode():  # as ComfyUI's loader node runs
        model = clean(tiny.load(name))
    tasks = [tiny.task(model, seed, 0.05, name=f"task {seed}") for seed in (1, 2, 3)]
    width = 768 if channels == 4 else 32
    if channels == 4:
        tasks = [as_unet(task) for task in tasks]
    told = tiny.prompt(1, width)
    vae = Flat(channels)
    found = pick(model, vae, picture(), *tasks, conditioning=told, halving=False, batch_size=16)
    again = pick(model, vae, picture(), *tasks, conditioning=told, halving=False, batch_size=3)
    assert figures(again.report) == pytest.approx(figures(found.report), abs=2e-3)
    same = pick(model, vae, picture(), *tasks, conditioning=told, halving=False, batch_size=16)
    assert same.report == found.report
    assert found.chart.ndim == 4


def figures(report: str) -> list[float]:
    """The differences of a report, by name."""
    rows = [line.rsplit(None, 5) for line in report.splitlines() if line.startswith("task ")]
    found = [float(row[1]) for row in sorted(rows) if len(row) == 6 and row[1][0] in "+-"]
    assert found
    return found


def test_the_figures_are_those_of_each_task_alone(tiny: Any, pick: Any, part: Any) -> None:
    """The base's own calls and the task's, by ComfyUI's sampler-side carrier."""
    model = tiny.load("tiny_sd3")
    tasks = [tiny.task(model, seed, 0.05, name=f"task {seed}") for seed in (1, 2)]
    told, vae = tiny.prompt(1), Flat(16)
    both = pick(model, vae, picture(), *tasks, conditioning=told, halving=False)
    for task in tasks:
        alone = pick(model, vae, picture(), task, conditioning=told, halving=False)
        own = [line for line in both.report.splitlines() if line.startswith(task.name + " ")]
        assert figures(alone.report) == pytest.approx(figures("\n".join(own)), abs=1e-4)


def test_nothing_fits_noise_and_what_comes_out_then(tiny: Any, pick: Any) -> None:
    model = tiny.load("tiny_sd3")
    tasks = [fresh(tiny.task(model), name) for name in ("a", "b")]
    told, vae = tiny.prompt(1), Flat(16)
    found = pick(model, vae, picture(), *tasks, conditioning=told)
    assert found.name == "none of them"
    assert torch.equal(tiny.run(tiny.apply(model, found.task)), tiny.run(model))
    closest = pick(model, vae, picture(), *tasks, conditioning=told, if_none="closest")
    assert closest.name in "ab"
    assert closest.task in tasks
    with pytest.raises(ValueError, match="none of them"):
        pick(model, vae, picture(), *tasks, conditioning=told, if_none="stop")


def test_a_lora_on_the_model_counts(tiny: Any, pick: Any) -> None:
    from .test_extract import with_lora

    model = tiny.load("tiny_sd3")
    task, told = tiny.task(model, 1, 0.05, name="task 1"), tiny.prompt(1)
    plain = pick(model, Flat(16), picture(), task, conditioning=told)
    changed = pick(with_lora(model, "lora"), Flat(16), picture(), task, conditioning=told)
    assert figures(plain.report) != pytest.approx(figures(changed.report), abs=1e-3)
    again = pick(model, Flat(16), picture(), task, conditioning=told)
    assert figures(plain.report) == pytest.approx(figures(again.report), abs=1e-4)


def test_the_stop_button_stops_it_and_leaves_the_model_alone(
    tiny: Any, pick: Any, clean: Any
) -> None:
    import comfy.model_management as management

    model = clean(tiny.load("tiny_sd3"))
    management.interrupt_current_processing(True)  # type: ignore[attr-defined]
    with pytest.raises(management.InterruptProcessingException):  # type: ignore[attr-defined]
        pick(model, Flat(16), picture(), tiny.task(model), conditioning=tiny.prompt(1))
    management.interrupt_current_processing(False)  # type: ignore[attr-defined]


def test_wrong_inputs_are_one_clear_line(tiny: Any, pick: Any) -> None:
    model, vae = tiny.load("tiny_sd3"), Flat(16)
    task, told = tiny.task(model, name="a"), tiny.prompt(1)
    two = [*told, *tiny.prompt(2)]
    for changed, said in [
        ({"model": tiny.apply(model, task)}, "runs tasks already"),
        ({"conditioning": two}, "holds 2 prompts"),
        ({"conditioning": None}, "none of the tasks stores the empty prompt"),
        ({"image": picture(size=9)}, "smallest picture is 16x16"),
        ({"image": torch.rand(3, 4)}, "an image is"),
    ]:
        given = {"model": model, "vae": vae, "image": picture(), "conditioning": told, **changed}
        with pytest.raises(ValueError, match=said):
            pick(given.pop("model"), given.pop("vae"), given.pop("image"), task, **given)
    with pytest.raises(ValueError, match="at least one task"):
        pick(model, vae, picture(), conditioning=told)


def test_names_that_come_twice_are_numbered(tiny: Any, pick: Any) -> None:
    model = tiny.load("tiny_sd3")
    tasks = [tiny.task(model, seed, 0.05, name="a") for seed in (1, 2)]
    found = pick(model, Flat(16), picture(), *tasks, conditioning=tiny.prompt(1), if_none="closest")
    assert "a (1)" in found.report
    assert "a (2)" in found.report
    assert found.task in tasks


def test_both_hosts_find_the_same_task_of_the_pocket_base(
    pocket: Any, pick: Any, part: Any, words: Any
) -> None:
    """A drawing of the pack's own: ink, by the same figures in ComfyUI and in diffusers."""
    import comfy.sd
    import comfy.utils
    import numpy as np
    from PIL import Image

    core = part("diffscaler_core")
    tasks = {
        name: core.load_task(POCKET / "diffscaler" / f"{name}.safetensors")
        for name in ("neon", "ink")
    }
    file = POCKET / "vae" / "diffscaler_pocket_vae.safetensors"
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)))
    image = np.asarray(Image.open(INK / "fox.png").convert("RGB"), np.float32) / 255
    context, pooled = words.prompt("")
    told = [[context.float(), {"pooled_output": pooled.float()}]]
    shown = torch.from_numpy(image)[None]
    found = pick(pocket, vae, shown, *tasks.values(), conditioning=told)
    assert found.name == "ink"
    assert found.task is tasks["ink"]
    which = part("diffscaler_core.systems.which_task")
    ranking = which.which_task(
        part("diffscaler_core.pocket").load_pipeline(POCKET),
        shown.movedim(-1, 1) * 2 - 1,
        tasks,
        settings=which.ProbeSettings(probes=4),
        words=words,
    )
    said = {line.split()[0]: float(line.split()[1]) for line in found.report.splitlines()[3:5]}
    for fit in ranking.fits:
        assert said[fit.name] == pytest.approx(fit.difference, rel=0.02)

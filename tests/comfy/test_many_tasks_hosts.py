"""Schedules, regions and rows give the same pictures in ComfyUI and in diffusers."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

POCKET = Path(__file__).resolve().parents[2] / "assets" / "pocket"
TASKS = [str(POCKET / "diffscaler" / f"{name}.safetensors") for name in ("ink", "neon")]
POINTS = ["0: 1\n0.5: 0.2\n1: 1", "step\n0: 0\nscale 0: 1\n0.4: 1"]
STEPS, SEED = 4, 7


class Hosts:
    """The pocket base in both hosts, and the same two prompts and noise."""

    def __init__(self, pack: ModuleType, nodes: Any) -> None:
        import comfy.sd
        import comfy.utils

        import diffscaler_core.pipelines as plugin
        from diffscaler_core.pocket import load_pipeline, load_words, prompt_inputs

        self.pack, self.nodes, self.plugin = pack, nodes, plugin
        self.pipe = load_pipeline(POCKET)
        self.pipe.set_progress_bar_config(disable=True)
        self.inputs = prompt_inputs(load_words(POCKET), "cat", "dog")
        for name, file in zip("ab", TASKS, strict=True):
            plugin.load_diffscaler(self.pipe, file, name)
        self.model = comfy.sd.load_diffusion_model(  # type: ignore[attr-defined]
            str(POCKET / "diffusion_models" / "diffscaler_pocket.safetensors")
        )
        file = POCKET / "vae" / "diffscaler_pocket_vae.safetensors"
        self.vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)))  # type: ignore[attr-defined]
        self.tasks = [pack.diffscaler_core.load_task(file) for file in TASKS]

    def in_diffusers(self) -> Tensor:
        call = {**self.inputs, "guidance_scale": 3.5, "num_inference_steps": STEPS}
        generator = torch.Generator().manual_seed(SEED)
        return torch.from_numpy(self.pipe(**call, output_type="np", generator=generator).images)

    def prompts(self) -> list[Any]:
        told = self.inputs
        return [
            [[told[f"{sign}prompt_embeds"], {"pooled_output": told[f"{sign}pooled_prompt_embeds"]}]]
            for sign in ("", "negative_")
        ]

    def in_comfyui(self, model: Any, prompts: Any = None) -> Tensor:
        empty = {"samples": torch.zeros(2, 16, 16, 16)}
        prompts = self.prompts() if prompts is None else prompts
        sampled = self.nodes.KSampler().sample(
            model, SEED, STEPS, 3.5, "euler", "normal", *prompts, empty
        )
        return self.nodes.VAEDecode().decode(self.vae, sampled[0])[0]

    def scheduled(self, slot: int) -> Any:
        return self.pack.nodes.schedule_task.DiffScalerScheduleTask.execute(
            self.tasks[slot], POINTS[slot], "linear"
        ).args[0]

    def apply(self, model: Any, task: Any, strength: float, region: Tensor | None = None) -> Any:
        return self.pack.nodes.apply_task.DiffScalerApplyTask.execute(
            model, task, strength, region=region
        ).args[0]


@pytest.fixture(scope="module")
def hosts(pack: ModuleType, tiny: Any) -> Hosts:
    return Hosts(pack, tiny.nodes)


def left_half() -> Tensor:
    mask = torch.zeros(1, 128, 128)
    mask[..., :64] = 1
    return mask


def same(drawn: Tensor, wanted: Tensor) -> bool:
    return bool((drawn - wanted).abs().max() <= 2 / 255)


def test_schedules(hosts: Hosts) -> None:
    hosts.plugin.set_diffscaler(hosts.pipe, ["a", "b"], [0.8, 0.6])
    constant = hosts.in_diffusers()
    hosts.plugin.set_diffscaler(hosts.pipe, ["a", "b"], [0.8, 0.6], schedules=POINTS)
    wanted = hosts.in_diffusers()
    assert not torch.allclose(wanted, constant, atol=0.1)
    model = hosts.apply(hosts.model, hosts.scheduled(0), 0.8)
    model = hosts.apply(model, hosts.scheduled(1), 0.6)
    assert same(hosts.in_comfyui(model), wanted)


def test_regions(hosts: Hosts) -> None:
    mask = left_half()
    hosts.plugin.set_diffscaler(hosts.pipe, ["a", "b"])
    everywhere = hosts.in_diffusers()
    hosts.plugin.set_diffscaler(hosts.pipe, ["a", "b"], masks=[mask[0], 1 - mask[0]])
    wanted = hosts.in_diffusers()
    assert not torch.allclose(wanted, everywhere, atol=0.1)
    model = hosts.apply(hosts.model, hosts.tasks[0], 1.0, mask)
    model = hosts.apply(model, hosts.tasks[1], 1.0, 1 - mask)
    assert same(hosts.in_comfyui(model), wanted)


def test_rows_with_schedules(hosts: Hosts) -> None:
    hosts.plugin.set_diffscaler(hosts.pipe, ["a", "b"], schedules=POINTS)
    with hosts.plugin.diffscaler_rows(hosts.pipe, ["a", {"b": 0.7}]):
        wanted = hosts.in_diffusers()
    tasks = {f"task{slot}": hosts.scheduled(slot) for slot in range(2)}
    model, *prompts = hosts.pack.nodes.route_tasks.DiffScalerRouteTasks.execute(
        hosts.model,
        hosts.prompts()[0],
        tasks,
        strengths="1, 0.7",
        mode="one task per latent",
        negative=hosts.prompts()[1],
    ).args
    assert same(hosts.in_comfyui(model, prompts), wanted)

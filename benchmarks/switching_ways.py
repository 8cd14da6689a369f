"""The ways to switch tasks that `switching.py` times: in diffusers and in ComfyUI, ours and theirs.

In both hosts the base is SD3's architecture with random weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from in_comfyui import Host, lora_file
from memory import allocated
from torch import Tensor, nn
from variants import random_task, shared_copy

from diffscaler_core import attach

TEXT, POOLED, SIDE, TOKENS = 4096, 2048, 8, 16
TASKS = ("task0", "task1")


@dataclass
class Way:
    """One way to run tasks on a frozen base, with two of them loaded.

    Attributes:
        name: What the table calls it.
        strength: Sets the strength of the first task.
        task: Runs the other task, 0 or 1, alone.
        layers: Calls every adapted layer once.
        model: Calls the model.
        held: Bytes that two adapters, attached, take beside the base's weights.
        adapter: Bytes of one adapter.
        peak: Bytes a switch takes, at most.
        seconds: Kind of switch -> times measured, of it and the call of the layers after it.
        ordinary: Times of such calls without a switch before.
        more: Kind of switch -> operators that the model's next call runs more than the one after.
    """

    name: str
    strength: Callable[[float], object]
    task: Callable[[int], object]
    layers: Callable[[], object]
    model: Callable[[], object]
    held: int
    adapter: int
    peak: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    ordinary: list[float] = field(default_factory=list)
    more: dict[str, int] = field(default_factory=dict)

    def changes(self) -> dict[str, Iterator[Callable[[], object]]]:
        """Returns, per kind of switch, an endless row of switches to something else."""
        strengths, tasks = itertools.cycle((0.3, 0.5, 0.7, 0.9)), itertools.cycle((1, 0))
        return {
            "strength": (lambda to=s: self.strength(to) for s in strengths),
            "task": (lambda to=t: self.task(to) for t in tasks),
        }


class Ready:
    """Layers that answer without computing: their adapters then are all that costs time.

    Args:
        modules: The layers themselves, without what adapts them.
        callers: What is called in their place, in the same order; None: they themselves.
        place: Device and dtype of their inputs.
    """

    def __init__(
        self, modules: Sequence[nn.Module], callers: Sequence[nn.Module] | None, **place: Any
    ) -> None:
        self._modules, self._callers = modules, callers or modules
        widths = {w for m in modules for w in (m.in_features, m.out_features)}
        self._zeros = {width: torch.zeros(1, 1, width, **place) for width in widths}

    def __call__(self) -> None:
        """Calls every layer once."""
        for module in self._modules:
            answer = self._zeros[module.out_features]
            module.__dict__["forward"] = lambda *_, y=answer, **__: y
        try:
            self.run()
        finally:
            for module in self._modules:
                del module.__dict__["forward"]

    def run(self) -> None:
        """Calls the layers; a host may do more."""
        for module, caller in zip(self._modules, self._callers, strict=True):
            caller(self._zeros[module.in_features])


def diffusers_ways(
    blocks: int, rank: int, device: str, dtype: torch.dtype
) -> tuple[list[Way], dict[str, Any], int]:
    """Returns both ways in diffusers, the tasks for ComfyUI's, and the base's parameters."""
    from diffusers import SD3Transformer2DModel
    from peft import LoraConfig

    with torch.device("meta"):
        base = SD3Transformer2DModel(
            num_layers=blocks, num_attention_heads=blocks, attention_head_dim=64,
            caption_projection_dim=64 * blocks, sample_size=SIDE, pos_embed_max_size=SIDE,
            patch_size=2, in_channels=16, out_channels=16, joint_attention_dim=TEXT,
            pooled_projection_dim=POOLED,
        )  # fmt: skip
    base = base.to_empty(device=device).to(dtype).eval().requires_grad_(False)
    fill(base.state_dict())
    inputs = {
        "hidden_states": torch.zeros(1, 16, SIDE, SIDE, device=device, dtype=dtype),
        "encoder_hidden_states": torch.zeros(1, TOKENS, TEXT, device=device, dtype=dtype),
        "pooled_projections": torch.zeros(1, POOLED, device=device, dtype=dtype),
        "timestep": torch.ones(1, device=device),
    }
    tasks = {name: random_task(base, rank=rank, seed=i) for i, name in enumerate(TASKS)}
    layers = [layer.removeprefix("transformer.") for layer in tasks["task0"].layers]
    place = {"device": device, "dtype": dtype}
    loras = {n: random_task(base, "lora", rank, i) for i, n in enumerate(TASKS)}
    adapter = loras["task0"].num_parameters * dtype.itemsize

    model, theirs = shared_copy(base), shared_copy(base)
    own = [model.get_submodule(name) for name in layers]
    kept: list[Any] = []

    def put() -> None:
        own_tasks = {name: task.replace(layers=copied(task.layers)) for name, task in tasks.items()}
        kept.append(attach(model, own_tasks).to(device))

    held = allocated(put, device).kept
    attachment = kept[0]
    ours = Way(
        "diffusers: ours, `set_weights`",
        lambda strength: attachment.set_weights({"task0": strength}),
        lambda i: attachment.set_weights({TASKS[i]: 1.0}),
        Ready(own, None, **place),
        lambda: model(**inputs),
        held,
        tasks["task0"].nbytes,
    )

    def add() -> None:
        config = LoraConfig(r=rank, target_modules=layers, init_lora_weights=False)
        for name in TASKS:
            theirs.add_adapter(config, name)
        theirs.to(**place).eval().requires_grad_(False)

    held = allocated(add, device).kept
    wrapped = [theirs.get_submodule(name) for name in layers]
    peft = Way(
        "diffusers: PEFT LoRA, `set_adapters`",
        lambda strength: theirs.set_adapters("task0", strength),
        lambda i: theirs.set_adapters(TASKS[i], 1.0),
        Ready([layer.base_layer for layer in wrapped], wrapped, **place),
        lambda: theirs(**inputs),
        held,
        adapter,
    )
    given = {"tasks": tasks, "loras": {name: lora_file(lora) for name, lora in loras.items()}}
    return [ours, peft], given, sum(p.numel() for p in base.parameters())


def comfyui_ways(
    host: Host, blocks: int, given: Mapping[str, Any], device: str, dtype: torch.dtype
) -> list[Way]:
    """Returns both ways in ComfyUI, with the tasks that `diffusers_ways` made."""
    model = comfyui_base(blocks, dtype)
    core = host.part("diffscaler_core")
    tasks: list[Any] = []
    loras: list[Any] = []
    apply = host.node("DiffScalerApplyTask").execute
    now = {"model": model}
    load(model)

    def ours(task: Any, strength: float) -> None:
        now["model"] = apply(model, task, strength).args[0]
        load(now["model"])

    def theirs(lora: Mapping[str, Tensor], strength: float) -> None:
        now["model"] = host.with_lora(model, lora, strength)
        load(now["model"])

    def read_tasks() -> None:
        for task in given["tasks"].values():
            tasks.append(core.TaskAdapter(copied(task.layers), task.info))

    def read_loras() -> None:
        for lora in given["loras"].values():
            loras.append({name: tensor.clone() for name, tensor in lora.items()})

    sample = core.TaskAdapter(given["tasks"]["task0"].layers, given["tasks"]["task0"].info)
    names = host.part("nodes.keymap").native_layers(sample, model.model)
    place = {"device": device, "dtype": model.model.get_dtype_inference()}
    called = Called([model.model.get_submodule(name) for name in names], now, **place)
    ways = []
    lora_bytes = sum(tensor.nbytes for tensor in given["loras"]["task0"].values())
    for name, read, change, own, size in (
        ("ComfyUI: ours, Apply DiffScaler Task", read_tasks, ours, tasks, sample.nbytes),
        ("ComfyUI: LoRA loader", read_loras, theirs, loras, lora_bytes),
    ):

        def both(read: Any = read, change: Any = change, own: Any = own) -> None:
            read()
            for adapter in own:
                change(adapter, 1.0)
                called()

        held = allocated(both, device).kept
        ways.append(
            Way(
                name,
                lambda strength, change=change, own=own: change(own[0], strength),
                lambda i, change=change, own=own: change(own[i], 1.0),
                called,
                called.whole,
                held,
                size,
            )
        )
        now["model"] = model
        load(model)
    return ways


class Called(Ready):
    """The adapted layers of ComfyUI's model, called where its sampler has them called."""

    def __init__(self, modules: Sequence[nn.Module], now: Mapping[str, Any], **place: Any) -> None:
        super().__init__(modules, None, **place)
        self._now, self._place = now, place

    def run(self) -> None:
        """Calls the layers from within a call of the model."""
        model = self._now["model"].model
        model.__dict__["_apply_model"] = lambda x, *_, **__: super(Called, self).run()
        try:
            self.whole()
        finally:
            del model.__dict__["_apply_model"]

    def whole(self) -> None:
        """Calls the model as a sampler does."""
        patcher = self._now["model"]
        patcher.model.current_patcher = patcher
        options = {**patcher.model_options["transformer_options"], "wrappers": patcher.wrappers}
        patcher.model.apply_model(
            torch.zeros(1, 16, SIDE, SIDE, device=self._place["device"]),
            torch.ones(1, device=self._place["device"]),
            c_crossattn=torch.zeros(1, TOKENS, TEXT, **self._place),
            y=torch.zeros(1, POOLED, **self._place),
            transformer_options={**options, "cond_or_uncond": [0]},
        )


def comfyui_base(blocks: int, dtype: torch.dtype) -> Any:
    """Returns ComfyUI's MODEL of SD3's architecture, as its loader makes it of a file."""
    import comfy.ops
    import comfy.sd
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    embedder = {"in_features": TEXT, "out_features": 64 * blocks}
    with torch.device("meta"):
        model = OpenAISignatureMMDITWrapper(
            depth=blocks, patch_size=2, in_channels=16, input_size=None, adm_in_channels=POOLED,
            context_embedder_config={"target": "torch.nn.Linear", "params": embedder},
            num_patches=SIDE**2, pos_embed_max_size=SIDE, pos_embed_scaling_factor=None,
            qkv_bias=True, operations=comfy.ops.disable_weight_init,
        )  # fmt: skip
    nothing = torch.zeros((), dtype=dtype)  # a file's worth of memory less
    file = {name: nothing.expand(t.shape) for name, t in model.state_dict().items()}
    loaded = comfy.sd.load_diffusion_model_state_dict(file, {"dtype": dtype})
    fill(loaded.model.diffusion_model.state_dict())
    return loaded


def load(model: Any) -> None:
    """Does what ComfyUI's sampler does before its first step."""
    import comfy.sampler_helpers

    noise = [1, 16, SIDE, SIDE]
    comfy.sampler_helpers.prepare_sampling(model, noise, {"positive": []}, model.model_options)


def fill(tensors: Mapping[str, Tensor]) -> None:
    """Puts small random numbers into weights, the same again and again: billions take minutes."""
    pool = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02
    with torch.no_grad():
        for tensor in tensors.values():
            flat, own = tensor.view(-1), pool.to(tensor.device, tensor.dtype)
            for part in flat.split(len(own)):
                part.copy_(own[: len(part)])


def copied(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Returns a task's tensors once more, as if a file had just been read."""
    return {layer: {n: t.clone() for n, t in own.items()} for layer, own in layers.items()}

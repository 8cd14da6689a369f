"""Control tasks for the tiny models, and short ways to run them through the node."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def image(seed: int, height: int = 64, width: int = 64, count: int = 1) -> Tensor:
    """Coarse random pictures, (N, H, W, 3) in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, height // 8, width // 8, generator=generator)
    full = torch.nn.functional.interpolate(coarse, (height, width), mode="nearest")
    return full.movedim(1, -1).contiguous()


def random_vae(channels: int) -> Any:
    """A tiny autoencoder of ComfyUI's own with random weights."""
    import comfy.sd
    import comfy.taesd.taesd

    state = comfy.taesd.taesd.TAESD(latent_channels=channels).state_dict()
    generator = torch.Generator().manual_seed(channels)
    for name, tensor in state.items():  # ComfyUI leaves them as the memory was
        by = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1
        state[name] = torch.randn(tensor.shape, generator=generator) * by
    state["vae_scale"], state["vae_shift"] = torch.tensor(1.0), torch.tensor(0.0)
    return comfy.sd.VAE(sd=state)  # type: ignore[attr-defined]


class Controls:
    """Makes control tasks for tiny models and runs the node."""

    def __init__(self, tiny: Any, pack: ModuleType) -> None:
        self.tiny, self.pack, self.core = tiny, pack, pack.diffscaler_core
        self._vaes: dict[int, Any] = {}

    def vae(self, model: Any) -> Any:
        channels = model.model.latent_format.latent_channels
        if channels not in self._vaes:
            self._vaes[channels] = random_vae(channels)
        return self._vaes[channels]

    def task(
        self,
        model: Any,
        seed: int = 1,
        std: float = 0.05,
        targets: str = "blocks",
        name: str = "edges",
        **options: Any,
    ) -> Any:
        """A random control task under diffusers' names; std 0: a fresh one."""
        hollow = self.pack.nodes.keymap.diffusers_model(model.model)
        options = {"rank": 2, "control": "edges", "control_rank": 4, **options}
        task = self.core.new_task(hollow, targets=targets, name=name, **options)
        if not std:
            return task
        generator = torch.Generator().manual_seed(seed)

        def noise(tensor: Tensor, part: str) -> Tensor:
            return torch.randn(tensor.shape, generator=generator) * (0.3 if part == "down" else std)

        layers = {
            layer: {part: noise(t, part) for part, t in own.items()}
            for layer, own in task.layers.items()
        }
        extras = {n: noise(t, n.rpartition(".")[2]) * 4 for n, t in task.extras.items()}
        return task.replace(layers=layers, extras=extras)

    def apply(
        self,
        model: Any,
        task: Any,
        picture: Tensor | None = None,
        strength: float = 1.0,
        conds: Sequence[Any] | None = None,
        **options: Any,
    ) -> tuple[Any, Any, Any]:
        """What the node gives: model, positive, negative."""
        positive, negative = self.prompts(model) if conds is None else conds
        picture = image(5) if picture is None else picture
        options = {"vae": self.vae(model), **options}
        output = self.pack.nodes.control.DiffScalerControl.execute(
            model, positive, negative, task, image=picture, strength=strength, **options
        )
        return tuple(output.args)

    def prompts(self, model: Any) -> tuple[Any, Any]:
        width = 768 if hasattr(model.model.diffusion_model, "input_blocks") else 32
        return self.tiny.prompt(1, width), self.tiny.prompt(2, width)

    def run(self, applied: Sequence[Any], **options: Any) -> Tensor:
        """Samples what the node gave."""
        return self.tiny.run(*applied, **options)

    def embedding(self, model: Any) -> Any:
        """The patch embedding of a tiny model."""
        inner = model.model.diffusion_model
        if hasattr(inner, "input_blocks"):
            return inner.input_blocks[0][0]
        return inner.img_in if hasattr(inner, "img_in") else inner.x_embedder.proj


class Calls:
    """Counts the denoiser's calls and the embeddings', while `watching` a model."""

    def __init__(self, model: Any, embedding: Any) -> None:
        self.rows: list[int] = []
        self.embedded = 0
        inner = model.model.diffusion_model
        self._handles = [
            inner.register_forward_pre_hook(lambda _, args: self.rows.append(len(args[0]))),
        ]
        self._embedding = embedding
        # not by a hook: a hook's module call would bypass what is being counted
        original = embedding.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.embedded += 1
            return original(*args, **kwargs)

        embedding.__dict__["forward"] = counted

    def __enter__(self) -> "Calls":
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._embedding.__dict__.pop("forward", None)

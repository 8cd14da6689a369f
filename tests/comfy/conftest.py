"""Tiny random models in ComfyUI's own formats, and short ways to run them."""

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONTEXT, POOLED, LATENT = 32, 16, 16
POCKET = Path(__file__).resolve().parents[2] / "assets" / "pocket"


def _sd3(ops: Any) -> nn.Module:
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    embedder = {
        "target": "torch.nn.Linear",
        "params": {"in_features": CONTEXT, "out_features": 128},
    }
    return OpenAISignatureMMDITWrapper(
        depth=2,
        patch_size=2,
        in_channels=LATENT,
        input_size=None,
        adm_in_channels=POOLED,
        context_embedder_config=embedder,
        num_patches=64,
        pos_embed_max_size=8,
        pos_embed_scaling_factor=None,
        qkv_bias=True,
        operations=ops,
    )


def _flux(ops: Any) -> nn.Module:
    from comfy.ldm.flux.model import Flux

    return Flux(
        image_model="flux",
        in_channels=LATENT,
        out_channels=LATENT,
        patch_size=2,
        vec_in_dim=POOLED,
        context_in_dim=CONTEXT,
        hidden_size=128,
        mlp_ratio=4.0,
        num_heads=1,
        depth=1,
        depth_single_blocks=1,
        axes_dim=[16, 56, 56],
        theta=10000,
        qkv_bias=True,
        guidance_embed=False,
        txt_ids_dims=[],
        operations=ops,
        dtype=torch.float32,
    )


def _unet(ops: Any) -> nn.Module:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[1],
        channel_mult=[1],
        transformer_depth=[1],
        transformer_depth_output=[1, 1],
        transformer_depth_middle=1,
        context_dim=768,
        num_heads=8,
        num_head_channels=-1,
        use_spatial_transformer=True,
        use_linear_in_transformer=False,
        legacy=False,
        adm_in_channels=None,
        use_temporal_resblock=False,
        use_temporal_attention=False,
        operations=ops,
        dtype=torch.float32,
    )


def _random(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator) * 0.05
        is_norm = tensor.ndim == 1 and ("norm" in name or "ln_" in name)
        values[name] = noise + float(is_norm and name.endswith(("weight", "scale")))
    return values


def _quantised(values: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The file format of per-layer quantised models: comfy_quant, weight_scale."""
    top, dtype = {
        "float8_e4m3fn": (448, torch.float8_e4m3fn),
        "int8_tensorwise": (127, torch.int8),
    }[kind]
    quantised = {}
    for name, tensor in values.items():
        layer = name.removesuffix(".weight")
        if tensor.ndim != 2 or "blocks" not in name or min(tensor.shape) < 128:
            quantised[name] = tensor.to(torch.bfloat16)
            continue
        scale = tensor.abs().max() / top
        scaled = tensor / scale
        quantised[name] = (scaled if top == 448 else scaled.round()).to(dtype)
        quantised[f"{layer}.weight_scale"] = scale.float().reshape(())
        note = json.dumps({"format": kind}).encode()
        quantised[f"{layer}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    return quantised


@pytest.fixture(scope="session")
def tiny_models(comfy: ModuleType, comfy_base: Path) -> Path:
    """A folder of ComfyUI's with tiny models of three architectures, and quantised ones."""
    import comfy.ops

    folder = comfy_base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    ops = comfy.ops.disable_weight_init  # type: ignore[attr-defined]
    for name, make in (("sd3", _sd3), ("flux", _flux), ("unet", _unet)):
        save_file(_random(make(ops)), folder / f"tiny_{name}.safetensors")
    for kind in ("float8_e4m3fn", "int8_tensorwise"):
        values = load_file(folder / "tiny_flux.safetensors")
        save_file(_quantised(values, kind), folder / f"tiny_flux_{kind}.safetensors")
    return folder


class Tiny:
    """Loads and runs tiny models through ComfyUI's own nodes."""

    def __init__(self, nodes: ModuleType, pack: ModuleType) -> None:
        self.nodes = nodes
        self.core = pack.diffscaler_core
        self.patching = pack.nodes.patching

    def load(self, name: str, dtype: str = "default") -> Any:
        return self.nodes.UNETLoader().load_unet(f"{name}.safetensors", dtype)[0]

    def prompt(self, seed: int, width: int = CONTEXT) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        pooled = torch.randn(1, POOLED, generator=generator)
        context = torch.randn(1, 8, width, generator=generator)
        return [[context, {"pooled_output": pooled}]]

    def run(
        self,
        model: Any,
        positive: Any = None,
        negative: Any = None,
        *,
        steps: int = 2,
        rows: int = 2,
        sampler: str = "euler",
    ) -> Tensor:
        is_unet = hasattr(model.model.diffusion_model, "input_blocks")
        width, channels = (768, 4) if is_unet else (CONTEXT, LATENT)
        positive = self.prompt(1, width) if positive is None else positive
        negative = self.prompt(2, width) if negative is None else negative
        latent = {"samples": torch.zeros(rows, channels, 8, 8)}
        sampled = self.nodes.KSampler().sample(
            model, 0, steps, 4.0, sampler, "normal", positive, negative, latent, 1.0
        )
        return sampled[0]["samples"].clone()

    def call(self, model: Any) -> Tensor:
        """One call of the denoiser, as the sampler makes it."""
        import comfy.model_management

        comfy.model_management.load_models_gpu([model])  # type: ignore[attr-defined]
        return self.call_loaded(model)

    def call_loaded(self, model: Any) -> Tensor:
        """The same on a model that the caller has loaded."""
        model.model.current_patcher = model
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, LATENT, 8, 8, generator=generator)
        context, more = self.prompt(1)[0]
        options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
        return model.model.apply_model(
            x,
            torch.tensor([0.5, 0.5]),
            c_crossattn=context.expand(2, -1, -1),
            y=more["pooled_output"].expand(2, -1),
            transformer_options={**options, "cond_or_uncond": [0]},
        ).clone()

    def apply(self, model: Any, *arguments: Any, **options: Any) -> Any:
        return self.patching.apply_task(model, *arguments, **options)

    def layers(self, model: Any) -> list[str]:
        """Names of the layers a task may adapt, found by what a layer has."""
        found = []
        for name, module in model.model.diffusion_model.named_modules():
            linear = hasattr(module, "in_features") and hasattr(module, "weight")
            if linear or isinstance(module, nn.Conv2d):
                found.append(name)
        return found

    def task(
        self,
        model: Any,
        seed: int = 1,
        std: float = 0.02,
        rank: int = 2,
        layers: Sequence[str] | None = None,
        name: str = "task",
    ) -> Any:
        """A random task under ComfyUI's own layer names; std 0: one that changes nothing."""
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int, by: float = std) -> Tensor:
            return torch.randn(*shape, generator=generator) * by

        tensors = {}
        for layer in self.layers(model) if layers is None else layers:
            module = model.model.diffusion_model.get_submodule(layer)
            if isinstance(module, nn.Conv2d):
                out, window = module.out_channels, (module.in_channels, *module.kernel_size)
            else:
                out, window = module.out_features, (module.in_features,)
            tensors[f"transformer.{layer}"] = {
                "scale": noise(out),
                "shift": noise(out),
                "down": noise(rank, *window, by=0.3),
                "up": noise(out, rank),
            }
        info = {"name": name, "method": "diffscaler", "naming": "native", "activation": "relu"}
        return self.core.TaskAdapter(tensors, info)


@pytest.fixture(scope="session")
def tiny(comfy: ModuleType, pack: ModuleType, tiny_models: Path) -> Tiny:
    """Tiny models and short ways to run them."""
    torch.set_num_threads(1)  # their layers are too small to share
    return Tiny(comfy, pack)


@pytest.fixture
def clean(tiny: Tiny) -> Iterator[Any]:
    """Checks at the end that the models given to it before are exactly as they were."""
    watched: list[SimpleNamespace] = []

    def watch(model: Any) -> Any:
        state = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
        forwards = {n: m.__dict__.get("forward") for n, m in model.model.named_modules()}
        watched.append(SimpleNamespace(model=model, state=state, forwards=forwards))
        return model

    yield watch
    for was in watched:
        now = was.model.model.state_dict()
        assert list(now) == list(was.state)
        assert all(torch.equal(now[name], tensor) for name, tensor in was.state.items())
        for name, module in was.model.model.named_modules():
            assert module.__dict__.get("forward") == was.forwards[name], name
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        assert not [name for name in was.model.model.__dict__ if "diffscaler" in name]


@pytest.fixture(scope="module")
def part(pack: ModuleType) -> Callable[[str], ModuleType]:
    return lambda name: importlib.import_module(f"{pack.__name__}.{name}")


@pytest.fixture(scope="module")
def train(part: Any) -> ModuleType:
    return part("diffscaler_core.training")


@pytest.fixture(scope="module")
def pocket(comfy: ModuleType) -> Any:
    """The pocket base as a node loads it: in inference mode."""
    import comfy.sd

    torch.set_num_threads(1)
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(
            str(POCKET / "diffusion_models" / "diffscaler_pocket.safetensors")
        )


@pytest.fixture(scope="module")
def both(part: Any, pocket: Any) -> tuple[Any, Any]:
    """The pocket base as a denoiser, ComfyUI's and diffusers'."""
    from_diffusers = part("diffscaler_core.pocket").load_pipeline(POCKET)
    return part("nodes.training").denoiser_of(pocket), part("diffscaler_core.training").as_denoiser(
        from_diffusers
    )


@pytest.fixture(scope="module")
def words(part: Any) -> Any:
    return part("diffscaler_core").load_task(POCKET / "diffscaler" / "words.safetensors")

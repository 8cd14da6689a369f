"""LoRA files in and out, against diffusers' and PEFT's own saving and loading."""

import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("peft")
import diffusers as d
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from diffscaler_core import (
    DiffScalerError,
    MismatchError,
    TaskAdapter,
    TaskFileError,
    attach,
    export_lora,
    find_targets,
    import_lora,
    load_task,
    new_task,
    save_task,
)
from diffscaler_core.lora.read import imported_text
from diffscaler_core.lora.write import lora_tensors

UNET = dict(
    sample_size=8,
    layers_per_block=2,
    cross_attention_dim=12,
    attention_head_dim=2,
    norm_num_groups=2,
)
SD15 = UNET | dict(
    block_out_channels=(8, 8, 16, 16),
    down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
)
SDXL = UNET | dict(
    block_out_channels=(8, 16, 16),
    down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
    up_block_types=(*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=34,
)
SD3 = dict(
    sample_size=8,
    patch_size=2,
    in_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=10,
    out_channels=4,
    dual_attention_layers=(0,),
)
FLUX = dict(
    patch_size=1,
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=12,
    pooled_projection_dim=10,
    axes_dims_rope=[4, 4, 8],
    guidance_embeds=True,
)


@dataclass
class Base:
    """One architecture: its denoiser, its pipeline's LoRA loader, how to call it on n rows."""

    pipeline: Any
    model: Any
    config: dict[str, Any]
    component: str
    scheduler: Any = d.FlowMatchEulerDiscreteScheduler

    def build(self) -> nn.Module:
        torch.manual_seed(5)
        model: nn.Module = self.model(**self.config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim > 1 and not bool(parameter.any()):
                nn.init.normal_(parameter, std=0.02)
        return model

    def pipe(self, model: nn.Module) -> Any:
        """A stock pipeline round a denoiser, for its LoRA loader."""
        parts = dict.fromkeys(inspect.signature(self.pipeline).parameters)
        parts |= {self.component: model, "scheduler": self.scheduler()}
        parts |= {"requires_safety_checker": False} if "safety_checker" in parts else {}
        parts |= {"force_zeros_for_empty_prompt": True, "add_watermarker": False}
        return self.pipeline(**{k: parts[k] for k in inspect.signature(self.pipeline).parameters})

    def run(self, model: nn.Module, rows: int = 2) -> Tensor:
        g = torch.Generator().manual_seed(1)

        def noise(*shape: int) -> Tensor:
            return torch.randn(rows, *shape, generator=g)

        t = torch.linspace(300.0, 700.0, rows)
        if self.component == "unet":
            more = {"text_embeds": noise(10), "time_ids": noise(6)}
            added = {"added_cond_kwargs": more} if "addition_embed_type" in self.config else {}
            call: Any = dict(sample=noise(4, 8, 8), timestep=t, **added)
        elif self.model is d.SD3Transformer2DModel:
            call = dict(hidden_states=noise(4, 8, 8), timestep=t, pooled_projections=noise(10))
        else:
            call = dict(hidden_states=noise(16, 16), timestep=t / 1000, guidance=t / 300)
            call |= dict(pooled_projections=noise(10))
            call |= dict(img_ids=torch.arange(48.0).view(16, 3), txt_ids=torch.zeros(5, 3))
        with torch.no_grad():
            return model(encoder_hidden_states=noise(5, 12), **call).sample


BASES = {
    "sd15": Base(d.StableDiffusionPipeline, d.UNet2DConditionModel, SD15, "unet", d.DDIMScheduler),
    "sdxl": Base(
        d.StableDiffusionXLPipeline, d.UNet2DConditionModel, SDXL, "unet", d.DDIMScheduler
    ),
    "sd3": Base(d.StableDiffusion3Pipeline, d.SD3Transformer2DModel, SD3, "transformer"),
    "flux": Base(d.FluxPipeline, d.FluxTransformer2DModel, FLUX, "transformer"),
}


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> Base:
    return BASES[request.param]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def saved(
    base: Base,
    folder: Path,
    seed: int = 0,
    targets: Any = "all",
    header: bool = True,
    **config: Any,
) -> Path:
    """A LoRA on every layer, made by PEFT and saved by the pipeline's `save_lora_weights`."""
    model = base.build()
    names = [target.name for target in find_targets(model, targets)]
    options = {"r": 4, "lora_alpha": 6, **config}
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(target_modules=names, init_lora_weights=False, **options))
    state = get_peft_model_state_dict(model)
    generator = torch.Generator().manual_seed(seed + 1)
    state = {k: torch.randn(t.shape, generator=generator) * 0.1 for k, t in state.items()}
    metadata = _collate_lora_metadata({base.component: model}) if header else {}
    base.pipeline.save_lora_weights(folder, **{f"{base.component}_lora_layers": state}, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


def stock(base: Base, file: Any, rows: int = 2) -> Tensor:
    """What a pipeline's own loader makes of a file."""
    model = base.build()
    base.pipe(model).load_lora_weights(file)
    return base.run(model, rows)


def ours(base: Base, task: TaskAdapter, rows: int = 2) -> Tensor:
    model = base.build()
    with attach(model, task):
        return base.run(model, rows)


def noisy(task: TaskAdapter, seed: int = 3) -> TaskAdapter:
    g = torch.Generator().manual_seed(seed)
    layers = {
        layer: {n: torch.randn(t.shape, generator=g) * 0.1 for n, t in own.items()}
        for layer, own in task.layers.items()
    }
    return task.replace(layers=layers)


# ---- in ------------------------------------------------------------------------------------------


def test_diffusers_files_do_what_its_loader_does(base: Base, tmp_path: Path) -> None:
    names = [target.name for target in find_targets(base.build(), "all")]
    file = saved(
        base, tmp_path, rank_pattern={names[0]: 2}, alpha_pattern={names[1]: 3, names[-1]: 5}
    )
    task = import_lora(file)
    assert len(task.layers) == len(names)
    assert task.components == (base.component,)
    assert task.info["gain"] == 1.5  # alpha 6 of rank 4, but for three layers
    wanted = stock(base, tmp_path)
    assert (wanted - base.run(base.build())).abs().max() > 1e-2
    close(ours(base, task), wanted)


def test_the_task_is_saved_and_loaded_like_any(base: Base, tmp_path: Path) -> None:
    task = import_lora(saved(base, tmp_path), name="imported")
    again = load_task(save_task(task, tmp_path / "t.safetensors"))
    assert again.name == "imported"
    assert torch.equal(ours(base, again), ours(base, task))


def test_two_loras_in_one_batch(base: Base, tmp_path: Path) -> None:
    files = [saved(base, tmp_path / str(seed), seed) for seed in (0, 10)]
    alone = [stock(base, file.parent, 3) for file in files]
    model = base.build()
    tasks = {"a": import_lora(files[0]), "b": import_lora(files[1])}
    with attach(model, tasks) as attachment:
        attachment.set_rows(["a", "b", None])
        rows = base.run(model, 3)
    close(rows[0], alone[0][0])
    close(rows[1], alone[1][1])
    close(rows[2], base.run(base.build(), 3)[2])
    assert (rows[1] - alone[0][1]).abs().max() > 1e-3


def test_a_bias_of_pefts_is_a_shift(base: Base, tmp_path: Path) -> None:
    targets = r".*(to_q|to_k|to_out\.0|proj_out|conv1)"
    file = saved(base, tmp_path, targets=targets, lora_bias=True)
    task = import_lora(file)
    assert all("shift" in own for own in task.layers.values())
    close(ours(base, task), stock(base, tmp_path))


def test_rank_stabilised_scaling(tmp_path: Path) -> None:
    base = BASES["sd3"]
    task = import_lora(saved(base, tmp_path, use_rslora=True))
    assert task.info["gain"] == 3.0
    close(ours(base, task), stock(base, tmp_path))


def test_pefts_own_folder(tmp_path: Path) -> None:
    base = BASES["sd3"]
    model = get_peft_model(
        base.build(),
        LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False),
    )
    wanted = base.run(model)
    model.save_pretrained(tmp_path)
    task = import_lora(tmp_path / "adapter_model.safetensors")
    assert task.info["gain"] == 0.5
    close(ours(base, task), wanted)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "other.safetensors")
    assert import_lora(tmp_path / "other.safetensors").info["gain"] == 1.0  # nobody says


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_kohyas_unet_names_do_what_diffusers_makes_of_them(name: str, tmp_path: Path) -> None:
    """Both spellings of U-Nets: diffusers' names (SD 1.5), and the first code's (SDXL)."""
    from diffscaler_core.lora.names import flat, own_places

    base = BASES[name]
    table = own_places("unet2d_condition")
    g = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for target in find_targets(base.build(), "blocks"):
        if name == "sdxl" and "upsamplers" in target.name:
            continue  # diffusers' conversion of these names looks for a block of its own
        native = target.name if name == "sd15" else table[target.name].native
        ones = (1,) * len(target.kernel)
        key = f"lora_unet_{flat(native)}"
        down = torch.randn(4, target.in_features, *target.kernel, generator=g) * 0.1
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.lora_up.weight"] = torch.randn(target.out_features, 4, *ones, generator=g)
        tensors[f"{key}.lora_up.weight"] *= 0.1
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    file = tmp_path / "kohya.safetensors"
    save_file(tensors, file)
    close(ours(base, import_lora(file)), stock(base, dict(tensors)))


def test_kohyas_flux_names_mean_what_diffusers_conversion_says(tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    shapes: dict[str, tuple[int, int]] = {}
    for i in (0, 18):
        for stream in ("img", "txt"):
            shapes |= {
                f"double_blocks_{i}_{stream}_attn_qkv": (9216, 3072),
                f"double_blocks_{i}_{stream}_attn_proj": (3072, 3072),
                f"double_blocks_{i}_{stream}_mlp_0": (12288, 3072),
                f"double_blocks_{i}_{stream}_mlp_2": (3072, 12288),
                f"double_blocks_{i}_{stream}_mod_lin": (18432, 3072),
            }
    for i in (0, 37):
        shapes |= {
            f"single_blocks_{i}_linear1": (21504, 3072),
            f"single_blocks_{i}_linear2": (3072, 15360),
        }
    tensors: dict[str, Tensor] = {}
    for name, (out, width) in shapes.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(1, width)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(out, 1)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "flux.safetensors")
    task = import_lora(tmp_path / "flux.safetensors")
    assert task.info["base"]["family"] == "flux"
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    assert {f"{name}.lora_A.weight" for name in task.layers} == {k for k in theirs if "lora_A" in k}
    for name, own in task.layers.items():
        product = theirs[f"{name}.lora_B.weight"] @ theirs[f"{name}.lora_A.weight"]
        close(task.info["gain"] * own["up"] @ own["down"], product)


def test_text_encoders_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = BASES["sd3"]
    file = saved(base, tmp_path)
    tensors = load_file(file)
    plain = import_lora(file)
    key = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight"
    both = tensors | {key.format(x): torch.ones(4, 4) for x in "AB"}
    save_file(both, tmp_path / "both.safetensors")
    with caplog.at_level(logging.WARNING):
        task = import_lora(tmp_path / "both.safetensors")
    assert "2 text-encoder tensors left out" in caplog.text
    assert task.info["imported"]["left_out"] == {"text encoder": 2}
    assert "left out: 2 text encoder tensors" in imported_text(task)
    assert task.layers.keys() == plain.layers.keys()
    with pytest.raises(TaskFileError, match=r"text encoder \(2 tensors\)"):
        import_lora(tmp_path / "both.safetensors", strict=True)
    save_file(
        {k: t for k, t in both.items() if k.startswith("text_enc")}, tmp_path / "text.safetensors"
    )
    with pytest.raises(TaskFileError, match="text encoder"):
        import_lora(tmp_path / "text.safetensors")


def test_a_base_is_checked_and_its_facts_kept(tmp_path: Path) -> None:
    file = saved(BASES["sd3"], tmp_path)
    model = BASES["sd3"].build()
    task = import_lora(file, base=model)
    fresh = new_task(model, "lora", 4, "all")
    assert task.info["base"] == fresh.info["base"]
    assert import_lora(file).info["base"]["fingerprint"] == fresh.info["base"]["fingerprint"]
    with pytest.raises(MismatchError, match="does not fit"):
        import_lora(file, base=BASES["flux"].build())


def test_a_name_of_an_unknown_family_is_kept(tmp_path: Path) -> None:
    tensors = {
        f"transformer.strange_blocks.0.mixer.{n}.weight": torch.ones(4, 4)
        for n in ("lora_A", "lora_B")
    }
    save_file(tensors, tmp_path / "strange.safetensors")
    task = import_lora(tmp_path / "strange.safetensors")
    assert list(task.layers) == ["transformer.strange_blocks.0.mixer"]
    assert task.info["base"]["family"] == "unknown"


# ---- refused -------------------------------------------------------------------------------------

_LAYER = "lora_unet_joint_blocks_0_x_block_attn_proj"
_PLAIN = {
    f"{_LAYER}.lora_down.weight": torch.ones(2, 16),
    f"{_LAYER}.lora_up.weight": torch.ones(16, 2),
}
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "loha": ({f"{_LAYER}.hada_w1_a": torch.ones(16, 2)}, "LoHa"),
    "lokr": ({f"{_LAYER}.lokr_w1": torch.ones(4, 4)}, "LoKr"),
    "oft": ({f"{_LAYER}.oft_blocks": torch.ones(2, 8, 8)}, "OFT"),
    "dora": (_PLAIN | {f"{_LAYER}.dora_scale": torch.ones(16, 1)}, "DoRA"),
    "peft_dora": (_PLAIN | {"transformer.a.lora_magnitude_vector": torch.ones(16)}, "DoRA"),
    "glora": ({f"{_LAYER}.a1.weight": torch.ones(16, 2)}, "GLoRA"),
    "tucker": (_PLAIN | {f"{_LAYER}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "lora_mid"),
    "diff": (_PLAIN | {f"{_LAYER[:-4]}qkv.diff": torch.ones(48, 16)}, r"whole weights \(.diff\)"),
    "set": (_PLAIN | {f"{_LAYER}.set_weight": torch.ones(16, 16)}, "replaced or reshaped"),
    "reshape": (_PLAIN | {f"{_LAYER}.reshape_weight": torch.ones(2)}, "replaced or reshaped"),
    "norm": (_PLAIN | {f"{_LAYER}.w_norm": torch.ones(16)}, "norm"),
    "whole": (_PLAIN | {"transformer.proj_out.weight": torch.ones(4, 4)}, "whole weight"),
    "unknown": (_PLAIN | {"something.else": torch.ones(2)}, "no known kind"),
    "name": (
        _PLAIN | {k.replace("0_x", "0_q"): t for k, t in _PLAIN.items()},
        "names 1 of 2 layers",
    ),
    "nan": ({k: t * float("nan") for k, t in _PLAIN.items()}, "NaN"),
    "alone": ({f"{_LAYER}.lora_up.weight": torch.ones(16, 2)}, "has up alone"),
    "shapes": (_PLAIN | {f"{_LAYER}.lora_up.weight": torch.ones(16, 3)}, "no down and up"),
    "alpha": (_PLAIN | {f"{_LAYER}.alpha": torch.ones(2)}, "no single number"),
    "double": ({k: t.double() for k, t in _PLAIN.items()}, "F64"),
    "integer": ({k: t.int() for k, t in _PLAIN.items()}, "I32"),
    "twice": (_PLAIN | {k.replace("lora_down", "lora_A"): t for k, t in _PLAIN.items()}, "second"),
    "mixed": (
        _PLAIN
        | {
            k.replace(_LAYER, "transformer.transformer_blocks.0.attn.to_out.0"): t
            for k, t in _PLAIN.items()
        },
        "twice, under two names",
    ),
    "zero": ({f"{_LAYER}.diff_b": torch.zeros(16)}, "all it holds is zero"),
    "rows": (
        {
            "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": torch.ones(2, 16),
            "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": torch.ones(50, 2),
        },
        "50 rows",
    ),
    "ambiguous": (
        {"lora_unet_joint_blocks_0_context_block_adaLN_modulation_1.diff_b": torch.ones(32)},
        "import it with base",
    ),
    "empty": ({}, "no LoRA layer"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_plain_lora_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    tensors, reason = REFUSED[kind]
    save_file({key: t.clone() for key, t in tensors.items()}, tmp_path / "odd.safetensors")
    with pytest.raises(TaskFileError, match=reason):
        import_lora(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"lora_alpha": "many"}, "lora_alpha"),
        ({"alpha_pattern": {"(a+)+b": 3}}, "regular expression"),
    ],
)
def test_a_configuration_is_not_believed_blindly(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    tensors = {f"base_model.model.proj_out.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    with pytest.raises(TaskFileError, match=reason):
        import_lora(tmp_path / "adapter_model.safetensors")


def test_a_task_is_no_lora_and_a_lora_no_task(tmp_path: Path) -> None:
    task = noisy(new_task(BASES["sd3"].build(), "lora", 2))
    with pytest.raises(TaskFileError, match="task already"):
        import_lora(save_task(task, tmp_path / "task.safetensors"))
    with pytest.raises(TaskFileError, match=r"import_lora.*diffscaler convert"):
        load_task(export_lora(task, tmp_path / "lora.safetensors"))


# ---- out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("naming", ["diffusers", "kohya", "comfyui"])
def test_out_and_back_is_bit_exact(base: Base, naming: str, tmp_path: Path) -> None:
    task = noisy(new_task(base.build(), "lora", 3, "all", "mine"))
    back = import_lora(export_lora(task, tmp_path / "l.safetensors", naming))
    assert back.name == "mine"
    assert back.layers.keys() == task.layers.keys()
    for layer, own in task.layers.items():
        assert all(torch.equal(back.layers[layer][n], t) for n, t in own.items()), layer
    assert torch.equal(ours(base, back), ours(base, task))


def test_gains_go_out_and_back(base: Base, tmp_path: Path) -> None:
    task = noisy(new_task(base.build(), "lora", 3, "all", gain=0.37))
    for naming in ("kohya", "comfyui"):  # alpha holds it, as float64
        back = import_lora(export_lora(task, tmp_path / f"{naming}.safetensors", naming))
        assert back.info["gain"] == pytest.approx(0.37, rel=1e-15)
        close(ours(base, back), ours(base, task))
    back = import_lora(export_lora(task, tmp_path / "d.safetensors"))  # U does
    close(ours(base, back), ours(base, task))


def test_diffusers_reads_what_goes_out(base: Base, tmp_path: Path) -> None:
    task = noisy(new_task(base.build(), "lora", 3, "all", gain=0.5))
    close(stock(base, lora_tensors(task)), ours(base, task))
    file = export_lora(task, tmp_path / "lora.safetensors")
    close(stock(base, str(file)), ours(base, task))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_diffusers_reads_kohyas_unet_names(name: str) -> None:
    base = BASES[name]
    task = noisy(new_task(base.build(), "lora", 3, "blocks", gain=0.5))
    close(stock(base, lora_tensors(task, "kohya")), ours(base, task))


def test_shifts_go_out_to_diffusers(base: Base) -> None:
    model = base.build()
    task = noisy(new_task(model, "bitfit", targets=r".*(to_q|to_out\.0|conv1|norm1\.linear)"))
    with pytest.raises(DiffScalerError, match="give base="):
        lora_tensors(task)
    close(stock(base, lora_tensors(task, base=model)), ours(base, task))


def test_shifts_go_out_and_back(base: Base, tmp_path: Path) -> None:
    model = base.build()
    both = noisy(new_task(model, "lora", 3, r".*(to_out\.0|conv1|norm1\.linear|linear_1)"))
    shift = noisy(new_task(model, "bitfit", targets=r".*(to_out\.0|conv1|norm1\.linear|linear_1)"))
    layers = {name: {**own, **shift.layers[name]} for name, own in both.layers.items()}
    task = both.replace(layers=layers)
    for naming in ("diffusers", "kohya", "comfyui"):
        back = import_lora(export_lora(task, tmp_path / f"{naming}.safetensors", naming))
        for layer, own in task.layers.items():
            assert all(torch.equal(back.layers[layer][n], t) for n, t in own.items()), layer
        close(ours(base, back), ours(base, task))


def test_a_scale_goes_out_as_the_difference_of_the_weight(base: Base) -> None:
    model = base.build()
    task = noisy(new_task(model, "diffscaler", 3, r".*to_out\.0"))
    task = task.with_info(activation="identity")
    with pytest.raises(DiffScalerError, match=r"a ⊙ W.*give base="):
        lora_tensors(task, "comfyui")
    with pytest.raises(DiffScalerError, match="loaders do not read"):
        lora_tensors(task, base=model)
    tensors = lora_tensors(task, "kohya", base=model)
    layer = next(iter(task.layers))
    own, module = task.layers[layer], model.get_submodule(layer.partition(".")[2])
    diffs = [t for k, t in tensors.items() if k.endswith(".diff")]
    assert len(diffs) == len(task.layers)
    assert not [k for k in tensors if "lora_" in k.partition(".")[2]]
    wanted = own["scale"][:, None] * module.weight + own["up"] @ own["down"]
    assert any(t.shape == wanted.shape and torch.allclose(t, wanted) for t in diffs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.with_info(activation="relu"), "relu subspace"),
        (lambda t: t.replace(layers={}), "adapts no layer"),
        (lambda t: t.replace(schedule=object()), "schedule"),
        (lambda t: t.replace(extras={"control.transformer.x.up": torch.ones(1)}), "control"),
        (lambda t: t.replace(extras={"classes.transformer.x.rows": torch.ones(1, 2)}), "classes"),
    ],
)
def test_what_no_lora_can_hold_is_refused(change: Callable[..., TaskAdapter], reason: str) -> None:
    task = noisy(new_task(BASES["sd3"].build(), "lora", 2))
    with pytest.raises(DiffScalerError, match=reason):
        lora_tensors(change(task))


def test_shifts_without_a_bias_need_diffusers_naming() -> None:
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    task = TaskAdapter({layer: {"shift": torch.ones(16)}}, {"name": "t", "method": "bitfit"})
    with pytest.raises(DiffScalerError, match="have no bias"):
        lora_tensors(task, "kohya")


def test_namings_need_their_tables(tmp_path: Path) -> None:
    task = noisy(new_task(BASES["sd3"].build(), "lora", 2))
    layers = {name.replace("_blocks", "_things"): own for name, own in task.layers.items()}
    with pytest.raises(DiffScalerError, match="use the naming 'diffusers'"):
        lora_tensors(task.replace(layers=layers), "kohya")
    with pytest.raises(DiffScalerError, match="unknown naming 'webui'"):
        lora_tensors(task, "webui")
    with pytest.raises(TaskFileError, match="must end in"):
        export_lora(task, tmp_path / "lora.pt")


def test_labels_of_the_base_s_own_classes_are_no_reason_to_refuse() -> None:
    """A trained task numbers the labels it saw; only new classes have rows, and need a place."""
    task = noisy(new_task(BASES["sd3"].build(), "lora", 2))
    told = lora_tensors(task.with_info(classes={"cat": 3}))
    assert {n: t.tolist() for n, t in told.items()} == {
        n: t.tolist() for n, t in lora_tensors(task).items()
    }

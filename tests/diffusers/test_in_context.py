"""In-context control, the alternative that benchmarks measure: exact start, keys kept, way back."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers as d
import pytest
import torch
from torch import Tensor, nn

from diffscaler_core import DiffScalerError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


in_context = _load("in_context")
InContext = in_context.InContext


def sd3() -> nn.Module:
    return d.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
    )


def sd35() -> nn.Module:
    plain = sd3().config
    return d.SD3Transformer2DModel.from_config(
        {**plain, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    )


def flux() -> nn.Module:
    return d.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


def call(model: nn.Module, rows: int = 2, seed: int = 0, time: float = 0.5) -> dict[str, Any]:
    """Arguments of a call for latents of 8×6."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, 4, 8, 6, generator=generator)
    told = {
        "hidden_states": noise,
        "encoder_hidden_states": torch.randn(rows, 5, 12, generator=generator),
        "pooled_projections": torch.randn(rows, 12, generator=generator),
        "timestep": torch.full((rows,), time),
    }
    if isinstance(model, d.FluxTransformer2DModel):
        ids = torch.zeros(4, 3, 3)
        ids[..., 1], ids[..., 2] = torch.arange(4)[:, None], torch.arange(3)
        told["hidden_states"] = in_context.pack(noise)
        told["img_ids"], told["txt_ids"] = ids.view(-1, 3), torch.zeros(5, 3)
        told["guidance"] = torch.full((rows,), 3.5)
    return told


def picture(rows: int = 2, seed: int = 3) -> Tensor:
    return torch.randn(rows, 4, 8, 6, generator=torch.Generator().manual_seed(seed))


def fill(worn: Any, gates: bool = True) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in worn.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    for gate in () if gates else worn.gates:
        gate.data.zero_()


@pytest.fixture(params=[sd3, sd35, flux], ids=["sd3", "sd3.5", "flux"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return request.param().eval().requires_grad_(False)


@pytest.mark.parametrize("combine", ["added", "joint"])
@pytest.mark.parametrize("block_rank", [0, 3])
def test_the_start_is_the_base_bit_for_bit(model, combine, block_rank) -> None:
    base = model(**call(model)).sample
    worn = InContext(model, 3, block_rank=block_rank, combine=combine)
    worn.set_control(picture())
    trained = model(**call(model)).sample
    assert trained.requires_grad
    assert torch.equal(trained, base)
    with torch.no_grad():
        assert torch.equal(model(**call(model)).sample, base)


def test_closed_gates_are_exact_whatever_the_affiners_hold(model) -> None:
    base = model(**call(model)).sample
    worn = InContext(model, 3)
    fill(worn, gates=False)
    worn.set_control(picture())
    assert torch.equal(model(**call(model)).sample, base)


@torch.no_grad()
def test_kept_keys_and_values_are_those_of_a_fresh_run_at_another_time(model) -> None:
    worn = InContext(model, 3, block_rank=2)
    fill(worn)
    for parameter in worn.parameters():
        parameter.requires_grad_(False)  # while training, layers share products: other last bits
    shown = picture()
    worn.set_control(shown)
    model(**call(model, time=0.9))
    kept = worn._seen
    later = model(**call(model, seed=7, time=0.1)).sample
    assert worn._seen is kept
    assert worn.cached_bytes == len(worn.blocks) * 2 * shown.shape[0] * 12 * 16 * 4
    worn.set_control(shown.clone())
    assert torch.equal(model(**call(model, seed=7, time=0.1)).sample, later)
    assert worn._seen is not kept
    for one, other in zip(kept, worn._seen, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@torch.no_grad()
def test_changed_parameters_are_seen_although_keys_were_kept(model) -> None:
    worn = InContext(model, 3)
    fill(worn)
    worn.set_control(picture())
    before = model(**call(model)).sample
    next(iter(worn.stacks.values())).affiner_of(0).shift.add_(1.0)
    assert not torch.equal(model(**call(model)).sample, before)


@torch.no_grad()
@pytest.mark.parametrize("combine", ["added", "joint"])
def test_it_controls_and_comes_off_without_a_trace(model, combine) -> None:
    before = {name: t.clone() for name, t in model.state_dict().items()}
    processors = [m.processor for m in model.modules() if hasattr(m, "processor")]
    base = model(**call(model)).sample
    worn = InContext(model, 3, block_rank=2, combine=combine)
    fill(worn)
    results = []
    for seed in (3, 4):
        worn.set_control(picture(seed=seed))
        results.append(model(**call(model)).sample)
    assert (results[0] - base).abs().max() > 1e-3
    assert (results[0] - results[1]).abs().max() > 1e-4
    worn.set_control(None)
    assert torch.equal(model(**call(model)).sample, base)
    worn.set_control(picture())
    worn.remove()
    worn.remove()
    assert torch.equal(model(**call(model)).sample, base)
    assert [m.processor for m in model.modules() if hasattr(m, "processor")] == processors
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in after.items())


@torch.no_grad()
def test_a_row_without_a_control_is_the_base_and_guidance_repeats_rows(model) -> None:
    base = model(**call(model)).sample
    worn = InContext(model, 3, block_rank=2)
    fill(worn)
    shown = picture()
    worn.set_control(shown, torch.tensor([1.0, 0.0]))
    mixed = model(**call(model)).sample
    assert torch.equal(mixed[1], base[1])
    assert (mixed[0] - base[0]).abs().max() > 1e-3
    worn.set_control(shown)
    one = call(model)
    per_row = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    per_row += ("timestep", "guidance")
    two = {k: torch.cat([v, v]) if k in per_row else v for k, v in one.items()}
    twice = model(**two).sample
    assert torch.allclose(twice[:2], twice[2:], atol=1e-6)
    assert torch.allclose(twice[:2], model(**one).sample, atol=1e-5)


@torch.no_grad()
def test_joint_with_open_gates_is_one_softmax_over_both_kinds_of_keys() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 8).unbind(0)  # 5 tokens of a picture, 4 of text
    k_c, v_c = torch.randn(2, 1, 2, 5, 8).unbind(0)
    worn = InContext(sd3(), 3, combine="joint")
    worn.gates[0].fill_(1 / in_context.GATE_GAIN)
    worn._seen = [(k_c, v_c)]
    attend = nn.functional.scaled_dot_product_attention
    plain = attend(q, k, v)
    out = worn._attend(0, q, k, v, plain)
    both = attend(q, torch.cat([k, k_c], 2), torch.cat([v, v_c], 2))
    assert torch.allclose(out[:, :, :5], both[:, :, :5], atol=1e-6)
    assert torch.equal(out[:, :, 5:], plain[:, :, 5:])


def test_gradients_reach_all_its_parameters_and_nothing_of_the_base(model) -> None:
    worn = InContext(model, 3)
    worn.set_control(picture())
    model(**call(model)).sample.square().mean().backward()
    assert all(gate.grad.abs().sum() > 0 for gate in worn.gates)  # at once, from the exact start
    fill(worn)
    for parameter in worn.parameters():
        parameter.grad = None
    model(**call(model)).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in worn.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_adamw_learns_what_only_the_control_tells(model) -> None:
    told = {k: torch.cat([v[:1]] * 2) if len(v) == 2 else v for k, v in call(model).items()}
    with torch.no_grad():
        wanted = model(**told).sample.clone()
    wanted[0] += 0.2  # two rows alike in all but their control: 0.04 without
    wanted[1] -= 0.2
    worn = InContext(model, 4)
    worn.set_control(picture())
    optimiser = torch.optim.AdamW(worn.parameters(), lr=2e-2)
    for _ in range(60):
        loss = (model(**told).sample - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.02


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(DiffScalerError, match="SD3Transformer2DModel"):
        InContext(nn.Linear(2, 2))
    model = sd3().eval()
    with pytest.raises(DiffScalerError, match="'mixed'"):
        InContext(model, combine="mixed")
    worn = InContext(model, 2)
    worn.set_control(torch.zeros(1, 4, 4, 4))
    with pytest.raises(DiffScalerError, match="same size"):
        model(**call(model))
    worn.set_control(picture(3))
    with pytest.raises(DiffScalerError, match="one per row"):
        model(**call(model))

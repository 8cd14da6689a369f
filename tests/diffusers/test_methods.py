"""What each method trains, counted on every family's own class."""

from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel

from diffscaler_core import UnknownNameError, new_task
from diffscaler_core.methods import block_of

#: Outputs of attention and MLP of the first block, in words of each model's own code.
OUTPUTS = {
    "sd3": "attn.to_out.0 attn.to_add_out ff.net.2 ff_context.net.2",
    "flux": "attn.to_out.0 attn.to_add_out ff.net.2 ff_context.net.2",
    "flux2": "attn.to_out.0 attn.to_add_out ff.linear_out ff_context.linear_out",
    "pixart": "attn1.to_out.0 attn2.to_out.0 ff.net.2",
    "dit": "attn1.to_out.0 ff.net.2",
    "sana": "attn1.to_out.0 attn2.to_out.0 ff.conv_point",
    "lumina2": "attn.to_out.0 feed_forward.linear_2",
    "z_image": "attention.to_out.0 feed_forward.w2",
    "qwen_image": "attn.to_out.0 attn.to_add_out img_mlp.net.2 txt_mlp.net.2",
    "hunyuan_dit": "attn1.to_out.0 attn2.to_out.0 ff.net.2",
    "auraflow": "attn.to_out.0 attn.to_add_out ff.out_projection ff_context.out_projection",
    "cogview4": "attn1.to_out.0 ff.net.2",
    "cogvideox": "attn1.to_out.0 ff.net.2",
    "wan": "attn1.to_out.0 attn2.to_out.0 ffn.net.2",
    "ltx_video": "attn1.to_out.0 attn2.to_out.0 ff.net.2",
    "hunyuan_video": "attn.to_out.0 attn.to_add_out ff.net.2 ff_context.net.2",
    "chroma": "attn.to_out.0 attn.to_add_out ff.net.2 ff_context.net.2",
    "hidream": "block.attn1.to_out block.attn1.to_out_t block.ff_i.shared_experts.w2 "
    "block.ff_i.experts.0.w2 block.ff_i.experts.1.w2 block.ff_t.w2",
    "sd15": "attn1.to_out.0 attn2.to_out.0 ff.net.2",
    "sdxl": "attn1.to_out.0 attn2.to_out.0 ff.net.2",
    "unet2d": "to_out.0",
}
#: Which blocks have a γ by default: the first half of what is computed.
FIRST_HALF = {
    "lumina2": ["noise_refiner.0", "context_refiner.0"],
    "z_image": ["noise_refiner.0", "context_refiner.0"],
    "sd15": [f"{at}.attentions.0.transformer_blocks.0" for at in ("down_blocks.0", "mid_block")],
    "sdxl": [f"{at}.attentions.0.transformer_blocks.0" for at in ("down_blocks.0", "mid_block")],
    "unet2d": ["down_blocks.1.attentions.0", "mid_block.attentions.0"],
    "hunyuan_dit": ["blocks.0"],
    "wan": ["blocks.0"],
    "auraflow": ["joint_transformer_blocks.0"],
    "hidream": ["double_stream_blocks.0"],
}


def scaled(model: Any, **options: Any) -> list[str]:
    task = new_task(model, "difffit", component="m", **options)
    return [name.removeprefix("m.") for name, own in task.layers.items() if "scale" in own]


@pytest.mark.parametrize("family", OUTPUTS)
def test_difffits_gamma_lies_on_the_outputs_of_attention_and_mlp(tiny: Any, family: str) -> None:
    model = tiny(family)
    first = FIRST_HALF.get(family, ["transformer_blocks.0"])
    halves, every = scaled(model), scaled(model, gamma_blocks="all")
    own = {f"{first[0]}.{leaf}" for leaf in OUTPUTS[family].split()}
    assert own <= set(halves)
    assert {block_of(name) for name in halves} == set(first)
    later = {block_of(name) for name in every} - set(first)
    assert later
    assert set(every) - set(halves) == {name for name in every if block_of(name) in later}


@pytest.mark.parametrize("method", ["bitfit", "difffit"])
@pytest.mark.parametrize("family", OUTPUTS)
def test_their_shifts_are_the_biases_of_the_blocks_layers(
    tiny: Any, family: str, method: str
) -> None:
    model = tiny(family)
    task = new_task(model, method, targets="all", component="m")
    shifts = {n.removeprefix("m.") for n, own in task.layers.items() if "shift" in own}
    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    biased = {n for n, m in model.named_modules() if isinstance(m, kinds) and m.bias is not None}
    assert shifts == biased


def test_census_of_difffit_on_a_dit_of_four_blocks() -> None:
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=4, sample_size=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    task = new_task(model, "difffit", targets="all", classes=["new", "newer"])
    width, blocks = model.inner_dim, 4
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    biases = sum(layer.bias.numel() for layer in linears)
    gammas = 2 * width * blocks // 2
    embeddings = 2 * width * blocks
    assert task.num_parameters == biases + gammas + embeddings
    assert biases == sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    parts = {name.rpartition(".")[2] for own in task.layers.values() for name in own}
    assert parts == {"scale", "shift"}
    everywhere = new_task(model, "difffit", targets="all", gamma_blocks="all")
    assert everywhere.num_parameters == biases + 2 * gammas
    assert everywhere.info["gamma_blocks"] == "all"


def test_census_of_difffit_on_the_full_dit() -> None:
    with torch.device("meta"):
        model = DiTTransformer2DModel()  # DiT-XL/2
    task = new_task(model, "difffit", targets="all", classes=["one"])
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    assert task.num_parameters == biases + 14 * 2 * 1152 + 28 * 1152
    assert task.class_rows("transformer").keys() == {
        f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table" for i in range(28)
    }


def test_another_choice_of_blocks_is_named(tiny: Any) -> None:
    with pytest.raises(UnknownNameError, match="unknown gamma_blocks 'second'; known: first_half"):
        new_task(tiny("dit"), "difffit", gamma_blocks="second")
    assert "gamma_blocks" not in new_task(tiny("dit"), "diffscaler").info


def test_another_activation_of_the_subspaces(tiny: Any) -> None:
    model = tiny("dit")
    task = new_task(model, activation="identity")
    assert (task.info["method"], task.info["activation"]) == ("diffscaler", "identity")
    assert new_task(model).info["activation"] == "relu"
    assert new_task(model, "lora").info["activation"] == "identity"
    with pytest.raises(UnknownNameError, match="unknown activation 'gelu'; known: relu, identity"):
        new_task(model, activation="gelu")

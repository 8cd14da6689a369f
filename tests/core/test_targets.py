from __future__ import annotations

import pytest
import torch
from torch import nn

from diffscaler_core import DiffScalerError, MismatchError, attach, find_targets, new_task
from diffscaler_core.targets import as_target, bias_of, geometry_of, resolve

from .conftest import Denoiser, hooks_of


class QuantisedLinear(nn.Module):
    """What quantisers leave: no nn.Linear, a packed weight, the sizes as attributes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.register_buffer("weight", (linear.weight.detach() * 64).round().to(torch.int8))

    def forward(self, input):
        return nn.functional.linear(input, self.weight.to(input.dtype) / 64, self.bias)


class Wrapper(nn.Module):
    """PEFT's shape: the layer under `base_layer`, small layers beside it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2)})

    def forward(self, x):
        return self.base_layer(x)


def names(model, *args, **options):
    return [target.name for target in find_targets(model, *args, **options)]


def test_presets_choose_by_place_on_a_plain_model(model):
    everything = names(model, "all")
    assert everything[0] == "embed"
    assert everything[-1] == "proj_out"
    blocks = names(model, "blocks")
    assert blocks == everything[1:-1]
    assert len(blocks) == 8
    assert names(model, "attention") == [n for n in blocks if ".attn." in n]
    assert names(model, "mlp") == [n for n in blocks if ".ff." in n]


def test_a_string_is_a_regular_expression_for_the_whole_name(model):
    assert names(model, r"transformer_blocks\.\d\.attn\.to_q") == [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.to_q",
    ]
    with pytest.raises(DiffScalerError, match="no layer of Denoiser matches"):
        find_targets(model, "to_q")


def test_a_list_holds_names_and_name_endings(model):
    assert names(model, ["to_q", "proj_out"]) == [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.to_q",
        "proj_out",
    ]
    with pytest.raises(DiffScalerError, match="no layer"):
        find_targets(model, ["o_q"])  # half a name is no ending


def test_exclude_takes_out_what_the_preset_put_in(model):
    assert names(model, "blocks", exclude=r".*\.ff\..*") == names(model, "attention")
    assert len(names(model, "blocks", exclude=["to_q", "ff.0"])) == 4


def test_a_bad_regular_expression_says_so_in_one_line(model):
    with pytest.raises(DiffScalerError, match="no preset and no regular expression") as caught:
        find_targets(model, "blocks(")
    assert "\n" not in str(caught.value)


def test_nothing_found_names_layers_there_are(model):
    with pytest.raises(DiffScalerError, match="has 10 layers"):
        find_targets(model, "blocks", exclude=".*")
    with pytest.raises(DiffScalerError, match="none at all"):
        find_targets(nn.Sequential(nn.ReLU()), "all")
    with pytest.raises(DiffScalerError, match="0 layers"):
        find_targets(nn.Linear(2, 2), "all")  # a bare layer has no name


def test_a_layer_is_known_by_what_it_offers(model, x):
    plain = model.transformer_blocks[0].ff[0]
    model.transformer_blocks[0].ff[0] = QuantisedLinear(plain)
    assert "transformer_blocks.0.ff.0" in names(model)
    before = model(x)
    task = new_task(model, targets=["0.ff.0"])
    layer = {"shift": torch.ones(16)}
    with attach(model, task.replace(layers=dict.fromkeys(task.layers, layer))):
        assert not torch.equal(model(x), before)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(4),
        nn.Embedding(3, 4),
        nn.ConvTranspose2d(2, 2, 2),
        nn.MaxPool2d(2),
        nn.Bilinear(2, 2, 2),
        nn.ReLU(),
    ],
)
def test_what_cannot_carry_an_affiner_is_no_target(module):
    assert as_target("x", module) is None


def test_under_peft_the_wrapped_layer_is_the_target_under_its_old_name(model):
    before = find_targets(model, "all")
    for block in model.transformer_blocks:
        block.attn.to_q = Wrapper(Wrapper(block.attn.to_q))
        block.ff[0] = Wrapper(block.ff[0])
    assert find_targets(model, "all") == before
    inner = resolve(model, "transformer_blocks.0.attn.to_q")
    assert isinstance(inner, nn.Linear)
    assert resolve(model, "transformer_blocks.0.attn.to_q.lora_A.nothing") is None


@pytest.mark.parametrize("name", ["", "nothing", "embed.weight", "forward", "__class__", "embed.."])
def test_a_name_that_is_no_module_resolves_to_none(model, name):
    assert resolve(model, name) is None


def test_layers_inside_multihead_attention_are_left_out():
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2), "lin": nn.Linear(8, 8)})
    assert names(model, "all") == ["lin"]


def test_a_sequential_of_layers_is_all_but_has_no_blocks():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert names(model, "all") == ["0", "2"]
    with pytest.raises(DiffScalerError, match="presets: blocks"):
        find_targets(model)
    assert names(nn.ModuleDict({"layers": nn.ModuleList(model)})) == ["layers.0", "layers.2"]


def test_a_shared_module_is_one_target_and_a_task_that_splits_it_does_not_fit(model, x):
    task = new_task(model, targets=["to_q"])
    assert len(task.layers) == 2
    model.transformer_blocks[1].attn.to_q = model.transformer_blocks[0].attn.to_q
    assert names(model, ["to_q"]) == ["transformer_blocks.0.attn.to_q"]
    with pytest.raises(MismatchError, match=r"1\.attn\.to_q is the same module as .*0\.attn\.to_q"):
        attach(model, task)
    assert hooks_of(model) == []
    attach(model, new_task(model, targets=["to_q"])).remove()


def test_ranks_can_differ_by_pattern_and_are_capped_by_the_layer(model):
    task = new_task(
        model,
        rank=5,
        targets="all",
        rank_pattern={"to_q": 2, r".*\.ff\.0": 0, "ff.2": 100},
    )
    ranks = {n: len(t["down"]) if "down" in t else 0 for n, t in task.layers.items()}
    assert ranks["transformer.transformer_blocks.0.attn.to_q"] == 2
    assert ranks["transformer.transformer_blocks.0.ff.0"] == 0
    assert ranks["transformer.transformer_blocks.1.ff.2"] == 8
    assert ranks["transformer.embed"] == 5
    assert ranks["transformer.proj_out"] == 4
    assert task.info["ranks"]["default"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "at least 1"),
        ({"rank_pattern": {"to_q": -1}}, "must not be negative"),
        ({"rank_pattern": {"to_k": 2}}, "'to_k' matches none of the 8 targets"),
        ({"rank_pattern": {"(": 2}}, "no regular expression"),
        ({"method": "nonsense"}, "unknown method 'nonsense'"),
    ],
)
def test_impossible_choices_are_refused(model, options, message):
    with pytest.raises(DiffScalerError, match=message):
        new_task(model, **options)


def test_geometry_of_a_linear_is_none_and_of_a_convolution_its_own():
    assert geometry_of(nn.Linear(2, 2)) is None
    conv = nn.Conv2d(2, 2, (3, 4), padding="same", padding_mode="circular")
    assert tuple(geometry_of(conv).border) == tuple(conv._reversed_padding_repeated_twice)
    conv = nn.Conv3d(2, 2, 3, padding=(0, 1, 2), padding_mode="reflect")
    assert tuple(geometry_of(conv).border) == tuple(conv._reversed_padding_repeated_twice)


def test_a_bias_is_read_as_a_copy_in_full_precision():
    layer = nn.Linear(2, 3).bfloat16()
    copied = bias_of("layer", layer)
    assert copied.dtype == torch.float32
    assert torch.equal(copied.bfloat16(), layer.bias)
    copied.add_(1)
    assert not torch.equal(copied.bfloat16(), layer.bias)
    assert bias_of("layer", nn.Linear(2, 3, bias=False)) is None
    assert bias_of("layer", nn.Linear(2, 3).double()).dtype == torch.float64


def test_a_bias_without_values_is_refused_only_where_it_counts():
    layer = nn.Linear(2, 3, device="meta")
    with pytest.raises(MismatchError, match="meta device"):
        bias_of("layer", layer)
    layer = nn.Module()
    layer.bias = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(MismatchError, match="packed"):
        bias_of("layer", layer)
    model = Denoiser().to("meta")
    task = new_task(Denoiser())
    with pytest.raises(MismatchError, match="nothing to scale around"):
        attach(model, task)
    assert hooks_of(model) == []
    attach(model, new_task(model, "lora")).remove()  # no scale, so no bias is asked for


def tiny(name: str):
    diffusers = pytest.importorskip("diffusers")
    if name == "sd3":
        return diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=8,
        )
    if name == "flux":
        return diffusers.FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
        )
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


@pytest.mark.parametrize(
    ("name", "outside"),
    [
        ("sd3", "pos_embed|time_text_embed|context_embedder|norm_out|proj_out"),
        ("flux", "x_embedder|time_text_embed|context_embedder|norm_out|proj_out"),
        ("unet", "conv_in|conv_out|time_embedding"),
    ],
)
def test_presets_on_real_models_choose_what_their_names_say(name, outside):
    model = tiny(name)
    layers = {
        n
        for n, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d)) and m.weight is not None
    }
    everything, blocks = set(names(model, "all")), set(names(model, "blocks"))
    attention, mlp = set(names(model, "attention")), set(names(model, "mlp"))
    assert everything == layers
    assert {n.split(".")[0] for n in everything - blocks} == set(outside.split("|"))
    assert attention
    assert mlp
    assert attention | mlp <= blocks
    assert not attention & mlp
    assert any("to_q" in n for n in attention)
    assert not any("to_q" in n or "to_out" in n for n in mlp)

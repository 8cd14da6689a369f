"""DiffScaler as a method of PEFT: the same numbers, by PEFT's own means, on real models."""
# ruff: noqa: E402

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft", minversion="0.18")
import diffusers as d
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import PeftType

from diffscaler_core import (
    METHODS,
    DiffScalerError,
    MismatchError,
    TaskAdapter,
    TaskFileError,
    UnknownNameError,
    attach,
    combine_tasks,
    load_task,
    new_task,
    save_task,
)
from diffscaler_core.peft import (
    DiffScalerConfig,
    DiffScalerLayer,
    DiffScalerModel,
    from_task,
    load_folder,
    mixed_batch,
    registration,
    save_folder,
    to_task,
)

CLOSE = {"atol": 2e-6, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        yield


@pytest.fixture
def model(tiny: Callable[[str], nn.Module]) -> nn.Module:
    """A DiT, which diffusers gives no adapters of its own."""
    model = tiny("dit")
    assert not hasattr(model, "add_adapter")
    return model


def run(model: nn.Module, **more: Any) -> Tensor:
    """Four rows through a DiT."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 4, 8, 8, generator=generator)
    times, classes = torch.tensor([1, 2, 300, 900]), torch.tensor([0, 1, 2, 3])
    out: Tensor = model(x, timestep=times, class_labels=classes, **more).sample
    return out


def look(model: nn.Module, **more: Any) -> Tensor:
    with torch.no_grad():
        return run(model, **more)


def stir(model: nn.Module, name: str = "default", seed: int = 0, size: float = 0.1) -> nn.Module:
    """Random numbers for all an adapter has, as if trained; the model."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "diffscaler_" in key and key.endswith(f".{name}"):
            numbers = torch.randn(parameter.shape, generator=generator) * size
            parameter.data.copy_(numbers)
    return model.eval()


def adapters(model: nn.Module) -> list[DiffScalerLayer]:
    return [module for module in model.modules() if isinstance(module, DiffScalerLayer)]


def same(one: TaskAdapter, other: TaskAdapter) -> bool:
    return one.layers.keys() == other.layers.keys() and all(
        own.keys() == other.layers[layer].keys()
        and all(torch.equal(t, other.layers[layer][n]) for n, t in own.items())
        and all(t.dtype == other.layers[layer][n].dtype for n, t in own.items())
        for layer, own in one.layers.items()
    )


class Kinds(nn.Module):
    """A layer of every kind, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(6, 12)
        self.one = nn.Conv1d(3, 4, 3, stride=2, padding=1)
        self.two = nn.Conv2d(1, 6, 3, padding="same", dilation=2, padding_mode="circular", groups=1)
        self.three = nn.Conv3d(2, 3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, 6)
        x = self.one(self.line(x).view(-1, 3, 4)).view(-1, 1, 4, 2)  # (B, 4, 2) as a picture
        return self.three(self.two(x).view(-1, 2, 3, 4, 2)).flatten(1)


class Written(nn.Module):
    """(1 + a) ⊙ (W x) + b̂ + b + s U act(D x), with a layer's own W and real modules."""

    def __init__(self, layer: Any, tensors: dict[str, Tensor], gain: float) -> None:
        super().__init__()
        self.plain, self.subspace = copy.deepcopy(layer), copy.deepcopy(layer)
        self.bias, self.plain.bias, self.subspace.bias = layer.bias, None, None
        self.subspace.weight = nn.Parameter(tensors["down"])
        self.tensors, self.gain = tensors, gain

    def forward(self, x: Tensor) -> Tensor:
        wx, hidden = self.plain(x), self.subspace(x).relu()
        around = (lambda v: v) if isinstance(self.plain, nn.Linear) else (
            lambda v: v.view(-1, *(1,) * (wx.ndim - 2))
        )  # fmt: skip
        if isinstance(self.plain, nn.Linear):
            lifted = hidden @ self.tensors["up"].T
        else:
            lifted = torch.einsum("or,br...->bo...", self.tensors["up"], hidden)
        bias = 0 if self.bias is None else around(self.bias)
        scaled = around(1 + self.tensors["scale"]) * wx
        return scaled + bias + around(self.tensors["shift"]) + self.gain * lifted


def test_every_kind_of_layer_computes_the_formula() -> None:
    torch.manual_seed(0)
    base = Kinds()
    written, x = copy.deepcopy(base), torch.randn(5, 6)
    expected = base(x)
    names = ["line", "one", "two", "three"]
    config = DiffScalerConfig(r=3, target_modules=names, gain=0.7)
    model = get_peft_model(base, config)
    assert torch.equal(model(x), expected)
    stir(model, size=0.5)
    for name, own in to_task(model).component_layers("transformer").items():
        setattr(written, name, Written(getattr(written, name), dict(own), 0.7))
    torch.testing.assert_close(model(x), written(x), **CLOSE)
    assert (model(x) - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", ["dit", "pixart", "flux", "wan", "sd15", "sdxl", "unet2d"])
def test_a_new_adapter_changes_no_bit_and_a_trained_one_is_what_attach_does(
    tiny: Callable[[str], nn.Module], name: str
) -> None:
    """Layer by layer, on what each layer would see: any architecture, Linears and convolutions."""
    model = tiny(name)
    plain = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)
    }
    generator = torch.Generator().manual_seed(1)

    def probe(layer: Any) -> Tensor:
        if isinstance(layer, nn.Linear):
            return torch.randn(2, 3, layer.in_features, generator=generator)
        size = (8,) * (len(layer.kernel_size))
        return torch.randn(2, layer.in_channels, *size, generator=generator)

    inputs = {n: probe(m) for n, m in plain.items()}
    with torch.no_grad():
        before = {n: m(inputs[n]) for n, m in plain.items()}
        wrapped = get_peft_model(model, DiffScalerConfig(r=2, target_modules="all"))
        inside = wrapped.get_base_model()
        assert len(adapters(inside)) == len(plain)
        assert all(torch.equal(inside.get_submodule(n)(inputs[n]), y) for n, y in before.items())
        stir(wrapped)
        after = {n: inside.get_submodule(n)(inputs[n]) for n in plain}
        task = to_task(wrapped)
        restored = wrapped.unload()
        with attach(restored, task):
            for n, y in after.items():
                torch.testing.assert_close(restored.get_submodule(n)(inputs[n]), y, **CLOSE)
                assert not torch.equal(y, before[n])
        assert all(torch.equal(restored.get_submodule(n)(inputs[n]), y) for n, y in before.items())


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].parts])
def test_every_method_is_an_adapter(model: nn.Module, method: str) -> None:
    task = new_task(model, method, rank=3)
    base = look(model)
    adapter = get_peft_model(model, DiffScalerConfig(r=3, method=method))
    assert torch.equal(look(adapter), base)
    made = to_task(adapter)
    assert {n: t.keys() for n, t in made.layers.items()} == {
        n: t.keys() for n, t in task.layers.items()
    }
    for fact in ("method", "parts", "activation", "gain", "scale_includes_bias", "base"):
        expected = task.info[fact]
        assert (sorted(made.info[fact]) if fact == "parts" else made.info[fact]) == (
            sorted(expected) if fact == "parts" else expected
        )
    assert made.num_parameters == task.num_parameters
    moved = look(stir(adapter))
    assert not torch.equal(moved, base)
    task = to_task(adapter)
    with attach(adapter.unload(), task):
        torch.testing.assert_close(look(model), moved, **CLOSE)


def test_parts_activation_and_patterns_are_free_to_choose(model: nn.Module) -> None:
    config = DiffScalerConfig(
        r=4,
        target_modules=["to_q", "to_v", "net.2"],
        parts=["scale", "subspace"],
        activation="identity",
        rank_pattern={"to_v": 2, r".*1\.ff\.net\.2": 0},
        parts_pattern={"to_q": ["shift"]},
        exclude_modules=["transformer_blocks.0.attn1.to_v"],
    )
    layers = to_task(get_peft_model(model, config)).component_layers("transformer")
    shapes = {n: {k: len(t) for k, t in own.items()} for n, own in layers.items()}
    assert shapes == {
        "transformer_blocks.0.attn1.to_q": {"shift": 16},
        "transformer_blocks.1.attn1.to_q": {"shift": 16},
        "transformer_blocks.1.attn1.to_v": {"scale": 16, "down": 2, "up": 16},
        "transformer_blocks.0.ff.net.2": {"scale": 16, "down": 4, "up": 16},
        "transformer_blocks.1.ff.net.2": {"scale": 16},
    }


def test_blocks_are_chosen_as_in_peft(model: nn.Module) -> None:
    chosen = DiffScalerConfig(
        target_modules=["to_q"], layers_to_transform=[1], layers_pattern="transformer_blocks"
    )
    layers = to_task(get_peft_model(model, chosen)).layers
    assert list(layers) == ["transformer.transformer_blocks.1.attn1.to_q"]
    with pytest.raises(DiffScalerError, match="layers_to_transform needs target_modules as a list"):
        DiffScalerConfig(target_modules="blocks", layers_to_transform=[1])
    with pytest.raises(DiffScalerError, match="layers_pattern needs"):
        DiffScalerConfig(target_modules=["to_q"], layers_pattern="transformer_blocks")


def test_wrong_words_are_refused() -> None:
    for wrong in (
        {"method": "x"},
        {"parts": ["x"]},
        {"activation": "x"},
        {"parts_pattern": {"a": ["x"]}},
    ):
        with pytest.raises(UnknownNameError, match="unknown"):
            DiffScalerConfig(**wrong)
    for wrong in ({"method": "prompts"}, {"r": -1}, {"rank_pattern": {"to_q": -2}}):
        with pytest.raises(DiffScalerError):
            DiffScalerConfig(**wrong)


def test_layers_that_are_never_called_or_no_layers_are_refused(model: nn.Module) -> None:
    with pytest.raises(DiffScalerError, match="never called"):
        get_peft_model(
            nn.Sequential(nn.MultiheadAttention(8, 2)),
            DiffScalerConfig(target_modules=["out_proj"]),
        )
    with pytest.raises(DiffScalerError, match="Embedding, which can carry no adapter"):
        get_peft_model(model, DiffScalerConfig(target_modules=["embedding_table"]))


def test_fused_projections_are_refused(tiny: Callable[[str], nn.Module]) -> None:
    fused: Any = tiny("sd3")
    fused.fuse_qkv_projections()
    with pytest.raises(DiffScalerError, match="unfuse the projections"):
        get_peft_model(fused, DiffScalerConfig(target_modules=["to_q"]))


@pytest.mark.parametrize("meta", [False, True])
def test_peft_saves_and_loads_it(
    model: nn.Module, tiny: Callable[[str], nn.Module], tmp_path: Path, meta: bool
) -> None:
    adapter = stir(get_peft_model(model, DiffScalerConfig(r=3, method="difffit")))
    expected = look(adapter)
    adapter.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny("dit"), str(tmp_path), low_cpu_mem_usage=meta).eval()
    assert torch.equal(look(loaded), expected)
    assert not any(p.is_meta or p.requires_grad for p in loaded.parameters())
    assert isinstance(loaded.peft_config["default"], DiffScalerConfig)
    state = get_peft_model_state_dict(adapter)
    assert {key.rpartition(".")[2] for key in state} == {"diffscaler_scale", "diffscaler_shift"}
    other = tiny("dit")
    config = DiffScalerConfig.from_pretrained(str(tmp_path))
    inject_adapter_in_model(config, other, "x", low_cpu_mem_usage=meta)
    assert any(p.is_meta for p in other.parameters()) == meta
    result = set_peft_model_state_dict(other, state, "x", low_cpu_mem_usage=meta)
    assert not result.unexpected_keys
    assert torch.equal(look(other.eval()), expected)


def test_only_the_active_adapter_is_trained(model: nn.Module) -> None:
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    adapter = get_peft_model(model, DiffScalerConfig(r=2))
    adapter.add_adapter("other", DiffScalerConfig(r=3, target_modules=["to_q", "net.2"]))
    stir(adapter, "other", seed=1)
    other = to_task(adapter, "other")
    first = look(adapter)
    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = (run(adapter) - 0.3).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.99 * losses[0]
    assert same(to_task(adapter, "other"), other)
    trained = {n for n, p in adapter.named_parameters() if p.requires_grad}
    assert trained
    assert all("diffscaler_" in n and n.endswith(".default") for n in trained)
    assert not torch.equal(look(adapter.eval()), first)
    bare = adapter.unload()
    assert all(torch.equal(p, frozen[name]) for name, p in bare.named_parameters())


def test_adapters_are_switched_summed_and_disabled(model: nn.Module) -> None:
    base = look(model)
    adapter = get_peft_model(model, DiffScalerConfig(r=2))
    adapter.add_adapter("b", DiffScalerConfig(r=3, target_modules=["to_q", "net.2"]))
    stir(adapter, "default", 1)
    stir(adapter, "b", 2)
    tasks = {name: to_task(adapter, name) for name in ("default", "b")}
    alone = {}
    for name, task in tasks.items():
        adapter.set_adapter(name)
        alone[name] = look(adapter)
        with adapter.disable_adapter():
            assert torch.equal(look(adapter), base)
        with attach(copy.deepcopy(adapter).unload(), task) as attached:
            assert attached.names == (name,)
    adapter.base_model.set_adapter(["default", "b"])
    both = look(adapter)
    adapter.base_model.set_adapter(["b", "default"])
    assert torch.equal(look(adapter), both) or (look(adapter) - both).abs().max() < 1e-6
    plain = adapter.unload()
    with attach(plain, tasks):
        torch.testing.assert_close(look(plain), both, **CLOSE)
    for name, task in tasks.items():
        with attach(plain, task):
            torch.testing.assert_close(look(plain), alone[name], **CLOSE)


def test_a_weighted_adapter_is_the_exact_sum(model: nn.Module) -> None:
    adapter = get_peft_model(model, DiffScalerConfig(r=2))
    adapter.add_adapter("b", DiffScalerConfig(r=3, target_modules=["to_q", "net.2"], method="lora"))
    stir(adapter, "default", 1)
    stir(adapter, "b", 2)
    adapter.add_weighted_adapter(["default", "b"], [0.5, -0.25], "both")
    combined = combine_tasks([to_task(adapter), to_task(adapter, "b")], [0.5, -0.25], "both")
    assert same(to_task(adapter, "both"), combined)
    adapter.set_adapter("both")
    moved = look(adapter)
    for layer in adapters(adapter):
        layer.set_scale("default", 0.5)
        layer.set_scale("b", -0.25)
    adapter.base_model.set_adapter(["default", "b"])
    torch.testing.assert_close(look(adapter), moved, **CLOSE)
    with pytest.raises(UnknownNameError, match="adapter 'c'"):
        adapter.add_weighted_adapter(["default", "c"], [1, 1], "x")
    with pytest.raises(DiffScalerError, match="there already"):
        adapter.add_weighted_adapter(["default"], [1], "both")


ROWS = ["default", "__base__", "b", "default"]


def test_each_row_runs_its_own_adapter(model: nn.Module) -> None:
    base = look(model)
    adapter = get_peft_model(model, DiffScalerConfig(r=2))
    adapter.add_adapter("b", DiffScalerConfig(r=3, target_modules=["to_q", "net.2"]))
    stir(adapter, "default", 1)
    stir(adapter, "b", 2)
    alone = {"__base__": base, "default": look(adapter)}
    adapter.set_adapter("b")
    alone["b"] = look(adapter)
    mixed = look(adapter, adapter_names=ROWS)
    expected = torch.stack([alone[name][i] for i, name in enumerate(ROWS)])
    torch.testing.assert_close(mixed, expected, **CLOSE)
    assert torch.equal(mixed[1], base[1])
    assert torch.equal(look(adapter, adapter_names=["__base__"] * 4), base)
    assert torch.equal(look(adapter), alone["b"])  # the active one again
    with pytest.raises(UnknownNameError, match="unknown adapter 'c'"):
        look(adapter, adapter_names=["c"] * 4)
    with pytest.raises(DiffScalerError, match="3 adapter names are given"):
        look(adapter, adapter_names=ROWS[:3])
    assert torch.equal(look(adapter), alone["b"])  # after an error too
    with pytest.raises(DiffScalerError, match="for inference"):
        run(adapter.train(), adapter_names=ROWS)
    adapter.eval().merge_adapter()
    with pytest.raises(DiffScalerError, match="merged"):
        look(adapter, adapter_names=ROWS)


def test_modules_that_peft_saves_whole_are_left_alone(
    model: nn.Module, tiny: Callable[[str], nn.Module], tmp_path: Path
) -> None:
    base = look(model)
    config = DiffScalerConfig(r=2, target_modules="all", modules_to_save=["proj_out_2"])
    adapter = stir(get_peft_model(model, config))
    wrapped = adapter.get_base_model().proj_out_2
    assert not any(
        "proj_out_2" in n and isinstance(m, DiffScalerLayer) for n, m in model.named_modules()
    )
    wrapped.modules_to_save["default"].weight.data.mul_(2)
    moved = look(adapter)
    mixed = look(adapter, adapter_names=["default", "__base__"] * 2)
    assert torch.equal(mixed[1], base[1])
    torch.testing.assert_close(mixed[0], moved[0], **CLOSE)
    adapter.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny("dit"), str(tmp_path)).eval()
    assert torch.equal(look(loaded), moved)
    with pytest.raises(DiffScalerError, match="'proj_out_2' as a whole"):
        to_task(adapter)
    with pytest.raises(TaskFileError, match="proj_out_2"):
        load_folder(tmp_path)


def test_merging_folds_what_folds_and_unmerging_restores_every_bit(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    adapter = get_peft_model(model, DiffScalerConfig(r=2))
    adapter.add_adapter("b", DiffScalerConfig(r=3, target_modules=["to_q", "net.2"]))
    stir(adapter, "default", 1)
    stir(adapter, "b", 2)
    adapter.base_model.set_adapter(["default", "b"])
    both = look(adapter)
    for steps in ([None], [["default"], ["b"]], [["b"], ["default"]]):
        for names in steps:
            adapter.merge_adapter(names, safe_merge=True)
        torch.testing.assert_close(look(adapter), both, **CLOSE)
        now = adapter.get_base_model().transformer_blocks[0].attn1.to_q.base_layer.weight
        assert not torch.equal(now, before["transformer_blocks.0.attn1.to_q.weight"])
        adapter.unmerge_adapter()
        assert torch.equal(look(adapter), both)
    adapter.merge_adapter()
    with adapter.disable_adapter():
        adapter(torch.zeros(1, 4, 8, 8), timestep=torch.tensor([1]), class_labels=torch.tensor([0]))
    bare = adapter.unload()
    after = bare.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_unloading_while_merged_gives_the_base_back(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    adapter = stir(get_peft_model(model, DiffScalerConfig(r=2)))
    adapter.merge_adapter()
    after = adapter.unload().state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_a_relu_subspace_is_not_merged_for_good(model: nn.Module) -> None:
    adapter = stir(get_peft_model(model, DiffScalerConfig(r=2)))
    expected = look(adapter)
    with pytest.raises(DiffScalerError, match=r"cannot fold 'default' \(its relu subspace\)"):
        adapter.merge_and_unload()
    assert torch.equal(look(adapter), expected)
    assert len(adapters(adapter)) == 18


@pytest.mark.parametrize("method", ["scale_shift", "lora", "difffit", "bitfit"])
def test_what_folds_is_merged_for_good(model: nn.Module, method: str) -> None:
    adapter = stir(get_peft_model(model, DiffScalerConfig(r=2, method=method)))
    expected = look(adapter)
    plain = adapter.merge_and_unload()
    assert not adapters(plain)
    assert type(plain) is d.DiTTransformer2DModel
    torch.testing.assert_close(look(plain), expected, **CLOSE)


def test_weights_that_cannot_be_rewritten_are_refused_before_any_is(model: nn.Module) -> None:
    adapter = stir(get_peft_model(model, DiffScalerConfig(method="scale_shift")))
    expected = look(adapter)
    last = adapters(adapter)[-1].base_layer
    kept = last.weight
    last.weight = nn.Parameter(kept.data.to(torch.float8_e4m3fn), requires_grad=False)
    for merge in (adapter.merge_adapter, adapter.merge_and_unload):
        with pytest.raises(DiffScalerError, match=r"cannot merge into 1 layers.*quantised"):
            merge()
    last.weight = kept
    assert torch.equal(look(adapter), expected)


def test_a_sum_that_is_not_finite_is_taken_back(model: nn.Module) -> None:
    adapter = stir(get_peft_model(model, DiffScalerConfig(method="scale_shift")))
    layer = adapters(adapter)[0]
    layer.diffscaler_scale["default"].data.fill_(float("inf"))
    weight = layer.base_layer.weight.clone()
    with pytest.raises(DiffScalerError, match="NaN or Inf"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)
    assert not layer.merged


def test_weights_that_changed_since_are_not_overwritten(model: nn.Module) -> None:
    adapter = stir(get_peft_model(model, DiffScalerConfig(method="scale_shift")))
    adapter.merge_adapter()
    layer = adapters(adapter)[0]
    layer.base_layer.weight.data.add_(1)
    with pytest.raises(DiffScalerError, match="changed after it was merged"):
        layer.unmerge()


def test_an_adapter_is_deleted(model: nn.Module) -> None:
    base = look(model)
    adapter = stir(get_peft_model(model, DiffScalerConfig(r=2)))
    adapter.add_adapter("b", DiffScalerConfig(r=3, target_modules=["to_q"]))
    adapter.set_adapter("b")
    adapter.delete_adapter("b")
    assert list(adapter.peft_config) == ["default"]
    assert not [name for name in get_peft_model_state_dict(adapter) if name.endswith(".b")]
    assert all(list(layer.r) == list(layer.strengths) for layer in adapters(adapter))
    with pytest.raises(UnknownNameError, match="unknown adapter 'b'"):
        to_task(adapter, "b")
    assert not torch.equal(look(adapter), base)


def test_dtypes_are_peft_s_unless_they_come_from_a_task(
    model: nn.Module, tiny: Callable[[str], nn.Module]
) -> None:
    half = copy.deepcopy(model).bfloat16()
    plain = inject_adapter_in_model(DiffScalerConfig(r=2), copy.deepcopy(half), "x")
    assert {t.dtype for x in adapters(plain) for t in x.tensors("x").values()} == {torch.bfloat16}
    wide = get_peft_model(copy.deepcopy(half), DiffScalerConfig(r=2))
    kinds = {t.dtype for x in adapters(wide) for t in x.tensors("default").values()}
    assert kinds == {torch.float32}
    task = to_task(stir(get_peft_model(tiny("dit"), DiffScalerConfig(r=2))))
    placed = from_task(copy.deepcopy(half), task, inject=True)
    assert same(to_task(placed), task)
    x = torch.randn(2, 3, 16, dtype=torch.bfloat16)
    layer = placed.transformer_blocks[0].attn1.to_q
    assert layer(x).dtype == torch.bfloat16
    layer.base_layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), False)
    layer.update_layer("y", ["scale"], 0, DiffScalerConfig().facts)
    assert layer.diffscaler_scale["y"].dtype == torch.float32


def test_gradients_are_the_same_with_checkpointing(tiny: Callable[[str], nn.Module]) -> None:
    grads = []
    for checkpointing in (False, True):
        base: Any = tiny("dit")
        if checkpointing:
            base.enable_gradient_checkpointing()
        adapter = stir(get_peft_model(base, DiffScalerConfig(r=2))).train()
        run(adapter).square().mean().backward()
        grads.append({n: p.grad for n, p in adapter.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(g, grads[1][n]) and bool(g.any()) for n, g in grads[0].items())


def test_compiled_code_follows_rows_and_strengths(model: nn.Module) -> None:
    adapter = stir(get_peft_model(model, DiffScalerConfig(r=2, target_modules=["to_q"])))
    layer, *_ = adapters(adapter)
    x = torch.randn(2, 3, 16)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        base = layer.base_layer(x)
        assert torch.equal(compiled(x), layer(x))
        with mixed_batch(adapter, ["default", "__base__"]):
            assert torch.equal(compiled(x), layer(x))
            assert torch.equal(compiled(x)[1], base[1])
            assert not torch.equal(compiled(x)[0], base[0])
        layer.set_scale("default", 0.0)
        assert torch.equal(compiled(x), base)
    torch._dynamo.reset()


def sd3_run(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x, context = (
        torch.randn(2, 4, 16, 16, generator=generator),
        torch.randn(2, 5, 12, generator=generator),
    )
    pooled = torch.randn(2, 10, generator=generator)
    with torch.no_grad():
        times = torch.tensor([1.0, 500.0])
        out: Tensor = model(x, context, pooled, times).sample
    return out


def test_diffusers_models_take_it_by_themselves(tiny: Callable[[str], nn.Module]) -> None:
    model: Any = tiny("sd3")
    base = sd3_run(model)
    model.add_adapter(DiffScalerConfig(r=2), adapter_name="a")
    model.add_adapter(DiffScalerConfig(r=3, target_modules=["to_q"]), adapter_name="b")
    assert torch.equal(sd3_run(model), base)
    stir(model, "a", 1)
    stir(model, "b", 2)
    tasks = {name: to_task(model, name) for name in "ab"}
    model.set_adapters(["a", "b"], [0.5, -1.0])
    moved = sd3_run(model)
    plain = tiny("sd3")
    with attach(plain, tasks, {"a": 0.5, "b": -1.0}):
        torch.testing.assert_close(sd3_run(plain), moved, **CLOSE)
    model.set_adapters(["a", "b"], [0.0, 0.0])
    assert torch.equal(sd3_run(model), base)
    model.set_adapters(["a", "b"], [1.0, 1.0])
    model.disable_adapters()
    assert torch.equal(sd3_run(model), base)
    model.enable_adapters()
    both = sd3_run(model)
    with mixed_batch(model, ["a", "__base__"]):
        assert torch.equal(sd3_run(model)[1], base[1])
    model.fuse_lora(lora_scale=0.5)
    fused = sd3_run(model)
    model.unfuse_lora()
    model.set_adapters(["a", "b"], [0.5, 0.5])
    torch.testing.assert_close(fused, sd3_run(model), **CLOSE)
    model.set_adapters(["a", "b"], [1.0, 1.0])
    assert torch.equal(sd3_run(model), both)
    model.delete_adapters("b")
    model.unload_lora()
    assert not adapters(model)
    assert torch.equal(sd3_run(model), base)


@pytest.mark.parametrize("first", ["lora", "diffscaler"])
def test_beside_a_lora_both_see_the_frozen_layer(
    tiny: Callable[[str], nn.Module], first: str
) -> None:
    """Whichever is around the other, the result is one parallel sum, as with `attach`."""
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    task = to_task(stir(get_peft_model(tiny("sd3"), DiffScalerConfig(r=2))))
    only: Any = tiny("sd3")
    only.add_adapter(lora, "l")
    state = get_peft_model_state_dict(only, adapter_name="l")
    with attach(only, task):
        expected = sd3_run(only)
    model: Any = tiny("sd3")
    if first == "lora":
        model.add_adapter(copy.deepcopy(lora), "l")
    from_task(model, task, "t", inject=True)
    if first == "diffscaler":
        model.add_adapter(copy.deepcopy(lora), "l")
    set_peft_model_state_dict(
        model,
        {k.replace("to_q", "to_q").replace("base_layer.", ""): v for k, v in state.items()},
        "l",
    )
    model.set_adapters(["l", "t"])
    torch.testing.assert_close(sd3_run(model), expected, **CLOSE)
    assert same(to_task(model, "t"), task)
    assert not [n for n, m in model.named_modules() if m._forward_hooks]


def test_beside_attached_tasks_the_sum_is_parallel_and_removed_in_any_order(
    model: nn.Module, make_noisy: Callable[..., TaskAdapter]
) -> None:
    base = look(model)
    ours = make_noisy(new_task(model, name="ours"), 5)
    adapter = stir(get_peft_model(model, DiffScalerConfig(r=2)))
    theirs = to_task(adapter)
    alone = look(adapter)
    attached = attach(adapter.get_base_model(), ours)
    both = look(adapter)
    rows = look(adapter, adapter_names=["__base__", "default"] * 2)
    with adapter.disable_adapter():
        assert torch.equal(rows[0], look(adapter)[0])
    attached.remove()
    assert torch.equal(look(adapter), alone)
    attached = attach(adapter.get_base_model(), ours)
    plain = adapter.unload()
    attached.remove()
    assert torch.equal(look(plain), base)
    with attach(plain, {"ours": ours, "theirs": theirs}):
        torch.testing.assert_close(look(plain), both, **CLOSE)
    assert not [n for n, m in plain.named_modules() if m._forward_hooks]


def test_a_task_file_becomes_an_adapter_and_back_bit_for_bit(
    model: nn.Module,
    tiny: Callable[[str], nn.Module],
    make_noisy: Callable[..., TaskAdapter],
    tmp_path: Path,
) -> None:
    parts = [
        new_task(model, "difffit", targets="all"),
        new_task(model, rank=3, rank_pattern={"to_k": 5, "to_v": 0}),
        new_task(model, "lora", targets=["proj_out_2"]),
    ]
    noisy = [
        make_noisy(task, i).with_info(scale_includes_bias=False) for i, task in enumerate(parts)
    ]
    task = combine_tasks(noisy, name="mix").with_info(license="CC0-1.0", trigger="a word")
    save_task(task, tmp_path / "task.safetensors")
    task = load_task(tmp_path / "task.safetensors")
    with attach(model, task):
        expected = look(model)
    adapter = from_task(model, task).eval()
    torch.testing.assert_close(look(adapter), expected, **CLOSE)
    assert not any(p.requires_grad for p in adapter.parameters())
    back = to_task(adapter, name="mix")
    assert same(back, task)
    assert back.info["license"] == "CC0-1.0"
    assert back.info["base"] == task.info["base"]
    adapter.save_pretrained(str(tmp_path / "theirs"))
    save_folder(task, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        assert same(load_folder(tmp_path / folder), task)
        loaded = PeftModel.from_pretrained(tiny("dit"), str(tmp_path / folder)).eval()
        assert torch.equal(look(loaded), look(adapter))
    save_task(back, tmp_path / "back.safetensors")
    assert same(load_task(tmp_path / "back.safetensors"), task)


def test_a_task_is_trained_on_as_an_adapter(
    model: nn.Module, make_noisy: Callable[..., TaskAdapter]
) -> None:
    task = make_noisy(new_task(model), 1)
    adapter = from_task(model, task, is_trainable=True)
    assert sum(p.numel() for p in adapter.parameters() if p.requires_grad) == task.num_parameters
    from_task(adapter, make_noisy(new_task(adapter.get_base_model(), rank=2), 2), "second")
    assert list(adapter.peft_config) == ["default", "second"]
    assert same(to_task(adapter), task)


def test_tasks_that_do_not_fit_leave_the_model_alone(
    model: nn.Module, tiny: Callable[[str], nn.Module]
) -> None:
    base = look(model)
    with pytest.raises(MismatchError, match="does not fit"):
        from_task(model, new_task(tiny("sd3")))
    control = new_task(model, control="edges")
    with pytest.raises(DiffScalerError, match="holds more than its layers"):
        from_task(model, control)
    with pytest.raises(DiffScalerError, match="holds more than its layers"):
        save_folder(control, "nowhere")
    assert not adapters(model)
    assert torch.equal(look(model), base)
    adapter = from_task(model, new_task(model))
    with pytest.raises(DiffScalerError, match="there already"):
        from_task(adapter, new_task(model))


def test_folders_that_are_no_such_adapter_are_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(TaskFileError, match="no adapter_config"):
        load_folder(tmp_path)
    file = tmp_path / "adapter_config.json"
    for text in ("{", "[]", json.dumps({"peft_type": "LORA"})):
        file.write_text(text)
        with pytest.raises(TaskFileError):
            load_folder(tmp_path)
    adapter = stir(get_peft_model(model, DiffScalerConfig(r=2)))
    adapter.save_pretrained(str(tmp_path), safe_serialization=False)
    with pytest.raises(TaskFileError, match="save the adapter as safetensors"):
        load_folder(tmp_path)
    adapters(adapter)[0].diffscaler_shift["default"].data.fill_(float("nan"))
    adapter.save_pretrained(str(tmp_path))
    with pytest.raises(TaskFileError, match="NaN"):
        load_folder(tmp_path)


def test_a_text_transformer_takes_it_too(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(vocab_size=20, max_position_embeddings=8, **small)
    ).eval()
    plain = copy.deepcopy(encoder)
    words = torch.tensor([[1, 2, 3, 19], [1, 5, 4, 19]])
    with torch.no_grad():
        base = encoder(words).last_hidden_state
        adapter = get_peft_model(encoder, DiffScalerConfig(r=2, target_modules="all-linear"))
        assert torch.equal(adapter(input_ids=words).last_hidden_state, base)
        moved = stir(adapter)(input_ids=words).last_hidden_state
        assert not torch.equal(moved, base)
        adapter.save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
        assert torch.equal(loaded(input_ids=words).last_hidden_state, moved)


def test_registering_is_idempotent_and_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    registration.register(DiffScalerConfig, DiffScalerModel)
    assert PeftType("DIFFSCALER") is PeftType["DIFFSCALER"] is PeftType.DIFFSCALER
    assert copy.deepcopy(DiffScalerConfig()).peft_type is PeftType.DIFFSCALER
    monkeypatch.setattr(peft, "__version__", "0.17.1")
    with pytest.raises(
        DiffScalerError, match=r"needs peft 0\.18\.0 or newer, and this is 0\.17\.1"
    ):
        registration.register(DiffScalerConfig, DiffScalerModel)


def test_an_enumeration_that_does_not_grow_is_left_as_it_was() -> None:
    class Closed(str, Enum):
        ONE = "ONE"

        @classmethod
        def _missing_(cls, value: object) -> Any:
            return cls.ONE

    Closed._value2member_map_ = _Full({"ONE": Closed.ONE})  # type: ignore[misc]
    with pytest.raises(DiffScalerError, match="takes no new method"):
        registration._grow(Closed, "TWO")
    assert list(Closed) == [Closed.ONE]
    assert not hasattr(Closed, "TWO")


class _Full(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("no more")

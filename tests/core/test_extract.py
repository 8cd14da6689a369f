import copy
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffscaler_core import DiffScalerError, MismatchError, attach, load_task, save_task
from diffscaler_core.extraction import extract_task
from diffscaler_core.extraction.low_rank import fit_change, row_scale, truncated_svd

from .conftest import Denoiser


def moved(model, seed=0, by=0.1):
    """A copy whose every parameter moved a little."""
    generator = torch.Generator().manual_seed(seed)
    tuned = copy.deepcopy(model)
    for parameter in tuned.parameters():
        parameter.data += by * torch.randn(parameter.shape, generator=generator)
    return tuned


def error(task, tuned, base):
    """‖Δ − Δ'‖² over the layers of a task, with the change written out from its tensors."""
    total = 0.0
    for name, own in task.component_layers("transformer").items():
        old, new = (m.get_submodule(name).weight.flatten(1) for m in (base, tuned))
        done = torch.zeros_like(old)
        if "scale" in own:
            done = done + torch.diag(own["scale"]) @ old
        if "down" in own:
            done = done + own["up"] @ own["down"].flatten(1)
        total += float((new - old - done).square().sum())
    return total


def test_full_rank_is_the_tuned_model(model, x):
    tuned = moved(model)
    found = extract_task(tuned, model, rank=64)
    with attach(model, found.task):
        assert torch.allclose(model(x), tuned(x), atol=2e-5)
    assert not torch.allclose(model(x), tuned(x), atol=1e-1)
    assert found.report.error < 1e-5
    assert found.report.left_out == ()


def test_scales_are_the_best_there_are(model):
    tuned = moved(model)
    for rank in (0, 2):
        task = extract_task(tuned, model, rank).task
        best = error(task, tuned, model)
        for layer, own in task.layers.items():
            for step in (-1e-2, 1e-2):
                for row in range(0, len(own["scale"]), 3):
                    scale = own["scale"].clone()
                    scale[row] += step
                    other = {**task.layers, layer: {**own, "scale": scale}}
                    assert error(task.replace(layers=other), tuned, model) > best


def test_the_subspace_is_the_nearest_of_its_rank(model):
    tuned = moved(model)
    task = extract_task(tuned, model, 2, parts=("subspace",)).task
    for name, own in task.component_layers("transformer").items():
        change = (tuned.get_submodule(name).weight - model.get_submodule(name).weight).flatten(1)
        values = torch.linalg.svdvals(change)
        left = (change - own["up"] @ own["down"].flatten(1)).norm()
        assert float(left) == pytest.approx(float(values[2:].norm()), rel=1e-4)


def test_a_change_of_row_lengths_alone_needs_no_rank(model, x):
    tuned = copy.deepcopy(model)
    wanted = {}
    for name, module in tuned.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            factor = torch.linspace(-0.5, 0.5, len(module.weight))
            module.weight.data *= (1 + factor).view(-1, *(1,) * (module.weight.ndim - 1))
            wanted[name] = factor
    found = extract_task(tuned, model, rank=0)
    for name, own in found.task.component_layers("transformer").items():
        assert own.keys() == {"scale"}
        assert torch.allclose(own["scale"], wanted[name], atol=1e-5)
    assert found.report.error < 1e-5
    # also where a rank is allowed: the subspace has nothing left to do
    assert extract_task(tuned, model, rank=4).report.error < 1e-5
    with attach(model, found.task):
        assert torch.allclose(model(x), tuned(x), atol=1e-5)


def test_a_change_of_low_rank_is_found_as_what_it_is(model):
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    layer = tuned.transformer_blocks[1].ff[0]
    layer.weight.data += torch.randn(16, 2, generator=generator) @ torch.randn(
        2, 8, generator=generator
    )
    task = extract_task(tuned, model, rank=8).task
    ((name, own),) = task.layers.items()
    assert name == "transformer.transformer_blocks.1.ff.0"
    assert own["down"].shape == (2, 8)
    assert "scale" not in own


def test_biases_alone_become_shifts_exactly(model, x):
    tuned = copy.deepcopy(model)
    tuned.embed.bias.data += 0.3
    tuned.transformer_blocks[0].attn.to_q.bias.data -= 0.2
    found = extract_task(tuned, model)
    assert {n: set(own) for n, own in found.task.layers.items()} == {
        "transformer.embed": {"shift"},
        "transformer.transformer_blocks.0.attn.to_q": {"shift"},
    }
    shift = tuned.embed.bias - model.embed.bias
    assert torch.equal(found.task.layers["transformer.embed"]["shift"], shift)
    assert found.report.kept == pytest.approx(1)
    with attach(model, found.task):
        assert torch.allclose(model(x), tuned(x), atol=1e-6)


def test_convolutions_with_stride_groups_and_kernel():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1)
    ).requires_grad_(False)
    tuned = moved(net)
    found = extract_task(tuned, net, rank=64)
    own = found.task.layers
    assert own["transformer.0"]["down"].shape[1:] == (3, 3, 3)
    assert "down" not in own["transformer.1"]  # each group reads its own channel
    x = torch.randn(2, 3, 9, 9)
    with attach(net, found.task):
        first = net[0](x)
    assert torch.allclose(first, tuned[0](x), atol=1e-5)
    assert next(r for r in found.report.layers if r.name == "1").kept < 1


def test_nothing_that_changed_is_dropped_silently(model):
    tuned = moved(model)
    found = extract_task(tuned, model, 2, targets="blocks", parts=("scale", "subspace"))
    left = {one.name: one for one in found.report.left_out}
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    assert left.keys() == biases | {"embed.weight", "proj_out.weight"}
    moved_by = (tuned.embed.weight - model.embed.weight).norm() / model.embed.weight.norm()
    assert left["embed.weight"].change == pytest.approx(float(moved_by), rel=1e-5)
    assert left["embed.weight"].why == "not among the targets"
    assert "embed.weight" in found.report.text(most=99)


def test_norms_and_tables_are_named_with_how_far_they_moved():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.time_embedding = nn.Embedding(4, 8)
            self.norm = nn.LayerNorm(8)
            self.proj = nn.Linear(8, 8)

    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    for source in (net, net.state_dict()):
        tuned = moved(net)
        found = extract_task(tuned if source is net else tuned.state_dict(), source, 8)
        assert list(found.task.layers) == ["transformer.proj"]
        left = {one.name for one in found.report.left_out}
        assert left == {"time_embedding.weight", "norm.weight", "norm.bias"}
        assert found.report.kept < 0.9  # the whole change counts, what is left out too


def test_files_folders_and_models_give_the_same_task(model, tmp_path):
    tuned = moved(model)
    for name, net in (("tuned", tuned), ("base", model)):
        state = net.state_dict()
        save_file(state, tmp_path / f"{name}.safetensors")
        parts = tmp_path / name
        parts.mkdir()
        half = len(state) // 2
        for i, keys in enumerate((list(state)[:half], list(state)[half:])):
            save_file({k: state[k] for k in keys}, parts / f"part-{i}.safetensors")
        (parts / "config.json").write_text('{"_class_name": "Denoiser"}')
    wanted = extract_task(tuned, model, 3)
    for suffix in (".safetensors", ""):
        found = extract_task(tmp_path / f"tuned{suffix}", tmp_path / f"base{suffix}", 3)
        assert found.task.layers.keys() == wanted.task.layers.keys()
        for layer, own in wanted.task.layers.items():
            assert own.keys() == found.task.layers[layer].keys()
            assert all(torch.equal(t, found.task.layers[layer][n]) for n, t in own.items())
        assert found.report.error == wanted.report.error
    assert found.task.info["base"] == wanted.task.info["base"]


def test_weights_are_read_one_by_one_and_let_go(model):
    """However large the models: no more than a few of their tensors are held at a time."""
    alive: list[weakref.ref] = []
    most = 0

    class Counted:
        def __init__(self, net):
            self.title, self.shape_model, self.state = "counted", net, net.state_dict()
            self.shapes = {n: tuple(t.shape) for n, t in self.state.items()}

        def read(self, name):
            nonlocal most
            tensor = self.state[name].clone()
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            return tensor

    extract_task(Counted(moved(model)), Counted(model), 2)
    assert len(alive) == 36
    assert most <= 6


def test_large_layers_are_decomposed_at_random_yet_near_the_best_and_repeatably():
    generator = torch.Generator().manual_seed(0)
    m, n = 700, 900
    left, right = (torch.linalg.qr(torch.randn(s, 600, generator=generator))[0] for s in (m, n))
    values = 1 / torch.arange(1, 601) ** 0.5
    matrix = (left * values) @ right.mT
    twice = [truncated_svd(matrix, 16, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))
    up, found, down = twice[0]
    lost = (matrix - (up * found) @ down).norm()
    assert float(lost) < 1.005 * float(values[16:].norm())


def test_row_scale_of_an_empty_row_is_zero():
    weight, change = torch.tensor([[0.0, 0], [2, 0]]), torch.tensor([[1.0, 1], [1, 1]])
    assert torch.equal(row_scale(weight, change), torch.tensor([0.0, 0.5]))


@pytest.mark.parametrize(("m", "n"), [(768, 128), (128, 128), (600, 900)])
def test_rounding_is_not_taken_for_rank(m, n):
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(m, n, generator=generator)
    change = torch.randn(m, 2, generator=generator) @ torch.randn(2, n, generator=generator)
    change = (weight + 0.02 * change) - weight
    found = fit_change(weight, change, 16, 32, True, generator)
    assert found.down.shape == (2, n)
    assert found.scale is None
    assert found.error < 1e-10 * float(change.square().sum())


def test_the_curve_says_what_each_rank_leaves():
    generator = torch.Generator().manual_seed(0)
    weight, change = torch.randn(2, 12, 20, generator=generator)
    curve = fit_change(weight, change, 0, 12, False, generator).left
    for rank in (1, 4, 12):
        found = fit_change(weight, change, rank, 12, False, generator)
        assert found.error == pytest.approx(float(curve[rank]), abs=1e-3)


def test_automatic_ranks_keep_the_share_or_the_budget(model):
    tuned = moved(model)
    found = extract_task(tuned, model, "auto", energy=0.8)
    assert all(layer.kept >= 0.8 - 1e-6 for layer in found.report.layers)
    alone = {"parts": ("subspace",)}  # with scales a rank may come out better than foreseen
    found = extract_task(tuned, model, "auto", energy=0.8, **alone)
    ranks = {layer.name: layer.rank for layer in found.report.layers}
    assert len(set(ranks.values())) > 1
    for name, rank in ranks.items():  # one less would be too few
        if rank > 1:
            fewer = extract_task(tuned, model, rank - 1, targets=[name], **alone)
            assert fewer.report.layers[0].kept < 0.8
    budget = found.task.num_parameters
    spent = extract_task(tuned, model, "auto", rank_budget=f"{budget / 1e6}M")
    assert spent.task.num_parameters <= budget
    same_size = extract_task(tuned, model, 2)
    better = extract_task(tuned, model, "auto", rank_budget=2)
    assert better.task.num_parameters <= same_size.task.num_parameters
    assert better.report.kept > same_size.report.kept


def test_advice_says_what_other_ranks_keep(model):
    tuned = moved(model)
    report = extract_task(tuned, model, 2).report
    four = extract_task(tuned, model, 4)
    weights = sum(layer.squared for layer in four.report.layers)
    kept = sum(layer.squared * layer.kept for layer in four.report.layers) / weights
    assert report.kept_at[4] == pytest.approx(kept, abs=0.02)
    assert report.kept_at[1] < report.kept_at[2] < report.kept_at[4]
    assert report.parameters_at[2] >= extract_task(tuned, model, 2).task.num_parameters


def test_the_wrong_pair_is_refused(model, tmp_path):
    other = Denoiser(12).requires_grad_(False)
    with pytest.raises(MismatchError, match=r"no fine-tune of .* other shapes"):
        extract_task(other, model)
    state = model.state_dict()
    save_file(state, tmp_path / "base.safetensors")
    short = dict(list(state.items())[:-2])
    with pytest.raises(MismatchError, match=r"2 tensors are missing, first 'proj_out\.bias'"):
        extract_task(short, tmp_path / "base.safetensors")
    with pytest.raises(DiffScalerError, match="the same in all 10 layers"):
        extract_task(copy.deepcopy(model), model)


def test_what_cannot_be_read_is_refused_in_one_line(model, tmp_path):
    state = moved(model).state_dict()
    packed = {**state, "proj_out.weight": state["proj_out.weight"].to(torch.int8)}
    with pytest.raises(DiffScalerError, match=r"'proj_out\.weight' .* is packed as int8"):
        extract_task(packed, model.state_dict())
    marked = {**state, "proj_out.weight_scale": torch.ones(())}
    with pytest.raises(DiffScalerError, match="quantised"):
        extract_task(marked, model.state_dict())
    state["proj_out.weight"][0, 0] = torch.nan
    with pytest.raises(DiffScalerError, match="NaN or Inf"):
        extract_task(state, model.state_dict())
    huge = copy.deepcopy(model)
    huge.proj_out.bias.data += 1e6
    with pytest.raises(DiffScalerError, match="too large for float16"):
        extract_task(huge, model, dtype=torch.float16)
    (tmp_path / "model.ckpt").write_bytes(b"PK" + bytes(20))
    with pytest.raises(DiffScalerError, match="pickle or zip"):
        extract_task(tmp_path / "model.ckpt", model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": -1}, "rank must be"),
        ({"rank": "all"}, "rank must be"),
        ({"parts": ("scales",)}, "unknown part"),
        ({"parts": ()}, "needs a part"),
        ({"energy": 0.0}, "share"),
        ({"rank_budget": 8}, "needs rank 'auto'"),
        ({"rank": "auto", "rank_budget": "nothing"}, "rank_budget"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(model, settings, said):
    with pytest.raises(DiffScalerError, match=said):
        extract_task(moved(model), model, **settings)


def test_half_floats_in_and_out_and_the_file(model, tmp_path, x):
    base = {n: t.half() for n, t in model.state_dict().items()}
    tuned = {n: t.half() for n, t in moved(model).state_dict().items()}
    found = extract_task(tuned, base, 64, dtype=torch.bfloat16)
    assert {t.dtype for t in found.task.tensors} == {torch.bfloat16}
    assert 1e-4 < found.report.error < 1e-2  # of what is stored, not of what was computed
    task = load_task(save_task(found.task, tmp_path / "t.safetensors"))
    assert task.info["extracted"]["kept"] == pytest.approx(found.report.kept, abs=1e-5)
    assert task.info["method"] == "diffscaler"


def test_a_stop_is_raised_where_it_is_asked_for(model):
    seen = []

    def stop(done, count, name):
        seen.append((done, count, name))
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_task(moved(model), model, on_tensor=stop)
    assert [done for done, _, _ in seen] == [1, 2, 3, 4, 5]
    assert seen[0][2] == "embed"

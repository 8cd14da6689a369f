"""New classes on a class-conditional base: DiT's tables, a U-Net's, and DiTPipeline as it is."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor

from diffscaler_core import (
    DiffScalerError,
    MismatchError,
    TaskAdapter,
    TaskFileError,
    attach,
    combine_tasks,
    load_task,
    new_task,
    save_task,
    scale_task,
)
from diffscaler_core.classes import class_tables
from diffscaler_core.describe import describe
from diffscaler_core.task import with_classes

NULL, FIRST = 10, 11  # of the tiny base: ten classes and "no class"
TABLE = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table"


@pytest.fixture
def model() -> Any:
    torch.manual_seed(4)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, patch_size=2,
        in_channels=4, out_channels=8, num_embeds_ada_norm=NULL,
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim > 1 and not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False)


def run(model: Any, labels: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, 8, 8, generator=generator).repeat(len(labels), 1, 1, 1)
    t = torch.full((len(labels),), 500)
    with torch.no_grad():
        return model(x, timestep=t, class_labels=torch.tensor(labels)).sample


def moved(task: TaskAdapter, seed: int = 0) -> TaskAdapter:
    """The task with every tensor random."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(t: Tensor) -> Tensor:
        return 0.5 * torch.randn(t.shape, generator=generator)

    layers = {n: {k: noisy(t) for k, t in own.items()} for n, own in task.layers.items()}
    return task.replace(layers=layers, extras={n: noisy(t) for n, t in task.extras.items()})


@pytest.fixture
def make(model: Any) -> Callable[..., TaskAdapter]:
    def make(name: str, classes: list[str], seed: int = 0, **options: Any) -> TaskAdapter:
        options = {"method": "prompts", **options}
        return moved(new_task(model, name=name, classes=classes, **options), seed)

    return make


def with_rows_in_the_tables(model: Any, *tasks: tuple[TaskAdapter, float]) -> Any:
    """A copy of the model whose tables really hold Σ w (null + row): another way to the same."""
    grown = copy.deepcopy(model)
    for i, block in enumerate(grown.transformer_blocks):
        table = block.norm1.emb.class_embedder.embedding_table
        null, count = table.weight[NULL], max(len(t.new_classes) for t, _ in tasks)
        rows = null.repeat(count, 1)
        for task, weight in tasks:
            own = task.class_rows("transformer")[TABLE.format(i)]
            rows[: len(own)] += weight * own
        larger = torch.nn.Embedding.from_pretrained(torch.cat([table.weight.data, rows]))
        block.norm1.emb.class_embedder.embedding_table = larger
    return grown


def test_tables_are_found_by_the_families_table(model: Any) -> None:
    tables = class_tables(model)
    assert [table.name for table in tables] == [TABLE.format(i) for i in range(2)]
    assert {(table.size, table.width, table.null) for table in tables} == {(FIRST, 16, NULL)}


@pytest.mark.parametrize("method", ["prompts", "diffscaler", "difffit"])
def test_a_fresh_class_is_exactly_the_null_class(model: Any, method: str) -> None:
    base = run(model, [3, NULL, NULL])
    task = new_task(model, method, rank=2, classes=["cat", "dog"])
    assert task.classes == {"cat": FIRST, "dog": FIRST + 1}
    with attach(model, task):
        assert torch.equal(run(model, [3, FIRST, FIRST + 1]), base)


def test_rows_act_as_if_they_stood_in_the_tables(model: Any, make: Any) -> None:
    task, labels = make("a", ["cat", "dog"]), [3, FIRST, NULL, FIRST + 1]
    known = run(model, [3, NULL])
    for weight in (1.0, 0.4, -1.0):
        wanted = run(with_rows_in_the_tables(model, (task, weight)), labels)
        with attach(model, task, weight):
            torch.testing.assert_close(run(model, labels), wanted)
            assert torch.equal(run(model, [3, NULL]), known)


def test_only_the_shifts_strength_counts(model: Any, make: Any) -> None:
    task = make("a", ["cat"])
    with attach(model, task) as attachment:
        full = run(model, [FIRST])
        attachment.set_weights({"a": {"scale": 0.0, "subspace": 0.0}})
        assert torch.equal(run(model, [FIRST]), full)
        attachment.set_weights({"a": {"shift": 0.0}})
        assert torch.equal(run(model, [FIRST]), run(model, [NULL]))


def test_stacked_tasks_add_up_in_any_order_and_number_of_attachments(model: Any, make: Any) -> None:
    one, two = make("one", ["cat", "dog"], 1), make("two", ["elk"], 2)
    labels = [FIRST, FIRST + 1, 5]
    wanted = run(with_rows_in_the_tables(model, (one, 0.7), (two, -0.3)), labels)
    weights = {"one": 0.7, "two": -0.3}
    with attach(model, {"two": two, "one": one}, weights):
        torch.testing.assert_close(run(model, labels), wanted)
    with attach(model, one, 0.7), attach(model, two, -0.3):
        torch.testing.assert_close(run(model, labels), wanted)
    attachment = attach(model, one, 0.7)
    attachment.add(model, "two", two)
    attachment.set_weights(weights)
    torch.testing.assert_close(run(model, labels), wanted)
    attachment.drop("one")
    torch.testing.assert_close(
        run(model, labels[:1]), run(with_rows_in_the_tables(model, (two, -0.3)), labels[:1])
    )
    attachment.remove()


def test_rows_of_a_batch_have_classes_of_their_own(model: Any, make: Any) -> None:
    one, two = (make(n, ["cat"], i, method="diffscaler", rank=2) for i, n in enumerate("ab"))
    alone = []
    for task in (one, two):
        with attach(model, task):
            alone.append(run(model, [FIRST])[0])
    with attach(model, {"a": one, "b": two}) as attachment:
        attachment.set_rows(["b", "a", None, {"a": 0.5}])
        both = run(model, [FIRST] * 4)
        torch.testing.assert_close(both[0], alone[1])
        torch.testing.assert_close(both[1], alone[0])
        torch.testing.assert_close(both[2], run_plain(model, NULL))
        attachment.set_groups(["a", "b"])
        parts = run(model, [FIRST, 2, FIRST, 2])
        torch.testing.assert_close(parts[0], alone[0])
        torch.testing.assert_close(parts[2], alone[1])
        attachment.set_rows(["a", "b"])
        with pytest.raises(DiffScalerError, match="2 rows are set"):
            run(model, [FIRST, 1, 2])


def run_plain(model: Any, label: int) -> Tensor:
    bare = copy.deepcopy(model)
    for module in bare.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return run(bare, [label])[0]


def test_removal_leaves_no_trace_also_after_an_error(model: Any, make: Any) -> None:
    before, keys = run(model, [1, NULL]), {n: t.clone() for n, t in model.state_dict().items()}
    first, second = attach(model, make("a", ["cat"])), attach(model, make("b", ["dog"], 1))
    with pytest.raises(DiffScalerError, match=r"no class 12: the base has 0 to 10, .* 11 to 11"):
        run(model, [FIRST + 1])
    assert list(model.state_dict()) == list(keys)
    first.remove()
    first.remove()
    run(model, [FIRST])
    second.remove()
    assert torch.equal(run(model, [1, NULL]), before)
    assert all(torch.equal(t, keys[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(IndexError):
        run(model, [FIRST])


def test_a_model_with_them_can_be_copied_and_pickled(model: Any, make: Any) -> None:
    with attach(model, make("a", ["cat"])):
        wanted = run(model, [FIRST, 2])
        assert torch.equal(run(copy.deepcopy(model), [FIRST, 2]), wanted)
        assert torch.equal(run(pickle.loads(pickle.dumps(model)), [FIRST, 2]), wanted)


def test_gradients_reach_the_rows_that_were_shown_and_no_base_weight(model: Any) -> None:
    task = new_task(model, "prompts", classes=["cat", "dog"])
    with attach(model, task) as attachment:
        attachment.requires_grad_()
        x = torch.randn(2, 4, 8, 8)
        labels = torch.tensor([FIRST + 1, 3])
        model(
            x, timestep=torch.tensor([5, 5]), class_labels=labels
        ).sample.square().sum().backward()
        named = attachment.parameters_of("task")
        assert set(named) == {f"classes.transformer.{TABLE.format(i)}.rows" for i in range(2)}
        for parameter in named.values():
            assert not parameter.grad[0].any()
            assert parameter.grad[1].any()
        assert all(p.grad is None for p in model.parameters())
        with torch.no_grad():
            for parameter in named.values():
                parameter += 1
        attachment.requires_grad_(False)
        trained = attachment.task()
        wanted = run(model, [FIRST])
    assert not task.extras[next(iter(named))].any()
    with attach(model, trained):
        assert torch.equal(run(model, [FIRST]), wanted)


def test_the_file_keeps_names_numbers_and_rows(model: Any, make: Any, tmp_path: Path) -> None:
    task = make("pets", ["cat", "dog"], method="bitfit")
    back = load_task(save_task(task, tmp_path / "pets.safetensors"))
    assert back.classes == {"cat": FIRST, "dog": FIRST + 1}
    assert back.new_classes == ("cat", "dog")
    assert back.components == ("transformer",)
    assert not back.is_control
    assert all(torch.equal(t, task.extras[n]) for n, t in back.extras.items())
    assert "'cat' 11 (new), 'dog' 12 (new)" in describe(back)
    alone = load_task(save_task(make("only", ["cat"]), tmp_path / "only.safetensors"))
    assert "none (new classes)" in describe(alone)
    with attach(model, back):
        changed = run(model, [FIRST])
    with attach(model, task):
        assert torch.equal(run(model, [FIRST]), changed)


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """The file with another header, its bytes untouched."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    config = json.loads(header["__metadata__"]["diffscaler.config"])
    change(header, config)
    header["__metadata__"]["diffscaler.config"] = json.dumps(config)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])
    return path


KEY = f"classes.transformer.{TABLE.format(0)}.rows"


def renamed(header: dict[str, Any], new: str) -> None:
    header[new] = header.pop(KEY)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda h, c: c.pop("class_table"), "says nothing of new classes"),
        (lambda h, c: c.update(classes=["cat"]), "config entry 'classes'"),
        (lambda h, c: c.update(classes={"cat": 11.0, "dog": 12}), "config entry 'classes'"),
        (lambda h, c: c.update(classes={"cat": 11, "dog": 11}), "numbers 2 new classes"),
        (lambda h, c: c.update(classes={"cat": 11}), "numbers 1 new classes"),
        (lambda h, c: c.update(classes={"cat": 11, "dog": 13}), "numbers 2 new classes"),
        (lambda h, c: c.update(class_table={"size": 11, "start": 11}), "from class 11"),
        (lambda h, c: c.update(class_table={"size": True, "start": 1}), "'class_table'"),
        (lambda h, c: h[KEY].update(shape=[2 * 16]), "1 dimensions, not 2"),
        (lambda h, c: h[KEY].update(shape=[1, 32]), "rows for 1 or 2"),
        (lambda h, c: renamed(h, "classes.elsewhere.table.rows"), "tensors no task has"),
        (lambda h, c: renamed(h, KEY.replace(".rows", ".scale")), "tensors no task has"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    make: Any, tmp_path: Path, change: Any, told: str
) -> None:
    path = save_task(make("pets", ["cat", "dog"]), tmp_path / "pets.safetensors")
    with pytest.raises(TaskFileError, match=told):
        load_task(rewritten(path, change))


def test_another_base_is_refused_and_left_alone(model: Any, make: Any) -> None:
    task = make("pets", ["cat"])
    other = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=12,
    )  # fmt: skip
    deeper = type(model).from_config({**model.config, "num_layers": 3})
    unet = diffusers.UNet2DModel(block_out_channels=(32, 32, 32, 32))
    for wrong in (other, deeper, unet):
        with pytest.raises(MismatchError, match="brings classes to a base of 11 in 2 tables"):
            attach(wrong, task)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in wrong.modules())
    with pytest.raises(DiffScalerError, match="UNet2DModel is told no class numbers"):
        new_task(unet, classes=["cat"])
    with pytest.raises(DiffScalerError, match="has classes 'cat' already"):
        with_classes(task, model, ["cat"])
    started = make("b", ["dog"], class_start=3)
    with pytest.raises(MismatchError, match="start from different classes"):
        attach(model, {"a": task, "b": started})
    with attach(model, task) as attachment:
        for clash in (lambda: attach(model, started), lambda: attachment.add(model, "b", started)):
            with pytest.raises(MismatchError, match="start from class 3 cannot act beside"):
                clash()
        assert attachment.names == ("pets",)
        run(model, [FIRST])


def test_more_classes_follow_the_first(model: Any, make: Any) -> None:
    task = make("pets", ["cat"])
    more = with_classes(task, model, ["dog", "elk"])
    assert more.new_classes == ("cat", "dog", "elk")
    with attach(model, task):
        cat = run(model, [FIRST])
    with attach(model, more):
        torch.testing.assert_close(run(model, [FIRST]), cat)
        assert torch.equal(run(model, [FIRST + 2]), run(model, [NULL]))


def test_combined_tasks_number_their_classes_anew(model: Any, make: Any) -> None:
    one, two = make("one", ["cat", "dog"], 1), make("two", ["elk"], 2)
    both = combine_tasks([one, make("plain", [], 3, method="bitfit"), two], [0.5, 0.0, 2.0])
    assert both.classes == {"cat": FIRST, "dog": FIRST + 1, "elk": FIRST + 2}
    wanted = []
    for task, weight, label in ((one, 0.5, FIRST + 1), (two, 2.0, FIRST)):
        with attach(model, task, weight):
            wanted.append(run(model, [label])[0])
    with attach(model, both):
        torch.testing.assert_close(run(model, [FIRST + 1, FIRST + 2]), torch.stack(wanted))
    with pytest.raises(DiffScalerError, match="both have 'cat'; stack the tasks"):
        combine_tasks([one, make("three", ["cat"], 3)])
    with pytest.raises(DiffScalerError, match="their tables differ"):
        combine_tasks([one, make("three", ["elk"], 3, class_start=2)])
    half = scale_task(one, 0.5)
    with attach(model, half):
        torch.testing.assert_close(run(model, [FIRST + 1])[0], wanted[0])


def test_a_unet_of_classes_says_which_class_they_start_from() -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=5, attention_head_dim=4,
    ).eval()  # fmt: skip
    with pytest.raises(DiffScalerError, match="say which with class_start"):
        new_task(unet, classes=["cat"])
    task = moved(new_task(unet, "prompts", classes=["cat"], class_start=2))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 5])

    def drawn(*labels: int) -> Tensor:
        with torch.no_grad():
            return unet(x[: len(labels)], t[: len(labels)], torch.tensor(labels)).sample

    before = drawn(2, 4)
    with attach(unet, task) as attachment:
        assert not torch.equal(drawn(5, 4)[0], before[0])
        torch.testing.assert_close(drawn(5, 4)[1], before[1])
        attachment.set_weights(0.0)
        assert torch.equal(drawn(5, 4), before)


@pytest.fixture
def pipe(cases: Any) -> Any:
    pipe = cases["dit"].pipe()
    pipe.load_diffscaler(moved(new_task(pipe.transformer, rank=2, name="a", classes=["cat"]), 1))
    pipe.load_diffscaler(moved(new_task(pipe.transformer, rank=2, name="b", classes=["elk"]), 2))
    return pipe


def drawn(pipe: Any, labels: list[int], **call: Any) -> Tensor:
    settings = {"num_inference_steps": 2, "output_type": "np", "guidance_scale": 4.0, **call}
    generator = [torch.Generator().manual_seed(7) for _ in labels]
    return torch.from_numpy(pipe(labels, generator=generator, **settings).images)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_ditpipeline_draws_new_classes_with_guidance(pipe: Any, guidance: float) -> None:
    scale = {"guidance_scale": guidance}
    pipe.set_diffscaler("a")
    alone = drawn(pipe, [1001, 4], **scale)
    pipe.set_diffscaler("b")
    other = drawn(pipe, [1001], **scale)
    with pipe.diffscaler_rows(["a", "b", "a", None]):
        mixed = drawn(pipe, [1001, 1001, 4, 1001], **scale)
    pipe.disable_diffscaler()
    null = drawn(pipe, [1001], **scale)
    pipe.unload_diffscaler()
    torch.testing.assert_close(drawn(pipe, [1000], **scale), null, rtol=0, atol=0)
    for place, wanted in ((0, alone[0]), (1, other[0]), (2, alone[1]), (3, null[0])):
        torch.testing.assert_close(mixed[place], wanted, atol=2e-3, rtol=0)
    assert not torch.allclose(alone[0], null[0], atol=2e-3)
    with pytest.raises(IndexError):
        drawn(pipe, [1001])


def test_a_pipeline_saves_swaps_and_fuses_them(pipe: Any, tmp_path: Path) -> None:
    pipe.save_diffscaler(tmp_path, "b")
    saved = load_task(tmp_path / "diffscaler.safetensors")
    assert saved.new_classes == ("elk",)
    before = drawn(pipe, [1001])
    pipe.load_diffscaler(moved(saved, 5), "b", hotswap=True)
    assert not torch.allclose(drawn(pipe, [1001]), before, atol=2e-3)
    pipe.load_diffscaler(saved, "b", hotswap=True)
    torch.testing.assert_close(drawn(pipe, [1001]), before, atol=1e-5, rtol=0)
    more = new_task(pipe.transformer, rank=2, name="c", classes=["x", "y"])
    with pytest.raises(MismatchError, match="count of new classes is 2, not 1"):
        pipe.load_diffscaler(more, "b", hotswap=True)
    flat = moved(new_task(pipe.transformer, "scale_shift", name="f", classes=["fox"]), 3)
    pipe.load_diffscaler(flat)
    loose = drawn(pipe, [1001])
    with pytest.raises(DiffScalerError, match="its new classes"):
        pipe.fuse_diffscaler()
    pipe.fuse_diffscaler(partial=True)
    torch.testing.assert_close(drawn(pipe, [1001]), loose, atol=2e-3, rtol=0)
    pipe.unfuse_diffscaler()
    torch.testing.assert_close(drawn(pipe, [1001]), loose, atol=1e-5, rtol=0)


def test_compiled_code_follows_every_switch(model: Any, make: Any) -> None:
    dynamo.reset()
    tables = [block.norm1.emb.class_embedder for block in model.transformer_blocks]
    labels = torch.tensor([FIRST, 2, FIRST + 1])
    with attach(model, {"a": make("a", ["cat", "dog"], 1), "b": make("b", ["elk"], 2)}) as both:
        fast = torch.compile(tables[0], backend="eager", fullgraph=True)
        both.set_weights({"a": 0.5})
        with torch.no_grad():
            fast(labels)
            count = dynamo.utils.counters["stats"]["unique_graphs"]
            for i in range(20):
                both.set_weights({"a": 0.1 * i, "b": 1.0 - 0.1 * i})
                torch.testing.assert_close(fast(labels), tables[0](labels))
            assert dynamo.utils.counters["stats"]["unique_graphs"] == count
    dynamo.reset()

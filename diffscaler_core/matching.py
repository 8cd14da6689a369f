"""A task's layers found on a model, all of them or one error. Reads foreign models only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from .affiner import affiner_from
from .classes import ClassRows, ClassStack, class_tables
from .control import ControlStack
from .errors import DiffScalerError, MismatchError, first_names
from .families import TokenForm, row_layout, token_form
from .stack import AffinerStack
from .targets import as_target, bias_of, geometry_of, resolve
from .task import TaskAdapter
from .tokens import Embedding

#: Layers that diffusers' `fuse_qkv_projections` takes out of use.
QKV = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


class Fitted(NamedTuple):
    """Tasks on one model, ready to be hung on it.

    Attributes:
        stacks: Layer -> its stack.
        modules: Layer -> the model's module.
        controls: Patch embedding -> its stack.
        embeddings: Patch embedding -> the model's module.
        classes: Table of class embeddings -> its stack.
        tables: Table of class embeddings -> the model's module.
    """

    stacks: dict[str, AffinerStack]
    modules: dict[str, nn.Module]
    controls: dict[str, ControlStack]
    embeddings: dict[str, nn.Module]
    classes: dict[str, ClassStack]
    tables: dict[str, nn.Module]


def fit(model: nn.Module, tasks: Mapping[str, TaskAdapter], component: str) -> Fitted:
    """Returns new stacks for all layers of all tasks on a model, which stays as it is.

    Raises:
        MismatchError: A task does not fit, or none adapts this component.
    """
    layers = {name: task.component_layers(component) for name, task in tasks.items()}
    controls = {name: task.control_layers(component) for name, task in tasks.items()}
    rows = {name: task.class_rows(component) for name, task in tasks.items()}
    there = dict.fromkeys(c for task in tasks.values() for c in task.components)
    if there and not any(layers[name] or controls[name] or rows[name] for name in tasks):
        raise MismatchError(
            f"the tasks {list(tasks)} adapt {', '.join(there)}, none of them {component!r}"
        )
    modules = match_layers(model, tasks, layers)
    embeddings = match_embeddings(model, tasks, controls)
    classes = match_classes(model, tasks, rows)
    own = type(model).__name__
    return Fitted(
        build_stacks(tasks, layers, modules, own, component),
        modules,
        build_controls(tasks, controls, embeddings, own),
        embeddings,
        classes,
        {name: cast(nn.Module, resolve(model, name)) for name in classes},
    )


def match_layers(
    model: nn.Module,
    tasks: Mapping[str, TaskAdapter],
    layers: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
) -> dict[str, nn.Module]:
    """Returns the module of every layer of every task, or raises one error with all misfits."""
    modules: dict[str, nn.Module] = {}
    for task_name, own in layers.items():
        missing, wrong, fused = [], [], []
        seen: dict[int, str] = {}
        for name, tensors in own.items():
            module = resolve(model, name)
            target = None if module is None else as_target(name, module)
            if module is None or target is None:
                missing.append(name)
                continue
            if not fits(tensors, target.shape):
                wrong.append(f"{name} is {'x'.join(map(str, target.shape))}")
            if seen.setdefault(id(module), name) != name:
                wrong.append(f"{name} is the same module as {seen[id(module)]}")
            if _is_fused(model, name):
                fused.append(name)
            modules[name] = module
        _raise_misfit(model, tasks[task_name], len(own), missing, wrong, fused)
    return modules


def fits(tensors: Mapping[str, Tensor], shape: Sequence[int]) -> bool:
    """Says whether a layer's tensors belong on a target of shape (C_out, C_in, *kernel)."""
    out_features, *window = shape
    up, down = tensors.get("up"), tensors.get("down")
    vectors = [tensors[part] for part in ("scale", "shift") if part in tensors]
    if any(v.shape != (out_features,) for v in vectors):
        return False
    if up is None or down is None:
        return up is down
    return list(down.shape[1:]) == window and up.shape == (out_features, down.shape[0])


def build_stacks(
    tasks: Mapping[str, TaskAdapter],
    layers: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
    modules: Mapping[str, nn.Module],
    class_name: str = "",
    component: str = "transformer",
) -> dict[str, AffinerStack]:
    """Returns one stack per module, holding the affiners of every task that has that layer."""
    names = list(tasks)
    windows = {name: task.component_windows(component) for name, task in tasks.items()}
    stacks: dict[str, AffinerStack] = {}
    for layer, module in modules.items():
        here = [name for name in names if layer in layers[name]]
        bias_counts = any(
            "scale" in layers[name][layer] and not tasks[name].info.get("scale_includes_bias")
            for name in here
        )
        stacks[layer] = AffinerStack(
            layer,
            [
                affiner_from(layers[name][layer], tasks[name].info, windows[name].get(layer))
                for name in here
            ],
            [names.index(name) for name in here],
            bias_of(layer, module) if bias_counts else None,
            geometry_of(module),
            row_layout(class_name, layer),
        )
    return stacks


def match_embeddings(
    model: nn.Module,
    tasks: Mapping[str, TaskAdapter],
    layers: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
) -> dict[str, nn.Module]:
    """Returns the patch embedding of every control task, or raises one error with all misfits."""
    return match_layers(model, tasks, {name: own for name, own in layers.items() if own})


def build_controls(
    tasks: Mapping[str, TaskAdapter],
    layers: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
    modules: Mapping[str, nn.Module],
    class_name: str = "",
) -> dict[str, ControlStack]:
    """Returns one stack per patch embedding, with the control affiner of every task that has one.

    Args:
        tasks: All tasks attached.
        layers: Task -> embedding -> tensors of its control affiner.
        modules: Embedding -> module.
        class_name: The model's, for how its tokens lie.
    """
    names = list(tasks)
    stacks: dict[str, ControlStack] = {}
    for layer, module in modules.items():
        here = [name for name in names if layer in layers.get(name, {})]
        stacks[layer] = ControlStack(
            embedding_at(layer, module, token_form(class_name)),
            [affiner_from(layers[name][layer], tasks[name].control_facts) for name in here],
            [names.index(name) for name in here],
            bias_of(layer, module),
            geometry_of(module),
        )
    return stacks


def match_classes(
    model: nn.Module,
    tasks: Mapping[str, TaskAdapter],
    rows: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, ClassStack]:
    """Returns one stack per table of class embeddings, with the rows of every task that has some.

    Raises:
        MismatchError: The model's tables are others, or tasks start from different classes.
    """
    bringing = {name: own for name, own in rows.items() if own}
    if not bringing:
        return {}
    tables = {table.name: table for table in class_tables(model)}
    start: dict[int, str] = {}
    for name, own in bringing.items():
        facts = tasks[name].info.get("class_table") or {}
        fits = own.keys() == tables.keys() and all(
            table.size == facts.get("size") and own[n].shape[1] == table.width
            for n, table in tables.items()
        )
        if not fits:
            raise MismatchError(
                f"task {tasks[name].name!r} brings classes to a base of {facts.get('size')} in "
                f"{len(own)} tables, this {type(model).__name__} has "
                f"{next((t.size for t in tables.values()), 0)} in {len(tables)}: attach it to the "
                f"base it was made for"
            )
        start.setdefault(int(facts.get("start", 0)), name)
    if len(start) > 1:
        raise MismatchError(
            f"the new classes of {' and '.join(map(repr, start.values()))} start from different "
            f"classes ({', '.join(map(str, start))}): attach them one after the other"
        )
    names, (first,) = list(tasks), start
    return {
        table.name: ClassStack(
            table,
            first,
            [ClassRows(own[table.name]) for own in bringing.values()],
            [names.index(name) for name in bringing],
        )
        for table in tables.values()
    }


def embedding_at(name: str, module: Any, form: TokenForm | None) -> Embedding:
    """Returns what there is to know of a patch embedding; for an unknown family by its layer."""
    geometry, target = geometry_of(module), as_target(name, module)
    assert target is not None  # it has been matched
    if form is None:
        form = TokenForm("nchw" if geometry is not None else "patchified")
    return Embedding(name, target.in_features, () if geometry is None else geometry.stride, form)


def _is_fused(model: nn.Module, name: str) -> bool:
    """Says whether diffusers' `fuse_qkv_projections` made this q, k or v layer a dead one."""
    parent, _, leaf = name.rpartition(".")
    owner = resolve(model, parent) if parent else model
    return owner is not None and leaf in QKV and has_fused_qkv(owner)


def has_fused_qkv(attention: Any) -> bool:
    """Says whether an attention of diffusers now runs without its q, k and v layers.

    Its older `Attention` keeps the mark for ever; there the processor tells.
    """
    if not getattr(attention, "fused_projections", False):
        return False
    if type(attention).__name__ != "Attention":
        return True
    return type(getattr(attention, "processor", None)).__name__.startswith("Fused")


def _raise_misfit(
    model: nn.Module,
    task: TaskAdapter,
    count: int,
    missing: Sequence[str],
    wrong: Sequence[str],
    fused: Sequence[str],
) -> None:
    if fused:
        raise DiffScalerError(
            f"{type(model).__name__} had its qkv projections fused, so {len(fused)} layers of task "
            f"{task.name!r} are never called (first {first_names(fused, 1)}); call "
            f"unfuse_qkv_projections() before attaching"
        )
    if not missing and not wrong:
        return
    base = task.info.get("base") or {}
    made_for = f"{base.get('family', 'an unknown base')} ({base.get('class', 'unknown class')})"
    problems = []
    if missing:
        problems.append(f"{len(missing)} layers missing, first {first_names(missing)}")
    if wrong:
        problems.append(f"{len(wrong)} misfit, first {first_names(wrong)}")
    raise MismatchError(
        f"task {task.name!r}, made for {made_for} with {count} layers, does not fit this "
        f"{type(model).__name__}: {'; '.join(problems)}; attach it to the base it was made for"
    )

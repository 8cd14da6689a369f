"""A task as a few lines of text, for a node and for the command line alike."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from .errors import printable
from .families import FAMILIES
from .methods import METHODS
from .task import TaskAdapter

#: More classes than these are counted.
_SHOWN_CLASSES = 12


def describe(task: TaskAdapter) -> str:
    """Returns what there is to know about a task, one fact a line; without what nobody recorded."""
    rows = [(label, text) for label, text in _rows(task) if text]
    width = max(len(label) for label, _ in rows)
    indent = "\n" + " " * (width + 2)
    return "\n".join(
        f"{label:<{width}}  {printable(text).strip().replace(chr(10), indent)}"
        for label, text in rows
    )


def _rows(task: TaskAdapter) -> Iterator[tuple[str, str]]:
    info, spec = task.info, task.modelspec
    yield "task", task.name
    yield "title", "" if spec.get("title") == task.name else spec.get("title", "")
    yield "description", spec.get("description", "")
    yield "author", spec.get("author", "")
    yield "license", str(info.get("license") or spec.get("license") or "")
    yield "made for", _base(info.get("base") or {})
    yield "method", _method(task)
    alone = "new classes" if task.new_classes else "stored prompts only"
    alone = "control alone" if task.is_control else alone
    yield "layers", str(len(task.layers)) if task.layers else f"none ({alone})"
    yield "rank", _rank(task)
    yield "noise levels", _windows(task)
    yield "parameters", f"{task.num_parameters:,}"
    yield "size", f"{in_bytes(task.nbytes)} ({_dtypes(task)})"
    yield "prompts", ", ".join(map(repr, task.prompts))
    yield "classes", _classes(task)
    yield "resolution", _resolution(info.get("resolution"))
    yield "trigger", str(info.get("trigger") or "")
    yield "control", _control(info.get("control") or {})
    yield "combined from", _sources(info.get("combined_from") or ())
    yield "average of", _sources(info.get("averaged_from") or ())
    yield "extracted", _pairs(info.get("extracted") or {})
    yield "training", _pairs(info.get("training") or {})
    yield "created", str(info.get("created") or spec.get("date") or "")


def family_title(base: Mapping[str, Any]) -> str:
    """Returns the name for people of the family that a task's facts of its base name."""
    family = FAMILIES.get(str(base.get("family")))
    return family.title if family else str(base.get("family", "an unknown base"))


def _base(base: dict[str, Any]) -> str:
    name = family_title(base)
    facts = [str(base[key]) for key in ("class", "fingerprint") if base.get(key)]
    return f"{name} ({', '.join(facts)})" if facts else name


def _method(task: TaskAdapter) -> str:
    name = str(task.info.get("method", "diffscaler"))
    parts = list(task.info.get("parts", ()))
    if "subspace" in parts:
        parts[parts.index("subspace")] = f"{task.info.get('activation', 'relu')} subspace"
    source = METHODS[name].source if name in METHODS else ""
    text = f"{name}: {', '.join(parts)}" if parts else name
    if "gamma_blocks" in task.info:
        text += f" (γ: {str(task.info['gamma_blocks']).replace('_', ' ')} of the blocks)"
    return f"{text} [{source}]" if source else text


def _classes(task: TaskAdapter) -> str:
    """Returns the classes with their numbers, and which of them the task brings."""
    new = task.new_classes
    told = [f"{n!r} {number}{' (new)' * (n in new)}" for n, number in task.classes.items()]
    shown = told if len(told) <= _SHOWN_CLASSES else told[:_SHOWN_CLASSES]
    return ", ".join(shown) + (
        f" and {len(told) - len(shown)} more" if len(told) > len(shown) else ""
    )


def _resolution(factor: object) -> str:
    if not isinstance(factor, (int, float)):
        return ""
    return f"{factor:g} times the base's, with its positions stretched (at_resolution)"


def _control(facts: dict[str, Any]) -> str:
    """Returns what the control pictures show, and how they are embedded."""
    if not facts:
        return ""
    embedding, rank = facts.get("embedding", "affiner"), facts.get("rank")
    how = {
        "affiner": f"the base's own embedding, {facts.get('activation', 'relu')} subspace",
        "copy": "a copy of the base's embedding",
    }.get(str(embedding), str(embedding))
    of_rank = f" of rank {rank}" if rank is not None and embedding != "copy" else ""
    return f"{facts.get('kind', 'pictures')}, through {how}{of_rank}"


def _windows(task: TaskAdapter) -> str:
    """Returns how hidden units are shared out among noise levels."""
    windows = task.windows
    if windows is None:
        return ""
    plan = windows.plan
    how = {
        "experts": "an expert for each",
        "sliding": "a window that slides over the hidden units (α {alpha:g}, β {beta:g})",
    }.get(str(plan.get("kind")), "hidden units of their own")
    told = {"alpha": plan.get("alpha", 0), "beta": plan.get("beta", 0)}
    edges = [f"{edge:g}" for edge in windows.edges]
    shown = edges if len(edges) <= _SHOWN_CLASSES else [edges[0], "…", edges[-1]]
    return f"{len(edges) + 1} ranges, cut at log-SNR {', '.join(shown)}: {how.format(**told)}"


def _rank(task: TaskAdapter) -> str:
    return span([len(tensors["down"]) for tensors in task.layers.values() if "down" in tensors])


def span(ranks: Collection[int]) -> str:
    """Returns ranks in short: "8", "4 to 16" where they differ, "" if there are none."""
    if not ranks:
        return ""
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"


def _dtypes(task: TaskAdapter) -> str:
    names = dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in task.tensors)
    return ", ".join(names) or "empty"


def in_bytes(count: int) -> str:
    """Returns a number of bytes as people read it: "1.5 MiB"."""
    if count < 1024:
        return f"{count} bytes"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    raise AssertionError


def _sources(sources: Any) -> str:
    return ", ".join(f"{one.get('name')} × {one.get('weight', 1):g}" for one in sources)


def _pairs(facts: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_value(value)}" for key, value in facts.items() if value is not None)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {_value(v)}" for k, v in value.items()) + ")"
    return str(value)

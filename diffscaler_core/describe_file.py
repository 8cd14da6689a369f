"""Any safetensors file as text or plain values, by its header alone: no tensor is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .describe import describe, family_title, in_bytes, span
from .errors import printable
from .files import outline_task, read_info
from .foreign import FileFacts, file_facts


def describe_file(path: str | Path, layers: bool = False) -> str:
    """Returns what a file is, one fact a line.

    Args:
        path: A task, an adapter of another kind, a checkpoint: any safetensors file.
        layers: Also name every adapted layer with its rank.

    Raises:
        TaskFileError: Not safetensors, cut short, or a broken task.
        FileNotFoundError: No such file.
    """
    facts = file_facts(path)
    if facts.kind.name == "task":
        text = describe(outline_task(path))
    else:
        rows = [(label, said) for label, said in _rows(facts) if said]
        width = max(len(label) for label, _ in rows)
        text = "\n".join(f"{label:<{width}}  {_line(said)}" for label, said in rows)
    if layers:
        text += "".join(f"\n  {_line(name)}: rank {rank}" for name, rank in facts.ranks.items())
    return text


def file_values(path: str | Path, layers: bool = False) -> dict[str, Any]:
    """Returns what `describe_file` tells as plain values; of a task, its facts.

    Raises:
        TaskFileError, FileNotFoundError: As in `describe_file`.
    """
    facts = file_facts(path)
    values: dict[str, Any] = {"file": facts.name, "kind": facts.kind.name}
    if facts.kind.name == "task":
        values |= read_info(path)
        values["modelspec"] = {k: v for k, v in values["modelspec"].items() if k != "thumbnail"}
    else:
        values |= {
            "family": facts.family,
            "naming": facts.naming,
            "layers": facts.layers,
            "tensors": facts.tensors,
            "parameters": facts.parameters,
            "bytes": facts.bytes,
            "dtypes": dict(facts.dtypes),
            "rank": rank_text(facts),
            "parts": list(facts.parts),
            "can": facts.kind.can,
        }
    if layers:
        values["ranks_by_layer"] = dict(facts.ranks)
    return values


def file_row(path: str | Path) -> tuple[str, ...]:
    """Returns (file, kind, made for, rank, layers, parameters, size, dtypes) for a table.

    Raises:
        TaskFileError, FileNotFoundError: As in `describe_file`.
    """
    facts = file_facts(path)
    family, count = facts.family_title, facts.parameters
    if facts.kind.name == "task":
        task = outline_task(path)
        base = task.info.get("base") or {}
        family, count = family_title(base), task.num_parameters
    layers = str(facts.layers) if facts.layers else ""
    numbers = (rank_text(facts), layers, f"{count:,}", in_bytes(facts.bytes))
    told = (facts.name, facts.kind.title, family, *numbers, _dtypes(facts))
    return tuple(map(_line, told))


def rank_text(facts: FileFacts) -> str:
    """Returns an adapter's rank, "4 to 16" where layers differ, "" without any."""
    return span(facts.ranks.values())


def _line(text: str) -> str:
    """Returns a text as a line that a terminal can be shown."""
    return " ".join(printable(text).splitlines())


def _rows(facts: FileFacts) -> Iterator[tuple[str, str]]:
    yield "file", facts.name
    yield "kind", facts.kind.title
    yield "family", facts.family_title
    yield "names", facts.naming
    yield "also holds", ", ".join(facts.parts)
    yield "layers", str(facts.layers) if facts.layers else ""
    yield "rank", _ranks(facts)
    yield "tensors", f"{facts.tensors:,}"
    yield "parameters", f"{facts.parameters:,}"
    yield "size", f"{in_bytes(facts.bytes)} ({_dtypes(facts)})"
    title = facts.metadata.get("modelspec.title") or facts.metadata.get("ss_output_name", "")
    yield "title", title[:200]
    yield "use", facts.kind.can


def _ranks(facts: FileFacts) -> str:
    counts = Counter(facts.ranks.values()).most_common(4)
    if len(counts) < 2:
        return rank_text(facts)
    told = ", ".join(f"{rank} in {count} layers" for rank, count in counts)
    return f"{rank_text(facts)} ({told}{', …' if len(set(facts.ranks.values())) > 4 else ''})"


def _dtypes(facts: FileFacts) -> str:
    shares = [(dtype, share) for dtype, share in facts.dtypes.items() if share >= 0.0005]
    if len(shares) < 2:
        return "".join(dtype for dtype, _ in shares) or "empty"
    return ", ".join(f"{dtype} {share:.1%}" for dtype, share in shares)

"""A data set in parts, one for each expert: by likeness, or as its folders say.

"Decentralized Diffusion Models" (arXiv:2501.05450) clusters pictures by features of DINOv2 with
k-means. Here the features may be the base's own (`features.py`), so that no second network is
needed: that is ours. Pictures stay where they are: a part is a list of files, of the kind that
`train` reads, and a `train.toml` names them all, so that one run trains all experts. Each of them
sees its own part alone, so they may as well be trained on machines that never meet.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..atomic import write_whole
from ..errors import DiffScalerError, first_names
from ..file_names import harmless
from ..training.data.sources import PROMPT_KEYS, Example
from .clusters import Clusters

#: Beside the parts: a configuration that `train` takes.
CONFIG = "train.toml"


def by_folder(examples: Sequence[Example]) -> dict[str, list[int]]:
    """Returns which pictures lie in which sub-folder: name -> their numbers.

    Raises:
        DiffScalerError: There are not two sub-folders with pictures, or pictures beside them.
    """
    parts: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        head, slash, _ = example.name.partition("/")
        parts.setdefault(head if slash else "", []).append(i)
    if "" in parts or len(parts) < 2:
        raise DiffScalerError(
            f"to be cut by its folders, the data must lie in two or more sub-folders and nowhere "
            f"else; found {len(parts.get('', []))} pictures beside "
            f"{len(parts) - ('' in parts)} sub-folders; or give a number of parts"
        )
    return parts


def by_cluster(clusters: Clusters) -> dict[str, list[int]]:
    """Returns which pictures are in which cluster: "part1", "part2"… -> their numbers."""
    count = len(clusters.centres)
    return {
        f"part{k + 1}": (clusters.labels == k).nonzero().flatten().tolist() for k in range(count)
    }


def write_parts(
    folder: str | Path,
    examples: Sequence[Example],
    parts: Mapping[str, Sequence[int]],
    base: str,
) -> dict[str, Path]:
    """Writes a list of files for each part, and a configuration that trains them all at once.

    Args:
        folder: Where to.
        examples: All pictures, which must be files.
        parts: From `by_folder` or `by_cluster`.
        base: What to train on, for the configuration.

    Raises:
        DiffScalerError: A picture is no file of its own, a part is empty, or two would have one
            name.
    """
    folder = Path(folder)
    odd = [one.name for one in examples if not isinstance(one.source, Path)]
    if odd:
        raise DiffScalerError(
            f"parts are lists of files, and {len(odd)} pictures are none: {first_names(odd)}"
        )
    names = {part: harmless(part) for part in parts}
    empty = [part for part, own in parts.items() if not own]
    if empty or len({name.casefold() for name in names.values()}) < len(names):
        raise DiffScalerError(
            f"the part {empty[0]!r} is empty"
            if empty
            else f"two of the parts {first_names(parts)} would be one file; rename a folder"
        )
    written = {}
    for part, own in parts.items():
        lines = [_line(examples[i], folder) for i in own]
        written[part] = folder / f"{names[part]}.jsonl"
        write_whole(written[part], "".join(lines).encode())
    write_whole(folder / CONFIG, _config(folder, base, written).encode())
    return written


def _line(example: Example, folder: Path) -> str:
    assert isinstance(example.source, Path)
    path = _from(example.source, folder)
    return (
        json.dumps({"file_name": path, PROMPT_KEYS[0]: example.prompt}, ensure_ascii=False) + "\n"
    )


def _from(path: Path, folder: Path) -> str:
    """Returns a path as seen from a folder, or as it is if they share no drive."""
    try:
        return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()
    except ValueError:
        return path.absolute().as_posix()


def _config(folder: Path, base: str, lists: Mapping[str, Path]) -> str:
    """Returns the configuration: JSON's texts are TOML's too."""
    lines = [f"base = {json.dumps(base)}", f"folder = {json.dumps((folder / 'run').as_posix())}"]
    for part, path in lists.items():
        out = path.with_suffix(".safetensors")
        lines += [
            "\n[[tasks]]",
            f"name = {json.dumps(part, ensure_ascii=False)}",
            f"data = {json.dumps(path.as_posix(), ensure_ascii=False)}",
            f"out = {json.dumps(out.as_posix(), ensure_ascii=False)}",
        ]
    return "\n".join(lines) + "\n"

"""How many parameters every method has on published models at full size. Exact: nothing is timed.

    python benchmarks/census.py    # writes benchmarks/census.json; a minute, no weights, no GPU

The models are built on the meta device, so that no weight is ever allocated. Needs the extras
`diffusers`, `peft` and `cli`. PEFT's own methods are counted by PEFT itself, on the same layers.
`--markdown` prints the table of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import runpy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from diffscaler_core import METHODS, TaskAdapter, find_targets, new_task

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).with_suffix(".json")
_PUBLISHED = runpy.run_path(str(ROOT / "tests" / "comfy" / "full_size.py"))["FULL_SIZE"]
#: Of huggingface.co/facebook/DiT-XL-2-256. This class has a class embedding in every block.
_DIT: dict[str, Any] = dict(
    num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28,
    attention_bias=True, sample_size=32, patch_size=2, activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000, norm_elementwise_affine=False,
)  # fmt: skip
#: Name -> diffusers' class and its published configuration.
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "DiT-XL/2": ("DiTTransformer2DModel", _DIT),
    "PixArt-Σ": _PUBLISHED["pixart_sigma"][:2],
    "SD3-medium": _PUBLISHED["sd3_medium"][:2],
    "FLUX.1-dev": _PUBLISHED["flux1_dev"][:2],
    "SDXL": _PUBLISHED["sdxl"][:2],
}
PRESETS = ("blocks", "all")
RANKS = (1, 2, 4, 8, 16, 32)


class Row(NamedTuple):
    """One method on one base.

    Attributes:
        base: A name in BASES.
        targets: A preset.
        layers: How many layers the method has parameters on.
        method: Its name; PEFT's own have "peft " before it.
        rank: R, or OFT's block size; 0 where there is none.
        parameters: How many numbers are trained.
        percent: Of the base's parameters.
        bytes_fp32: Bytes of a file with 32-bit numbers, without its header.
        bytes_bf16: The same with 16 bits.
    """

    base: str
    targets: str
    layers: int
    method: str
    rank: int
    parameters: int
    percent: float
    bytes_fp32: int
    bytes_bf16: int


def build(name: str) -> nn.Module:
    """Returns a base on the meta device."""
    kind, config = BASES[name]
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, kind)(**config)
    return model


def size_of(model: nn.Module) -> int:
    """Returns how many parameters a base has."""
    return sum(p.numel() for p in model.parameters())


def ours(model: nn.Module, targets: str) -> Iterator[tuple[str, int, int, int]]:
    """Yields (method, rank, layers, parameters) of everything in METHODS."""
    for name, method in METHODS.items():
        if not method.parts:
            continue
        task = new_task(model, name, 1, targets)
        for rank in RANKS if "subspace" in method.parts else (0,):
            yield name, rank, len(task.layers), at_rank(task, rank)


def at_rank(task: TaskAdapter, rank: int) -> int:
    """Returns how many parameters a task of rank 1 has at another rank, capped as by `new_task`."""
    count = 0
    for tensors in task.layers.values():
        count += sum(tensors[part].numel() for part in ("scale", "shift") if part in tensors)
        if "down" in tensors:
            inner, outer = tensors["down"].numel(), tensors["up"].numel()
            count += min(rank, inner, outer) * (inner + outer)
    return count


def theirs(name: str, targets: str) -> Iterator[tuple[str, int, int, int]]:
    """Yields the same of PEFT's methods on the same layers, as PEFT counts them."""
    names = [target.name for target in find_targets(build(name), targets)]
    configs: dict[str, tuple[int, Any]] = {
        "lora": (8, peft.LoraConfig(r=8, target_modules=names)),
        "dora": (8, peft.LoraConfig(r=8, target_modules=names, use_dora=True)),
        "oft": (32, peft.OFTConfig(r=0, oft_block_size=32, target_modules=names)),
        "ia3": (0, peft.IA3Config(target_modules=names, feedforward_modules=[])),
    }
    for method, (rank, config) in configs.items():
        model = peft.get_peft_model(build(name), config, low_cpu_mem_usage=True)
        parameters, _ = model.get_nb_trainable_parameters()
        yield f"peft {method}", rank, len(model.targeted_module_names), parameters


def census(name: str) -> Iterator[Row]:
    """Yields every row of one base."""
    model = build(name)
    whole = size_of(model)
    yield _row(name, "all", len(find_targets(model, "all")), "full fine-tuning", 0, whole, whole)
    for targets in PRESETS:
        for method, rank, layers, parameters in (*ours(model, targets), *theirs(name, targets)):
            yield _row(name, targets, layers, method, rank, parameters, whole)


def _row(
    base: str, targets: str, layers: int, method: str, rank: int, parameters: int, whole: int
) -> Row:
    percent = round(100 * parameters / whole, 4)
    return Row(
        base, targets, layers, method, rank, parameters, percent, 4 * parameters, 2 * parameters
    )


def table(rows: list[Row]) -> Table:
    """Returns all rows, for a terminal."""
    drawn = Table("base", "targets", "method", title="Parameters")
    for title in ("rank", "layers", "parameters", "% of base", "MB fp32", "MB bf16"):
        drawn.add_column(title, justify="right")
    for row in rows:
        numbers = (f"{row.bytes_fp32 / 1e6:,.1f}", f"{row.bytes_bf16 / 1e6:,.1f}")
        drawn.add_row(
            *(row.base, row.targets, row.method, str(row.rank or "–"), str(row.layers)),
            *(f"{row.parameters:,}", f"{row.percent:.3f}", *numbers),
        )
    return drawn


def markdown(rows: list[Row], targets: str = "blocks") -> str:
    """Returns parameters in millions and percent, a column per base, for one preset."""
    bases = list(dict.fromkeys(row.base for row in rows))
    cells: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        if row.targets == targets or row.method == "full fine-tuning":
            cells.setdefault((row.method, row.rank), {})[row.base] = row
    lines = [f"| method, on `{targets}` | {' | '.join(bases)} |", "|---|" + "---|" * len(bases)]
    for (method, rank), own in cells.items():
        label = method + (f", {'block' if method == 'peft oft' else 'rank'} {rank}" if rank else "")
        shown = (_cell(own.get(base)) for base in bases)
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    return "–" if row is None else f"{row.parameters / 1e6:,.2f} M, {row.percent:.2f} %"


def as_json(rows: list[Row]) -> str:
    """Returns the rows as JSON, one to a line, with what counted them."""
    versions: Mapping[str, str] = {"diffusers": diffusers.__version__, "peft": peft.__version__}
    lines = ",\n".join("    " + json.dumps(list(row), ensure_ascii=False) for row in rows)
    head = json.dumps({"versions": versions, "columns": Row._fields}, ensure_ascii=False, indent=2)
    return f'{head[:-2]},\n  "rows": [\n{lines}\n  ]\n}}\n'


def main() -> None:
    """Counts, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--markdown", action="store_true", help="print the table of RESULTS.md")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    rows = [row for name in BASES for row in census(name)]
    options.out.write_text(as_json(rows), encoding="utf-8")
    if options.markdown:
        print("\n\n".join(markdown(rows, targets) for targets in PRESETS))
    else:
        Console().print(table(rows))


if __name__ == "__main__":
    main()

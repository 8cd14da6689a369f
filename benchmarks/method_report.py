"""Tables and pictures of the methods benchmark, from the cells on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from method_bases import WORK, load_base
from method_runs import POCKET, data_of
from method_sets import CONDITIONAL, ROOT, SETS, UNCONDITIONAL
from method_table import ABLATION, ABLATION_SETS, METHODS, ROWS
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from diffscaler_core.autoencoder import vae_decode
from diffscaler_core.pocket import load_vae
from diffscaler_core.training.preview import to_image

Cell = Mapping[str, Any]
TITLES = {"base": "the base as it is", **{key: row.title for key, row in ROWS.items()}}
BASES = {"dit": "transformer", "unet": "U-Net"}
IMAGES = ROOT / "docs" / "images"
RECORD = ROOT / "benchmarks" / "methods.json"


def cells(kind: str = "cells") -> list[Cell]:
    """Returns all cells of a kind ("cells" or "tuning") on disk."""
    paths = sorted((WORK / kind).rglob("*.json"))
    return [json.loads(path.read_text()) for path in paths]


def report() -> None:
    """Prints every table there is data for, writes the record and draws the pictures."""
    done, tuning = _better(cells()), cells("tuning")
    incremental = [json.loads(p.read_text()) for p in sorted((WORK / "incremental").glob("*.json"))]
    RECORD.write_text(_compact({"cells": done, "tuning": tuning, "incremental": incremental}))
    for base in BASES:
        own = [one for one in done if one["base"] == base and one["method"] not in ABLATION]
        if own:
            print(f"\n### {BASES[base]}\n\n{table(base, own)}")
            draw(base, own)
    compared(done)
    print(f"\n### Learning rates\n\n{rates(tuning, done)}")
    for found in incremental:
        print(f"\n### One after another, {BASES[found['base']]}\n\n{forgotten(found)}")
    if any(one["method"] in ABLATION for one in done):
        print(f"\n### Ablation\n\n{ablation(done)}")
        chart(done)


def _better(done: Sequence[Cell]) -> list[Cell]:
    """Returns the cells, of the ablation's the one with the better rate."""
    best: dict[tuple[Any, ...], Cell] = {}
    for one in done:
        place = tuple(one[key] for key in ("base", "method", "set", "seed"))
        place += () if one["method"] in ABLATION else (one["rate"],)
        if place not in best or one["validation"] < best[place]["validation"]:
            best[place] = one
    return list(best.values())


def _compact(record: Mapping[str, Sequence[Cell]]) -> str:
    """Returns JSON with one cell a line, numbers to six digits."""
    parts = []
    for name, own in record.items():
        lines = [json.dumps(_rounded(one)) for one in own]
        parts.append(f"{json.dumps(name)}: [\n" + ",\n".join(lines) + "\n]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return value


def of(done: Sequence[Cell], method: str, name: str, figure: str) -> list[float]:
    """Returns a figure of a method on a set, one per seed."""
    own = [one for one in done if one["method"] == method and one["set"] == name]
    return [one[figure] for one in own if figure in one]


def _spread(values: Sequence[float], digits: str = ".1f") -> str:
    if not values:
        return "–"
    tail = f" ± {format(stdev(values), digits)}" if len(values) > 1 else ""
    return format(fmean(values), digits) + tail


def mean_over(done: Sequence[Cell], method: str, names: Sequence[str], figure: str) -> float | None:
    """Returns the mean over sets of the means over seeds; None if a set is missing."""
    means = [of(done, method, name, figure) for name in names]
    return fmean(fmean(own) for own in means) if all(means) else None


def table(base: str, done: Sequence[Cell]) -> str:
    """Returns the table of one base: Fréchet distances per set, their mean, and the ratio."""
    size = sum(parameter.numel() for parameter in load_base(base).parameters())
    names = tuple(SETS)
    head = ["method", "parameters", "%", *(SETS[n].title for n in names), "mean", "× full"]
    head += ["right class", "validation"]
    full = mean_over(done, "full", names, "fd")
    lines = [head, ["---"] * len(head)]
    for key in ("base", *METHODS):
        own = [one for one in done if one["method"] == key]
        if not own:
            continue
        # without the new classes' rows, which every method has alike
        count = min(one["parameters"] for one in own)
        mean = mean_over(done, key, names, "fd")
        right = mean_over(done, key, CONDITIONAL, "accuracy")
        loss = mean_over(done, key, names, "validation")
        lines.append(
            [
                TITLES[key],
                f"{count:,}",
                f"{100 * count / size:.2f}",
                *(_spread(of(done, key, name, "fd")) for name in names),
                "–" if mean is None else f"**{mean:.1f}**",
                "–" if mean is None or full is None else f"{mean / full:.2f}",
                "–" if right is None else f"{100 * right:.0f} %",
                "–" if loss is None else f"{loss:.4f}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def compared(done: Sequence[Cell]) -> None:
    """Prints how much of full fine-tuning's gain each method has, on each base."""
    print("\n### Share of full fine-tuning's gain\n")
    print("| method | " + " | ".join(BASES.values()) + " |\n|" + "---|" * (len(BASES) + 1))
    for key in METHODS:
        shares = []
        for base in BASES:
            own = [one for one in done if one["base"] == base]
            means = [mean_over(own, each, tuple(SETS), "fd") for each in ("base", key, "full")]
            if any(mean is None for mean in means):
                shares.append("–")
            else:
                before, after, full = (mean or 0.0 for mean in means)
                shares.append(f"{(before - after) / (before - full):.3f}")
        if set(shares) != {"–"}:
            print(f"| {TITLES[key]} | " + " | ".join(shares) + " |")


def rates(tuning: Sequence[Cell], done: Sequence[Cell]) -> str:
    """Returns what was tried for each row, and what was taken."""
    lines = [
        "| base | method | rate: validation loss on the tuning sets | taken |",
        "|---|---|---|---|",
    ]
    for base in BASES:
        for key in METHODS:
            own = [one for one in tuning if one["base"] == base and one["method"] == key]
            tried = sorted({one["rate"] for one in own})
            taken = {one["rate"] for one in done if (one["base"], one["method"]) == (base, key)}
            shown = ", ".join(
                f"{rate:g}: "
                + " / ".join(f"{o['validation']:.4f}" for o in own if o["rate"] == rate)
                for rate in tried
            )
            if tried:
                chosen = ", ".join(f"{rate:g}" for rate in sorted(taken))
                lines.append(f"| {BASES[base]} | {TITLES[key]} | {shown} | {chosen} |")
    return "\n".join(lines)


def forgotten(found: Mapping[str, Any]) -> str:
    """Returns the distances of every set after each arrival, tasks beside full fine-tuning."""
    lines = ["| after | " + " | ".join(SETS[n].title for n in UNCONDITIONAL) + " |"]
    lines.append("|" + "---|" * (len(UNCONDITIONAL) + 1))
    for name in UNCONDITIONAL:
        shown = []
        for seen in UNCONDITIONAL:
            pair = [found[kind].get(name, {}).get(seen) for kind in ("tasks", "full")]
            shown.append("" if pair[0] is None else " / ".join(f"{v:.1f}" for v in pair if v))
        lines.append(f"| {SETS[name].title} | " + " | ".join(shown) + " |")
    gap = found["one batch"]
    return "\n".join(lines) + f"\n\nAll tasks in one batch: {gap:.1e} from each task's own batch."


def ablation(done: Sequence[Cell]) -> str:
    """Returns validation losses and distances of the ablation's rows, base by base."""
    bases = list(dict.fromkeys(one["base"] for one in done if one["base"].startswith("dit")))
    lines = []
    for base in bases:
        own = [one for one in done if one["base"] == base]
        lines += [
            f"\n{base}\n",
            "| row | parameters | "
            + " | ".join(f"{SETS[n].title}: loss | distance" for n in ABLATION_SETS)
            + " |",
        ]
        lines.append("|" + "---|" * (2 + 2 * len(ABLATION_SETS)))
        for key in ("base", *ABLATION, "full"):
            counts = [one["parameters"] for one in own if one["method"] == key]
            if not counts:
                continue
            shown = [
                _spread(of(own, key, name, figure), digits)
                for name in ABLATION_SETS
                for figure, digits in (("validation", ".4f"), ("fd", ".1f"))
            ]
            lines.append(f"| {TITLES[key]} | {min(counts):,} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def chart(done: Sequence[Cell]) -> None:
    """Draws the ablation: validation loss against parameters, one line per kind of row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    own = [one for one in done if one["base"] == "dit"]
    figure, axes = plt.subplots(1, len(ABLATION_SETS), figsize=(9, 3.6), layout="constrained")
    for axis, name in zip(axes, ABLATION_SETS, strict=True):
        for prefix, colour, title in (
            ("sub_relu", "tab:orange", "relu subspace"),
            ("sub_identity", "tab:blue", "identity subspace (LoRA)"),
            ("all_relu", "tab:red", "scale + shift + relu subspace"),
            ("all_identity", "tab:purple", "scale + shift + identity subspace"),
        ):
            keys = [key for key in ABLATION if key.startswith(prefix + "_")]
            points = sorted(
                (fmean(of(own, key, name, "parameters")), fmean(of(own, key, name, "validation")))
                for key in keys
                if of(own, key, name, "validation")
            )
            axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=title)
        for key, marker in (("only_scale", "^"), ("only_shift", "v"), ("only_scale_shift", "s")):
            if of(own, key, name, "validation"):
                at = fmean(of(own, key, name, "parameters"))
                value = fmean(of(own, key, name, "validation"))
                axis.plot(at, value, marker, color="tab:gray", label=TITLES[key])
        if of(own, "full", name, "validation"):
            value = fmean(of(own, "full", name, "validation"))
            axis.axhline(value, color="black", linestyle=":", label="full fine-tuning")
        axis.set(title=SETS[name].title, xscale="log", xlabel="parameters")
    axes[0].set_ylabel("validation loss")
    axes[1].legend(fontsize=7, loc="upper right")
    figure.savefig(IMAGES / "methods_ablation.png", dpi=110)
    plt.close(figure)


def draw(base: str, done: Sequence[Cell], shown: int = 3) -> None:
    """Draws what each method makes of each set: one row per method, a few pictures per set."""
    side, left, top = 48, 190, 20
    names, rows = tuple(SETS), ["set", "base", *METHODS]
    rows = [k for k in rows if k == "set" or any(one["method"] == k for one in done)]
    width = left + len(names) * (shown * side + 6) + 16  # the last title is wider than its pictures
    page = Image.new("RGB", (width, top + len(rows) * (side + 2)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)
    for j, name in enumerate(names):
        at = left + j * (shown * side + 6)
        pen.text((at, 3), SETS[name].title, fill="black", font=font)
        for i, key in enumerate(rows):
            y = top + i * (side + 2)
            if j == 0:
                title = "the set itself" if key == "set" else TITLES[key]
                pen.text((4, y + side // 2 - 8), title, fill="black", font=font)
            for n, picture in enumerate(_pictures(base, key, name, shown)):
                page.paste(picture.resize((side, side)), (at + n * side, y))
    page.save(IMAGES / f"methods_{base}.jpg", quality=88)


def _pictures(base: str, key: str, name: str, count: int) -> list[Image.Image]:
    if key == "set":
        x0 = data_of(name, 960, 31).latents[0]  # type: ignore[index]
        step = max(1, len(x0) // len(SETS[name].words))
        latents = x0[:: step if SETS[name].conditional else len(x0) // 8][:count]
    else:
        found = sorted((WORK / "cells" / base / name).glob(f"{key}_*_0.safetensors"))
        found = [p for p in found if p.stem.rsplit("_", 2)[0] == key]
        if not found:
            return []
        latents = load_file(found[0])["latents"][:count].float()
    with torch.no_grad():
        return [to_image(one) for one in vae_decode(load_vae(POCKET))(latents)]

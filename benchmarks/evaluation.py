"""How far the figures of `diffscaler eval` can be trusted: distances between drawn pictures.

    python benchmarks/evaluation.py --plot docs/images/evaluation_trust.png

Everything here is real pictures of pocket/draw.py, so that the truth is known: two draws of one set
are 0 apart, other sets are not, and a mixture is the farther the more wrong pictures are in it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "pocket"))

from draw import draw_arrays  # noqa: E402
from words import SETS  # noqa: E402

from diffscaler_core.evaluation import (  # noqa: E402
    FeatureNet,
    frechet_distance,
    kernel_distance,
    load_features,
)

POOL = 2115  # 45 of each of 47 words; subsets are small beside it, so that their words vary
COUNTS = (33, 66, 131, 262, 525)
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
SIDE = 64


def features(net: FeatureNet, name: str, count: int, seed: int) -> Tensor:
    """Features of about `count` pictures of a set, in any order, (count, F)."""
    words, style = SETS[name]
    drawn = draw_arrays(words, style, -(-count // len(words)), seed)
    small = [
        F.interpolate(part.float(), (SIDE, SIDE), mode="bicubic", antialias=True)
        for part in torch.from_numpy(drawn).permute(0, 3, 1, 2).split(256)
    ]
    found = net(torch.cat(small).clamp(0, 255) / 127.5 - 1)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))][:count]


def separation(net: FeatureNet, count: int) -> None:
    """Prints the distances of all sets from all, each drawn twice."""
    first, second = (
        {name: features(net, name, count, seed) for name in SETS} for seed in (2001, 2002)
    )
    print(f"\nFréchet distance, {count} pictures each; rows one draw, columns another\n")
    print(f"| | {' | '.join(SETS)} |\n|---|{'---|' * len(SETS)}")
    for a in SETS:
        row = [frechet_distance(first[a], second[b]) for b in SETS]
        print(f"| {a} | {' | '.join(f'{value:.2f}' for value in row)} |")


def bias(real: Tensor, same: Tensor, other: Tensor, repeats: int = 5) -> list[tuple[float, ...]]:
    """Prints distances by number of pictures, and returns the rows.

    Args:
        real: All reference pictures, (N, F).
        same: Another draw of the same set.
        other: Of another set.
        repeats: Subsets of each size, whose mean is shown.
    """
    print("\n| pictures | Fréchet, same set | kernel ×1000 | Fréchet, other set | kernel ×1000 |")
    print("|---|---|---|---|---|")
    rows = []
    for count in COUNTS:
        found = []
        for i in range(repeats):
            order = torch.Generator().manual_seed(i)
            some = [s[torch.randperm(len(s), generator=order)[:count]] for s in (real, same, other)]
            found.append(
                [
                    value
                    for made in some[1:]
                    for value in (
                        frechet_distance(some[0], made),
                        1000 * kernel_distance(some[0], made, subset=count, subsets=1).mean,
                    )
                ]
            )
        mean = torch.tensor(found).mean(0).tolist()
        rows.append((count, *mean))
        print(f"| {count} | {' | '.join(f'{value:.3f}' for value in mean)} |")
    return rows


def mixtures(real: Tensor, same: Tensor, other: Tensor, count: int) -> list[tuple[float, ...]]:
    """Prints distances by the share of another set's pictures, and returns the rows."""
    print("\n| share of wrong pictures | Fréchet | kernel ×1000 |\n|---|---|---|")
    rows = []
    for share in SHARES:
        wrong = round(share * count)
        made = torch.cat([same[: count - wrong], other[:wrong]])
        frechet = frechet_distance(real[:count], made)
        kernel = 1000 * kernel_distance(real[:count], made, subset=count, subsets=1).mean
        rows.append((share, frechet, kernel))
        print(f"| {100 * share:.0f} % | {frechet:.3f} | {kernel:.3f} |")
    return rows


def plot(path: Path, by_count: list[tuple[float, ...]], by_share: list[tuple[float, ...]]) -> None:
    """Draws both curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts, same, _, other, _ = zip(*by_count, strict=True)
    left.loglog(counts, same, "o-", label="another draw of the same set (truly 0)")
    left.loglog(counts, other, "s-", label="another set")
    left.set(xlabel="pictures on each side", ylabel="Fréchet distance", ylim=(0.5, 400))
    left.set_xticks(counts, [str(count) for count in counts])
    left.minorticks_off()
    left.axvline(64, color="grey", lw=0.8, ls=":")
    left.legend(frameon=False, loc="upper right")
    shares, frechet, _ = zip(*by_share, strict=True)
    right.plot([100 * share for share in shares], frechet, "o-")
    right.set(xlabel="pictures of another set, %", ylabel="Fréchet distance")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--features", default="pocket")
    parser.add_argument("--count", type=int, default=564)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    net = load_features(args.features)
    separation(net, args.count)
    real, same = (features(net, "base", POOL, seed) for seed in (3001, 3002))
    other = features(net, "ink", POOL, 3003)
    print("\nSet base against base, and against ink:")
    by_count = bias(real, same, other)
    print("\nSet base with pictures of ink among it:")
    by_share = mixtures(real, same, other, 525)
    if args.plot:
        plot(args.plot, by_count, by_share)


if __name__ == "__main__":
    main()

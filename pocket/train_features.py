"""Trains the small feature network that `diffscaler eval` compares pictures by.

    python pocket/train_features.py                 # about ten minutes on one core
    python pocket/train_features.py --check         # only the table of distances between sets

It is asked three things of drawn pictures: which word, in which style, and damaged how (blur,
noise, a second picture shining through, coarse pixels). The first two make features that tell sets
apart, the third features that notice a bad generator.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from draw import ANYWHERE, NEAR, Poses, draw_arrays
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from words import BASE_WORDS, FRUITS, SETS, SMILEYS, STYLES

from diffscaler_core.atomic import write_whole
from diffscaler_core.evaluation.distances import frechet_distance
from diffscaler_core.evaluation.features import load_features
from diffscaler_core.evaluation.small_net import LAYERS, SIDE, SmallNet, resized, save_small_net

WORDS = (*BASE_WORDS, *FRUITS, *SMILEYS)
DAMAGE = ("none", "blur", "noise", "ghost", "pixels")
HEADS = {"word": WORDS, "style": STYLES, "damage": DAMAGE}
NAME = "pocket features"
NOTE = "a small network made for this repository's pictographs; comparable only with itself"


class Trainee(SmallNet):
    """The network with batch normalisation after each convolution."""

    def __init__(self) -> None:
        super().__init__(HEADS)
        self.norms = nn.ModuleList(nn.BatchNorm2d(after) for _, after, _ in LAYERS)

    def normalised(self, layer: int, x: Tensor) -> Tensor:
        """Returns x, normalised."""
        return self.norms[layer](x)

    def folded(self) -> SmallNet:
        """Returns the same function with each normalisation folded into its convolution."""
        net = SmallNet(HEADS)
        kept = {k: v for k, v in self.state_dict().items() if not k.startswith("norms.")}
        net.load_state_dict(kept)
        for conv, norm in zip(net.convs, self.norms, strict=True):
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
                norm.weight, norm.bias,
            )  # fmt: skip
        return net.eval()


@torch.no_grad()
def drawn(words: tuple[str, ...], style: str, count: int, seed: int, poses: Poses = NEAR) -> Tensor:
    """Pictures in −1..1, (words · count, 3, SIDE, SIDE), word by word."""
    large = torch.from_numpy(draw_arrays(words, style, count, seed, poses=poses))
    parts = large.permute(0, 3, 1, 2).split(256)
    return torch.cat([resized(part / 127.5 - 1, SIDE) for part in parts])


def data(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """All words in all styles: pictures (uint8), word numbers, style numbers. Kept on disk."""
    path, pictures = Path(f".cache/pocket/features_{count}_{seed}.safetensors"), []
    if not path.is_file():
        for style in STYLES:
            few = count // 4  # stand anywhere, as a control may ask
            near = drawn(WORDS, style, count - few, seed).unflatten(0, (len(WORDS), -1))
            far = drawn(WORDS, style, few, seed, ANYWHERE).unflatten(0, (len(WORDS), -1))
            images = torch.cat([near, far], 1).flatten(0, 1)
            pictures.append(((images + 1) * 127.5).round().byte())
            print(f"  drew {len(images)} pictures, {style}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save({"pictures": torch.cat(pictures)}))
    words = torch.arange(len(WORDS)).repeat_interleave(count)
    styles = torch.arange(len(STYLES)).repeat_interleave(len(words))
    return load_file(path)["pictures"], words.repeat(len(STYLES)), styles


def damaged(x: Tensor, kinds: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, SIDE, SIDE), each damaged as `kinds` (B,) says, lightly to badly."""
    x = x.clone()
    amount = torch.rand(len(x), generator=generator)
    for i in range(len(x)):
        own, kind = float(amount[i]), DAMAGE[int(kinds[i])]
        if kind == "blur":
            x[i] = blurred(x[i : i + 1], 0.6 + 1.6 * own)[0]
        elif kind == "noise":
            x[i] += torch.randn(x[i].shape, generator=generator) * (0.04 + 0.30 * own)
        elif kind == "ghost":
            x[i] = x[i].lerp(x[i - 1], 0.15 + 0.3 * own)
        elif kind == "pixels":
            side = SIDE // (2 + round(2 * own))
            coarse = F.interpolate(x[i : i + 1], (side, side), mode="area")
            x[i] = F.interpolate(coarse, (SIDE, SIDE), mode="nearest")[0]
    return x.clamp(-1, 1)


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (B, 3, H, W), edges repeated."""
    radius = max(1, math.ceil(2.5 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    x = F.pad(x, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """The batch shifted by up to three pixels, a little brighter or darker."""
    up, left = torch.randint(0, 7, (2,), generator=generator).tolist()
    padded = F.pad(x, (3, 3, 3, 3), mode="replicate")
    gain = 1 + 0.06 * torch.randn(len(x), 1, 1, 1, generator=generator)
    return padded[:, :, up : up + SIDE, left : left + SIDE] * gain


def losses(net: SmallNet, x: Tensor, answers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cross-entropy of each question."""
    features = net(x)
    return {
        head: F.cross_entropy(net.logits(features, head), wanted)
        for head, wanted in answers.items()
    }


def train(args: argparse.Namespace) -> SmallNet:
    """The loop."""
    torch.manual_seed(args.seed)
    pictures, words, styles = data(args.per_word, args.seed + 1)
    net = Trainee()
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.01)
    began = time.monotonic()
    for step in range(args.steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rows = torch.randint(len(pictures), (args.batch,), generator=generator)
        kinds = torch.randint(1, len(DAMAGE), (args.batch,), generator=generator)
        kinds[torch.rand(args.batch, generator=generator) < 0.5] = 0
        x = damaged(moved(pictures[rows] / 127.5 - 1, generator), kinds, generator)
        answers = {"word": words[rows], "style": styles[rows], "damage": kinds}
        for group in optimizer.param_groups:
            fall = 0.5 * (1 + math.cos(math.pi * step / args.steps))
            group["lr"] = args.lr * min(1, (step + 1) / 50) * fall
        parts = losses(net, x.contiguous(memory_format=torch.channels_last), answers)
        optimizer.zero_grad(set_to_none=True)
        sum(parts.values()).backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            told = ", ".join(f"{head} {loss.item():.3f}" for head, loss in parts.items())
            print(f"  step {step + 1}, {time.monotonic() - began:.0f} s: {told}", flush=True)
    return centred(net.eval().folded(), pictures)


@torch.no_grad()
def centred(net: SmallNet, pictures: Tensor) -> SmallNet:
    """The same network with features in units of their spread over the undamaged pictures."""
    found = torch.cat([net(part / 127.5 - 1) for part in pictures.split(256)])
    net.centre, net.spread = found.mean(0), found.std(0)
    return net


@torch.no_grad()
def check(path: Path, count: int = 12) -> bool:
    """Prints right answers on new pictures, and distances between all sets; says if they do."""
    net = load_features(path)
    images, words, styles = data(4, 1001)
    images = images / 127.5 - 1
    for head, wanted in (("word", words), ("style", styles)):
        right = (net.classify(images, head).argmax(1) == wanted).float().mean()
        print(f"  {head}: {100 * right:.1f} % right of {len(images)} new pictures")
    halves = {
        name: [net(drawn(own, style, 4 * -(-count * 47 // (4 * len(own))), seed))
               for seed in (2001, 2002)]
        for name, (own, style) in SETS.items()
    }  # fmt: skip
    own = {name: frechet_distance(a, b) for name, (a, b) in halves.items()}
    print("| | " + " | ".join(halves) + " |")
    apart = math.inf
    for a, (first, _) in halves.items():
        row = [frechet_distance(first, second) for _, second in halves.values()]
        print(f"| {a} | " + " | ".join(f"{d:.3f}" for d in row) + " |")
    for a, b in itertools.combinations(halves, 2):
        apart = min(apart, frechet_distance(halves[a][0], halves[b][1]))
    print(f"largest within a set {max(own.values()):.3f}, smallest between sets {apart:.3f}")
    return apart > 10 * max(own.values())


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("assets/pocket/features.safetensors"))
    parser.add_argument("--check", action="store_true", help="train nothing")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--per-word", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.check:
        save_small_net(train(args), args.out, NAME, NOTE)
        print(f"{args.out}: {args.out.stat().st_size:,} bytes")
    return 0 if check(args.out) else 1


if __name__ == "__main__":
    sys.exit(main())

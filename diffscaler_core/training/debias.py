"""Hidden groups: a task that does as well on the few as on the many, without being told who is who.

InvDiff (arXiv:2412.08480) in two phases. Pictures of a group that a biased model neglects have a
high loss; so phase 1 looks for soft groups w, one row per picture on the simplex, in which the
biased model's losses l differ most,

    max_w  std_g(r_g) + c · min_g Σᵢ w_ig lᵢ,    r_g = Σᵢ w_ig lᵢ / Σᵢ w_ig,

by Adam, put back on the simplex after each step; its second part keeps groups from being empty.
Phase 2 trains with the batch's group risks m_g in place of the mean loss,

    L = mean_g m_g + λ var_g m_g,

where theirs trains a copy of the U-Net and ours a task. Ours too: losses are taken relative to
their mean and the second sum as a mean, so that one c serves any number of pictures; each prompt's
pictures are grouped among themselves, so that groups mean bias and not what is shown; and groups
are put in order of their risk, so that group 1 of every prompt is the one it does worst on.

Pure maths. Shapes: n pictures, B rows of a batch, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DiffScalerError
from .randomness import generator_for

#: c, Adam's rate and steps; theirs are 3, 0.01 and 500, ours but for c.
FLOOR, RATE, STEPS = 1.0, 0.01, 500
#: Weights start this far from even, at random: even ones have no gradient to leave by.
START = 0.1
#: A group with less weight than so many rows of a batch is not in it.
EMPTY = 0.05


@dataclass(frozen=True, eq=False)
class GroupTable:
    """Which groups pictures belong to.

    Attributes:
        weights: (n, G), rows sum to 1; group 0 is the one with the highest risk.
        losses: The biased model's, (n,).
        index: Which prompt each picture has, (n,).
        prompts: The prompts' names.
        ids: The pictures' ids, of `TrainingData.image_ids`.
    """

    weights: Tensor
    losses: Tensor
    index: Tensor
    prompts: tuple[str, ...]
    ids: tuple[str, ...]

    def report(self) -> str:
        """Returns a line per prompt: each group's share of its pictures, and its risk."""
        lines = []
        for number, name in enumerate(self.prompts):
            mine = self.index == number
            count = int(mine.sum())
            if not count:
                continue
            size, risk = self.weights[mine].sum(0), risks(self.losses[mine], self.weights[mine])
            told = ", ".join(
                f"{share / count:.0%} at {value:.4g}"
                for share, value in zip(size.tolist(), risk.tolist(), strict=True)
            )
            lines.append(f"{name!r}, {count} pictures: {told}")
        return "\n".join(lines)

    def state(self) -> dict[str, Any]:
        """Returns the table as JSON can hold it."""
        return {
            "groups": int(self.weights.shape[1]),
            "report": self.report().splitlines(),
            "prompts": list(self.prompts),
            "pictures": [
                {"id": name, "prompt": prompt, "loss": loss, "weights": row}
                for name, prompt, loss, row in zip(
                    self.ids,
                    self.index.tolist(),
                    self.losses.tolist(),
                    self.weights.tolist(),
                    strict=True,
                )
            ],
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> GroupTable:
        """Returns the table that `state` described."""
        rows = state["pictures"]
        return cls(
            torch.tensor([row["weights"] for row in rows], dtype=torch.float32),
            torch.tensor([row["loss"] for row in rows], dtype=torch.float32),
            torch.tensor([row["prompt"] for row in rows], dtype=torch.long),
            tuple(map(str, state["prompts"])),
            tuple(str(row["id"]) for row in rows),
        )


def find_groups(
    losses: Tensor,
    index: Tensor,
    groups: int,
    *,
    floor: float = FLOOR,
    steps: int = STEPS,
    seed: int = 0,
) -> Tensor:
    """Returns weights of groups, (n, G), prompt by prompt; group 0 has the highest risk.

    A prompt with fewer pictures than twice the groups has nothing to be told apart by: its
    pictures belong to all groups alike.

    Args:
        losses: A biased model's, (n,), each a mean over times and noises.
        index: Which prompt each picture has, (n,).
        groups: G, at least 2.
        floor: c.
        steps: Adam's.
        seed: What the start is drawn from.

    Raises:
        DiffScalerError: Losses that are not finite.
    """
    if not bool(torch.isfinite(losses).all()):
        raise DiffScalerError("no groups can be found: a picture's loss is not finite")
    weights = torch.full((len(losses), groups), 1 / groups)
    for prompt in index.unique().tolist():
        mine = index == prompt
        if int(mine.sum()) >= 2 * groups:
            weights[mine] = _of_one(losses[mine].double(), groups, floor, steps, seed).float()
    return weights


def _of_one(losses: Tensor, groups: int, floor: float, steps: int, seed: int) -> Tensor:
    relative = losses / losses.mean().clamp(min=1e-12)
    draws = torch.rand(len(losses), groups, generator=generator_for(seed, "groups")).double()
    weights = _on_simplex(1 / groups + START * draws).requires_grad_(True)
    optimizer = torch.optim.Adam([weights], lr=RATE)
    for _ in range(steps):
        held = (weights * relative[:, None]).mean(0) * groups
        gain = risks(relative, weights).std(unbiased=False) + floor * held.min()
        optimizer.zero_grad()
        (-gain).backward()
        optimizer.step()
        with torch.no_grad():
            weights.copy_(_on_simplex(weights))
    found = weights.detach()
    return found[:, risks(relative, found).argsort(descending=True)]


def risks(losses: Tensor, weights: Tensor) -> Tensor:
    """Returns each group's mean loss, (G,); 0 of a group that nothing belongs to.

    Args:
        losses: (n,).
        weights: (n, G).
    """
    return (weights * losses[:, None]).sum(0) / weights.sum(0).clamp(min=1e-8)


def group_risk(losses: Tensor, weights: Tensor, spread: float) -> Tensor:
    """Returns mean_g m_g + λ var_g m_g of a batch, over the groups that are in it.

    Args:
        losses: (B,).
        weights: (B, G).
        spread: λ.
    """
    there = (weights.sum(0) > EMPTY).to(losses.dtype)
    count = there.sum().clamp(min=1)
    own = risks(losses, weights)
    mean = (there * own).sum() / count
    return mean + spread * (there * (own - mean).square()).sum() / count


def _on_simplex(weights: Tensor) -> Tensor:
    """Returns rows brought to the simplex as theirs: not below 0, then divided by their sum."""
    kept = weights.clamp(min=0)
    total = kept.sum(1, keepdim=True)
    return torch.where(total > 0, kept / total.clamp(min=1e-12), 1 / weights.shape[1])


def fits(table: GroupTable, ids: Sequence[str], groups: int) -> bool:
    """Says whether a table is of these pictures and as many groups."""
    return table.ids == tuple(ids) and table.weights.shape[1] == groups

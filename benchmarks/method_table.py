"""The rows of the methods benchmark: what is compared, on which layers, at which learning rates.

Every row trains by the same engine, on the same pictures, noise and times, for the same number of
steps. `rates` are tried for each row and base on the tuning sets; the rate that does best there
is the row's for all sets and seeds. Adding a row is adding a line.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from diffscaler_core import TaskAdapter, new_task
from diffscaler_core.training import TrainingConfig

#: The layers that methods are compared on: attention and MLPs of the transformer, the convolutions
#: and attention of the U-Net. Those that read the time or the class are left out for all alike.
INNER = {
    "dit": r"transformer_blocks\.\d+\.(attn1|ff)\..*",
    "unet": r"(down|mid|up)_block.*(conv\d?|conv_shortcut|to_[qkv]|to_out\.0)",
}
STEPS, BATCH = 200, 32
#: The learning rates there are, and where the search begins for each kind of row.
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
LOW_RANK, VECTORS, FULL = (3e-3, 1e-2), (1e-2, 3e-2), (3e-4, 1e-3)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        title: What it is called.
        rates: Learning rates to try first, of RATES.
        method: A name in `diffscaler_core.METHODS`; "" for a baseline.
        rank: Of the subspaces; per base where the counts of parameters need it.
        inner: True: on the layers of INNER; False: on all of the blocks'.
        targets: A pattern in place of INNER's.
        baseline: A name in `training.baselines.BASELINES`.
        settings: What PEFT is told.
        parts: Parts that are kept of the method's, None: all.
        activation: In place of the method's own.
        vector_rate: Rate of scales and shifts, as a multiple of the subspaces'.
        config: Other settings of the training.
        bases: The bases it runs on.
        seeds: How many seeds it runs with; per base where one asks for fewer.
    """

    title: str
    rates: tuple[float, ...] = LOW_RANK
    method: str = ""
    rank: int | Mapping[str, int] = 8
    inner: bool = True
    targets: Mapping[str, str] = field(default_factory=dict)
    baseline: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] | None = None
    activation: str | None = None
    vector_rate: float = 3.0
    config: Mapping[str, Any] = field(default_factory=dict)
    bases: tuple[str, ...] = ("dit", "unet")
    seeds: int | Mapping[str, int] = 3

    def training(self, base: str, rate: float, seed: int) -> TrainingConfig:
        """Returns the settings of one run.

        Args:
            base: A name in `method_bases.BASES`.
            rate: The learning rate; of scales and shifts alone, if it has no subspace.
            seed: Of the run.
        """
        kind = base.partition("_")[0]
        chosen = self.targets.get(kind, INNER[kind] if self.inner else "blocks")
        config = TrainingConfig(
            name="task",
            method=self.method or "prompts",
            rank=self.rank if isinstance(self.rank, int) else self.rank[kind],
            targets=chosen,
            steps=STEPS,
            batch=BATCH,
            lr=rate,
            lr_scale_shift=rate * (self.vector_rate if self._has_subspace else 1.0),
            prompts="labels",
            validation_times=8,
            save_every=0,
            seed=seed,
        )
        return replace(config, **self.config)

    def seeds_on(self, base: str) -> int:
        """Returns how many seeds it runs with on a base."""
        return self.seeds if isinstance(self.seeds, int) else self.seeds[base]

    @property
    def _has_subspace(self) -> bool:
        named = self.method in ("diffscaler", "lora")
        return named and (self.parts is None or "subspace" in self.parts)

    def start(self, model: nn.Module, config: TrainingConfig) -> TaskAdapter | None:
        """Returns the task the run starts from, where it is none of METHODS; None: the usual."""
        if self.parts is None and self.activation is None:
            return None
        task = new_task(model, config.method, config.rank, config.targets, seed=config.seed)
        kept = self.parts or tuple(task.info["parts"])
        tensors = {"scale": ("scale",), "shift": ("shift",), "subspace": ("down", "up")}
        names = [name for part in kept for name in tensors[part]]
        layers = {n: {t: own[t] for t in names if t in own} for n, own in task.layers.items()}
        activation = self.activation or task.info["activation"]
        return task.replace(layers=layers).with_info(parts=list(kept), activation=activation)


#: Ranks chosen by the trainer, on all of the blocks' layers, for a hundredth of the base's size.
AUTO = {"rank": "auto", "rank_budget": "1%"}

#: Of rows that the transformer settles: the U-Net is there to be compared with it.
FEWER = {"dit": 3, "unet": 1}

METHODS: dict[str, Method] = {
    "full": Method("full fine-tuning", FULL, baseline="full"),
    "ours": Method("diffscaler, rank 1", method="diffscaler", rank=1),
    "lora": Method("LoRA, rank 2", method="lora", rank=2, bases=("dit",)),
    "ours_narrow": Method(
        "diffscaler, rank 1, attention alone",
        (3e-2, 1e-1),
        method="diffscaler",
        rank=1,
        targets={"dit": r"transformer_blocks\.\d+\.attn1\..*"},
        bases=("dit",),
    ),
    "ours_wide": Method("diffscaler, rank 7", method="diffscaler", rank=7),
    "lora_wide": Method("LoRA, rank 8", method="lora", rank=8),
    "ours_auto": Method(
        "diffscaler, 1 % where it helps",
        method="diffscaler",
        inner=False,
        config=AUTO,
        bases=("dit",),
    ),
    "lora_auto": Method(
        "LoRA, 1 % where it helps",
        method="lora",
        inner=False,
        config=AUTO,
        bases=("dit",),
        seeds=1,
    ),
    "scale_shift": Method(
        "scale + shift, all of the blocks",
        VECTORS,
        "scale_shift",
        inner=False,
        seeds=FEWER,
    ),
    "difffit": Method("DiffFit", VECTORS, "difffit", inner=False, seeds=FEWER),
    "bitfit": Method("BitFit", VECTORS, "bitfit", inner=False, seeds=FEWER),
    "peft_lora": Method(
        "LoRA by PEFT, rank 2",
        baseline="peft_lora",
        settings={"r": 2, "lora_alpha": 2},
        bases=("dit",),
        seeds=1,
    ),
    "peft_dora": Method(
        "DoRA by PEFT, rank 2",
        baseline="peft_dora",
        settings={"r": 2, "lora_alpha": 2},
        bases=("dit",),
        seeds=1,
    ),
    "peft_oft": Method(
        "OFT by PEFT, blocks of 8",
        baseline="peft_oft",
        settings={"oft_block_size": 8},
        bases=("dit",),
        seeds=1,
    ),
    "peft_ia3": Method("IA3 by PEFT", VECTORS, baseline="peft_ia3", bases=("dit",), seeds=1),
}


#: In place of STEPS and BATCH: far enough for full fine-tuning to begin to learn by heart.
LONG = {"steps": 1500, "batch": 16}
#: Sets that learning rates are chosen on, by validation loss: one of each kind.
TUNED_ON = ("ink", "blueprint")


def _ablation() -> dict[str, Method]:
    """Returns the ablation: parts × activation × rank on the inner layers, and long runs."""
    affine = {"scale": ("scale",), "shift": ("shift",), "scale_shift": ("scale", "shift")}
    rows = {
        f"only_{name}": Method(
            " + ".join(parts), (3e-2, 1e-1), "diffscaler", 1, parts=parts, bases=("dit",)
        )
        for name, parts in affine.items()
    }
    for activation, rank in itertools.product(("relu", "identity"), (1, 4, 16)):
        for prefix, title, parts in (
            ("sub", "subspace", ("subspace",)),
            ("all", "scale + shift + subspace", ("scale", "shift", "subspace")),
        ):
            rows[f"{prefix}_{activation}_{rank}"] = Method(
                f"{title}, {activation}, rank {rank}",
                (3e-3, 1e-2) if rank == 16 else (1e-2, 3e-2),
                "diffscaler",
                rank,
                parts=parts,
                activation=activation,
                bases=("dit",) if rank == 4 else ("dit", "dit_small"),
            )
    for key in ("full", "ours_wide", "lora_wide"):
        row = METHODS[key]
        rows[f"long_{key}"] = replace(
            row, title=f"{row.title}, long", config={**row.config, **LONG}, bases=("dit",)
        )
    return rows


ABLATION: dict[str, Method] = _ablation()
#: The ablation's sets: a style, and new subjects.
ABLATION_SETS = ("ink", "smileys")
ROWS: dict[str, Method] = METHODS | ABLATION

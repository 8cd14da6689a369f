"""Makes a task of what two models differ in."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..diffscaler_core.affiner import PARTS
from .edge_types import CATEGORY, Task
from .native_weights import extracted


class DiffScalerExtractTask(io.ComfyNode):
    """A fine-tuned model minus its base, as a task."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerExtractTask",
            display_name="Extract DiffScaler Task",
            category=CATEGORY,
            description="Makes a small task of what fine-tuning changed: tuned model minus base. "
            "The tuned model may be the base with LoRAs of any kind on it.",
            search_aliases=[
                "diffscaler",
                "extract lora",
                "model difference",
                "lora to task",
                "svd",
            ],
            inputs=[
                io.Model.Input(
                    "tuned",
                    tooltip="The fine-tuned model, or the base with LoRAs (LoHa, LoKr …) on it.",
                ),
                io.Model.Input("base", tooltip="What it was made from."),
                io.String.Input("name", default="extracted", tooltip="The task's name."),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=0,
                    max=1024,
                    tooltip="Rank of every layer's subspace; for a LoRA its own rank is enough. "
                    "0: scales and shifts only.",
                ),
                io.Float.Input(
                    "energy",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Above 0: each layer gets the smallest rank that keeps this share of "
                    "its change, 'rank' at most.",
                ),
                io.Boolean.Input(
                    "scale",
                    default=True,
                    optional=True,
                    tooltip="Use per-channel scales where they help.",
                ),
                io.String.Input(
                    "targets",
                    default="all",
                    optional=True,
                    tooltip="Which layers: all, blocks, attention, mlp, or a regular expression.",
                ),
                io.String.Input(
                    "exclude",
                    default="",
                    optional=True,
                    tooltip="Layers to leave out, a regular expression; empty: none.",
                ),
            ],
            outputs=[
                Task.Output(display_name="task", tooltip="The task."),
                io.String.Output(
                    display_name="report",
                    tooltip="How much of the change the task keeps, and what it cannot hold.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        tuned: ModelPatcher,
        base: ModelPatcher,
        name: str,
        rank: int,
        energy: float = 0.0,
        scale: bool = True,
        targets: str = "all",
        exclude: str = "",
    ) -> io.NodeOutput:
        """Runs the node."""
        settings: dict[str, Any] = {"name": name.strip() or "extracted", "rank": rank}
        if energy:
            settings |= {"rank": "auto", "energy": energy, "most_rank": max(1, rank)}
        parts = PARTS if scale else tuple(part for part in PARTS if part != "scale")
        settings |= {"parts": parts, "targets": targets, "exclude": exclude or None}
        task, text = extracted(tuned, base, settings, cls.hidden.unique_id)
        return io.NodeOutput(task, text, ui=ui.PreviewText(text))

"""Turns a LoRA file into a task."""

import folder_paths
from comfy_api.latest import io, ui

from ..diffscaler_core import import_lora
from ..diffscaler_core.describe import describe
from ..diffscaler_core.lora.read import imported_text
from .edge_types import CATEGORY, Task
from .folders import stamp_of

FOLDER = "loras"


class DiffScalerImportLoRA(io.ComfyNode):
    """A plain LoRA file from models/loras, as a task that does exactly the same."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        return io.Schema(
            node_id="DiffScalerImportLoRA",
            display_name="Import LoRA as DiffScaler Task",
            category=CATEGORY,
            description="Loads a plain LoRA file as a task: it stacks, routes, schedules and mixes "
            "in one batch like any task, and leaves the model's weights alone.",
            search_aliases=["diffscaler", "lora", "load lora", "convert lora", "kohya", "peft"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=lora_files(),
                    tooltip="A LoRA in models/loras, in kohya's, diffusers' or ComfyUI's naming. "
                    "LoHa, LoKr, OFT, DoRA and files of whole weights are refused with the reason.",
                ),
                io.Combo.Input(
                    "text_encoder",
                    options=["leave out", "refuse"],
                    default="leave out",
                    optional=True,
                    advanced=True,
                    tooltip="What to do with a LoRA that also changes the text encoder, which a "
                    "task does not: leave that part out and say so, or refuse the file.",
                ),
            ],
            outputs=[
                Task.Output(display_name="task", tooltip="The task, to be applied to a model."),
                io.String.Output(
                    display_name="text", tooltip="What was read and what was left out."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, text_encoder: str = "leave out") -> object:
        """Returns what changes when the file does, so that an overwritten file is read again."""
        path = folder_paths.get_full_path(FOLDER, lora_name)
        return lora_name if path is None else (path, stamp_of(path), text_encoder)

    @classmethod
    def execute(cls, lora_name: str, text_encoder: str = "leave out") -> io.NodeOutput:
        """Runs the node."""
        path = folder_paths.get_full_path_or_raise(FOLDER, lora_name)
        task = import_lora(path, strict=text_encoder == "refuse")
        text = f"{imported_text(task)}\n{describe(task)}"
        return io.NodeOutput(task, text, ui=ui.PreviewText(text))


def lora_files() -> list[str]:
    """Returns the LoRA files there are; others than `.safetensors` can run code when loaded."""
    names: list[str] = folder_paths.get_filename_list(FOLDER)
    return [name for name in names if name.lower().endswith(".safetensors")]

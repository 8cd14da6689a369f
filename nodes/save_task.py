"""Saves a task file."""

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..diffscaler_core import TaskAdapter, save_task
from ..diffscaler_core.combine import cast_task
from ..diffscaler_core.errors import unknown
from .edge_types import CATEGORY, Task
from .folders import new_task_path
from .pictures import as_thumbnail

DTYPES = {"keep": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DiffScalerSaveTask(io.ComfyNode):
    """A task as one safetensors file in ComfyUI's output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Returns what ComfyUI shows of this node."""
        text = {"default": "", "optional": True}
        return io.Schema(
            node_id="DiffScalerSaveTask",
            display_name="Save DiffScaler Task",
            category=CATEGORY,
            description="Saves a task as one safetensors file in ComfyUI's output folder. Nothing "
            "is overwritten: each file gets the next number.",
            search_aliases=["diffscaler", "export task", "export adapter", "save lora"],
            is_output_node=True,
            inputs=[
                Task.Input("task", tooltip="The task to save."),
                io.String.Input(
                    "filename_prefix",
                    default="diffscaler/task",
                    tooltip="The file's name below the output folder; files in diffscaler/ appear "
                    "in Load DiffScaler Task.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="keep",
                    optional=True,
                    tooltip="Precision in the file; bf16 and fp16 halve its size.",
                ),
                io.Image.Input(
                    "thumbnail", optional=True, tooltip="A picture stored in the file, made small."
                ),
                io.String.Input("title", **text, tooltip="A title for people; empty: unchanged."),
                io.String.Input("author", **text, tooltip="Who made the task; empty: unchanged."),
                io.String.Input(
                    "description",
                    **text,
                    multiline=True,
                    tooltip="What the task does and how to use it; empty: unchanged.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="file", tooltip="The saved file's name below the output folder."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        task: TaskAdapter,
        filename_prefix: str,
        dtype: str = "keep",
        thumbnail: Tensor | None = None,
        title: str = "",
        author: str = "",
        description: str = "",
    ) -> io.NodeOutput:
        """Runs the node."""
        facts = {"title": title, "author": author, "description": description}
        if thumbnail is not None:
            facts["thumbnail"] = as_thumbnail(thumbnail)
        kept = {**task.modelspec, **{key: value for key, value in facts.items() if value}}
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        cast = cast_task(task, DTYPES[dtype]) if DTYPES[dtype] else task
        while True:
            path, shown = new_task_path(filename_prefix)
            try:
                save_task(cast.replace(modelspec=kept), path, replace=False)
            except FileExistsError:  # another process was faster: the next number
                continue
            return io.NodeOutput(shown, ui=ui.PreviewText(f"saved {shown}"))

"""The node pack: everything that imports ComfyUI.

To add a node, write its file and one line in NODES.
"""

from comfy_api.latest import ComfyExtension, io

from .apply_task import DiffScalerApplyTask
from .combine_tasks import DiffScalerCombineTasks
from .compare_tasks import DiffScalerCompareTasks
from .control import DiffScalerControl
from .extract_task import DiffScalerExtractTask
from .folders import register_folder
from .guidance_loss import DiffScalerGuidanceLoss
from .guide_model import DiffScalerGuideModel
from .import_lora import DiffScalerImportLoRA
from .load_task import DiffScalerLoadTask
from .pick_task import DiffScalerPickTask
from .route_experts import DiffScalerRouteExperts
from .route_tasks import DiffScalerRouteTasks
from .save_task import DiffScalerSaveTask
from .scale_task import DiffScalerScaleTask
from .schedule_task import DiffScalerScheduleTask
from .stack_tasks import DiffScalerStackTasks
from .task_conditioning import DiffScalerTaskConditioning
from .task_grid import DiffScalerTaskGrid
from .task_info import DiffScalerTaskInfo
from .train_task import DiffScalerTrainTask
from .training_settings import DiffScalerTrainingSettings
from .translate import DiffScalerTranslate

NODES: list[type[io.ComfyNode]] = [
    DiffScalerLoadTask,
    DiffScalerApplyTask,
    DiffScalerStackTasks,
    DiffScalerControl,
    DiffScalerRouteTasks,
    DiffScalerRouteExperts,
    DiffScalerScheduleTask,
    DiffScalerCompareTasks,
    DiffScalerTaskGrid,
    DiffScalerScaleTask,
    DiffScalerCombineTasks,
    DiffScalerTaskInfo,
    DiffScalerSaveTask,
    DiffScalerImportLoRA,
    DiffScalerTaskConditioning,
    DiffScalerTrainTask,
    DiffScalerTrainingSettings,
    DiffScalerExtractTask,
    DiffScalerPickTask,
    DiffScalerTranslate,
    DiffScalerGuidanceLoss,
    DiffScalerGuideModel,
]


class DiffScalerExtension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def on_load(self) -> None:
        """Registers the model folder before any node looks into it."""
        register_folder()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Returns the node classes."""
        return list(NODES)

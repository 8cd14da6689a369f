"""What runs along our edges, and where our nodes appear in the menu."""

from comfy_api.latest import io

CATEGORY = "DiffScaler"

Task = io.Custom("DIFFSCALER_TASK")
Training = io.Custom("DIFFSCALER_TRAINING")
Guidance = io.Custom("DIFFSCALER_GUIDANCE")
#: ComfyUI's own: {"loss": [one number per step]}.
LossMap = io.Custom("LOSS_MAP")

"""LoRA files in and out: plain LoRAs are tasks whose only part is an identity subspace."""

from .read import import_lora
from .write import export_lora

__all__ = ["export_lora", "import_lora"]

"""Extraction: a fine-tuned model minus its base, as a task."""

from .extract import ENERGY, MOST_RANK, Extraction, extract_task
from .report import ExtractionReport

__all__ = ["ENERGY", "MOST_RANK", "Extraction", "ExtractionReport", "extract_task"]

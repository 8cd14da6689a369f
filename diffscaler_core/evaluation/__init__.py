"""Evaluation: how good tasks are, against real pictures of what they are to draw.

from diffscaler_core.evaluation import evaluate, load_features

report = evaluate(pipe, {"ink": task}, "pictures/ink-kept", load_features(), folder="out/ink")
print(report.markdown())
"""

from .distances import (
    Kernel,
    Manifolds,
    frechet_distance,
    frechet_of_gaussians,
    kernel_distance,
    manifolds,
)
from .drift import Drift, drift
from .evaluate import evaluate, evaluation
from .features import FEATURES, FeatureNet, load_features
from .report import EvaluationReport
from .rows import Row
from .settings import EvaluationSettings

__all__ = [
    "FEATURES",
    "Drift",
    "EvaluationReport",
    "EvaluationSettings",
    "FeatureNet",
    "Kernel",
    "Manifolds",
    "Row",
    "drift",
    "evaluate",
    "evaluation",
    "frechet_distance",
    "frechet_of_gaussians",
    "kernel_distance",
    "load_features",
    "manifolds",
]

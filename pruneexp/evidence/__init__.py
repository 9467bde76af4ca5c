"""What calibration collects: values that grow by `update` and join by `merge`, and are never changed."""

from pruneexp.evidence.gradients import Gradient, PerSampleGradient
from pruneexp.evidence.statistics import AbsoluteMoments, Gram, InputMoments, Moments, RunningFluctuation
from pruneexp.evidence.zeroth_order import DirectionalGradient, Perturbation

__all__ = [
    "AbsoluteMoments",
    "DirectionalGradient",
    "Gradient",
    "Gram",
    "InputMoments",
    "Moments",
    "PerSampleGradient",
    "Perturbation",
    "RunningFluctuation",
]

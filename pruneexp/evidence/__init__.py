"""What calibration collects: values that grow by `update` and join by `merge`, and are never changed."""

from pruneexp.evidence.depth import BlockChange, LossWithout
from pruneexp.evidence.gradients import Gradient, PerSampleGradient
from pruneexp.evidence.statistics import AbsoluteMoments, Gram, InputMoments, Moments, RunningFluctuation, WantedOutput
from pruneexp.evidence.zeroth_order import DirectionalGradient, Perturbation

__all__ = [
    "AbsoluteMoments",
    "BlockChange",
    "DirectionalGradient",
    "Gradient",
    "Gram",
    "InputMoments",
    "LossWithout",
    "Moments",
    "PerSampleGradient",
    "Perturbation",
    "RunningFluctuation",
    "WantedOutput",
]

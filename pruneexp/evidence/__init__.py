"""What calibration collects: values that grow by `update` and join by `merge`, and are never changed."""

from pruneexp.evidence.gradients import Gradient, PerSampleGradient
from pruneexp.evidence.statistics import AbsoluteMoments, Gram, Moments, RunningFluctuation

__all__ = ["AbsoluteMoments", "Gradient", "Gram", "Moments", "PerSampleGradient", "RunningFluctuation"]

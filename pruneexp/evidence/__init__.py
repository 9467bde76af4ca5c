"""What calibration collects: values that grow by `update` and join by `merge`, and are never changed."""

from pruneexp.evidence.depth import BlockChange, LossWithout
from pruneexp.evidence.gradients import Gradient, PerSampleGradient
from pruneexp.evidence.gram import Gram, WantedOutput, others
from pruneexp.evidence.influence import BatchDerivatives, GateDerivatives, Influence
from pruneexp.evidence.statistics import AbsoluteMoments, InputMoments, Moments, RunningFluctuation
from pruneexp.evidence.zeroth_order import DirectionalGradient, Perturbation
from pruneexp.types.defaults import EVIDENCE, fill_in

__all__ = [
    "AbsoluteMoments",
    "BatchDerivatives",
    "BlockChange",
    "DirectionalGradient",
    "GateDerivatives",
    "Gradient",
    "Gram",
    "Influence",
    "InputMoments",
    "LossWithout",
    "Moments",
    "PerSampleGradient",
    "Perturbation",
    "RunningFluctuation",
    "WantedOutput",
    "others",
]

fill_in(globals(), __all__, EVIDENCE)

"""What calibration collects: values that grow by `update_` and join by `merge`."""

# ruff: noqa: F401

from pruneexp.evidence.depth import BlockChange, LossWithout
from pruneexp.evidence.gradients import Gradient, PerSampleGradient
from pruneexp.evidence.gram import Gram, WantedOutput, others
from pruneexp.evidence.halves import Halved, Halves
from pruneexp.evidence.influence import BatchDerivatives, GateDerivatives, Influence
from pruneexp.evidence.statistics import (
    AbsoluteMoments,
    InputMoments,
    Moments,
    RunningFluctuation,
    WindowNorms,
)
from pruneexp.evidence.zeroth_order import DirectionalGradient, Perturbation
from pruneexp.types.defaults import EVIDENCE, fill_in

fill_in(globals(), EVIDENCE, apart=(Halved, Halves))  # they ask their kind

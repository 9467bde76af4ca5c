"""The walk over a model's blocks that collects evidence, gradients, slopes, and loss probes of masked structures."""

from pruneexp.calibrate.gradients import gradient_evidence
from pruneexp.calibrate.walk import Meter, Probe, Visit, walk
from pruneexp.calibrate.zeroth_order import Slopes, perturbed

__all__ = ["Meter", "Probe", "Slopes", "Visit", "gradient_evidence", "perturbed", "walk"]

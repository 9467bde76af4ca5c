"""The walk over a model's blocks that collects evidence, gradients, and loss probes of masked structures."""

from pruneexp.calibrate.gradients import gradient_evidence
from pruneexp.calibrate.walk import Meter, Probe, Visit, walk

__all__ = ["Meter", "Probe", "Visit", "gradient_evidence", "walk"]

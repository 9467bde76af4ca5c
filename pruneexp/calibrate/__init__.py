"""The walk over a model's blocks that collects evidence, and loss probes of masked structures."""

from pruneexp.calibrate.probe import Probe
from pruneexp.calibrate.site_walk import walk_sites
from pruneexp.calibrate.walk import Meter, Visit, walk

__all__ = ["Meter", "Probe", "Visit", "walk", "walk_sites"]

"""The walk over a model's layers that collects evidence, derivatives, slopes, and loss probes of masked structures."""

# ruff: noqa: F401

from pruneexp.calibrate.augmentation import NoAugmentation, SelfGenerated
from pruneexp.calibrate.bookmark import Bookmark, Meter
from pruneexp.calibrate.dense_states import DenseStates
from pruneexp.calibrate.gradients import gradient_evidence
from pruneexp.calibrate.influence import Landscape, influence_evidence
from pruneexp.calibrate.observe import Visit
from pruneexp.calibrate.probe import Probe, at_once
from pruneexp.calibrate.site_walk import KEPT_BYTES, passes_of_layer, require_sums, walk_sites
from pruneexp.calibrate.walk import walk
from pruneexp.calibrate.zeroth_order import Slopes, perturbed

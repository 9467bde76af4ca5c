"""Calibrate, score, search, compensate, shrink: a model and a budget to a smaller model."""

from pruneexp.prune.method import Method, Pruned, by_site, goes_layer_by_layer, judged_whole
from pruneexp.prune.steps import prune_

__all__ = ["Method", "Pruned", "by_site", "goes_layer_by_layer", "judged_whole", "prune_"]

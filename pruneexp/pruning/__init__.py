"""Calibrate, score, search, compensate, shrink: a model and a budget to a smaller model."""

from pruneexp.pruning.method import Method, Pruned, by_site, goes_layer_by_layer, scores_behind_masks, shown_to
from pruneexp.pruning.steps import prune_

__all__ = ["Method", "Pruned", "by_site", "goes_layer_by_layer", "scores_behind_masks", "shown_to", "prune_"]

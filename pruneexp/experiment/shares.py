"""What a run removed, as shares of what its sparsity counts."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from pruneexp.experiment.settings import Experiment
from pruneexp.model import Model
from pruneexp.pruning.budget import whole_budget

logger = logging.getLogger("pruneexp")

WIDE = 0.02  # between the share asked for and the one that left


def counted(experiment: Experiment, model: Model) -> int:
    """What the sparsity counts in the model as it stands."""
    return whole_budget(model, experiment.search, experiment.sparsity, 0.0).total


def share_gone(before: int, after: int) -> float:
    """The share of `before` that is gone; 0 where there was nothing."""
    return 1 - after / before if before else 0.0


def shares_gone(experiment: Experiment, metrics: Mapping[str, float], before: int, after: int) -> dict[str, float]:
    """Of the decoder, of the model and of what the sparsity counts, of which there was `before` and `after`. A line of
    the log says so where that is far from what was asked for, which is no error."""
    counts = {"decoder": "params/decoder", "model": "params"}
    gone = {of: 1 - metrics[f"pruned/{count}"] / metrics[f"dense/{count}"] for of, count in counts.items()}
    ratio, of = experiment.sparsity.ratio, experiment.sparsity.of
    if of != "decoder":
        gone[of] = share_gone(before, after)
    if abs(gone[of] - ratio) > WIDE:
        logger.warning(
            "sparsity.ratio=%g was asked for, %.3f of %s has left: the search rounds in its own way, by units that "
            "large, or takes all units of one score",
            *(ratio, gone[of], of),
        )
    return {f"sparsity/{of}": share for of, share in gone.items()}

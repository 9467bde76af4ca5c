"""The recovery of a run: training after pruning, where a choice trains."""

from __future__ import annotations

from torch import Tensor

from pruneexp.experiment.settings import Experiment
from pruneexp.model import Model
from pruneexp.pruning.record import Record
from pruneexp.recovery import Adapter


def recover(experiment: Experiment, model: Model, tokens_NT: Tensor, record: Record) -> Adapter | None:
    """Trains what is left, where anything trains; the adapter, where that is what was trained."""
    if not experiment.recovery.trains:
        return None
    with record.clock("recover"):
        dense_model = {"dense": experiment.model.reference()} if experiment.recovery.layerwise else {}
        outcome = experiment.recovery(model, tokens_NT, record.meter, experiment.seed, **dense_model)
    record.metrics |= outcome.metrics
    return outcome.adapter

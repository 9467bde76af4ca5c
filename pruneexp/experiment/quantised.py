"""The pruned model in fewer bits, where they are asked for, between its checkpoint and its evaluation."""

from __future__ import annotations

from pathlib import Path

from pruneexp.experiment.settings import Experiment
from pruneexp.model import Model
from pruneexp.pruning.record import Record
from pruneexp.tracker import Trackers
from pruneexp.types import Quantise


def said(quantise: Quantise, rounded: bool) -> str:
    """What a checkpoint's card says. `rounded`: the checkpoint has the weights of a model that was quantised in
    place."""
    if not quantise.applies:
        return ""
    own = "rounded so" if rounded and quantise.in_place else "as they were before, not quantised"
    return f"What was measured: {quantise.note()}. The weights in this folder are {own}."


def quantised(
    experiment: Experiment, model: Model, record: Record, trackers: Trackers, when: str, folder: Path | None
) -> None:
    """Quantises the model as it is `when` ("dense", "pruned"), or has it converted, and takes figures down. `folder`:
    of the run, where a file of the model is kept."""
    if not experiment.quantise.applies:
        return
    with record.clock("quantise"):
        found = experiment.quantise(model, when, experiment.evaluators, folder)
    figures = {f"{when}/{name}": value for name, value in found.items()}
    trackers.log(figures)
    record.metrics |= figures

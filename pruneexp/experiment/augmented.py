"""The calibration windows of a run: those that are given, and those that join them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pruneexp.calibrate import Meter
from pruneexp.dataset import fingerprint
from pruneexp.experiment.measure import recall
from pruneexp.experiment.settings import Experiment
from pruneexp.fingerprint import code_version, version_of
from pruneexp.model import Model
from pruneexp.pruning.record import Record


def augment(experiment: Experiment, model: Model, given_NT: Tensor, basis: Mapping[str, Any], record: Record) -> Tensor:
    """The given windows and those that join them. What a model wrote before comes from the cache, since its text
    differs between machines; the meter is charged in either case. `basis`: what identifies the dense model, and how it
    is run."""
    join = experiment.augmentation
    if not join.added(*given_NT.shape):
        return given_NT
    made_by = {"augmentation": version_of(join), "seed": experiment.seed, "code": code_version("pruneexp.calibrate")}
    key = {"what": "calibration windows", **basis, **made_by, "given": fingerprint(given_NT)}

    def make() -> tuple[Tensor, float, float]:
        spent = Meter()
        return join(model, given_NT, spent, experiment.seed), spent.forward, spent.backward

    with record.clock("augment"):
        windows_NT, forward, backward = recall(experiment.cache, key, make)
    record.meter.forward += forward
    record.meter.backward += backward
    return windows_NT

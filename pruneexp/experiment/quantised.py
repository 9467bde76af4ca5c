"""The pruned model in fewer bits, where they are asked for, between its checkpoint and its evaluation."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pruneexp.experiment.measure import recall
from pruneexp.experiment.settings import Experiment
from pruneexp.fingerprint import code_version, version_of
from pruneexp.model import Model
from pruneexp.pruning.record import Record
from pruneexp.tracker import Trackers
from pruneexp.types import Quantise, size_text

logger = logging.getLogger("pruneexp")


def tell_quantised(quantise: Quantise, model: Model) -> dict[str, float]:
    """What a forecast says, printed; as metrics."""
    if not quantise.applies:
        return {}
    scratch = quantise.scratch_bytes(model)
    files = f"; in files of {tempfile.gettempdir()} for a while: about {size_text(scratch)}" if scratch else ""
    print(f"quantised afterwards: {quantise.note()}{files}")
    return {"forecast/disk/quantise_bytes": scratch} if scratch else {}


def warn_of_scratch(quantise: Quantise, model: Model) -> None:
    """Logs one line where the disk may have no room for what lies in files for a while."""
    scratch, folder = quantise.scratch_bytes(model), tempfile.gettempdir()
    if scratch > (free := shutil.disk_usage(folder).free):
        logger.warning(
            "quantise: about %s will lie in files of %s for a while, %s are free; what would help: TMPDIR on another "
            "disk",
            *(size_text(scratch), folder, size_text(free)),
        )


def card_line(quantise: Quantise, rounded: bool) -> str:
    """What a checkpoint's card says. `rounded`: the checkpoint has the weights of a model that was quantised in
    place."""
    if not quantise.applies:
        return ""
    own = "rounded so" if rounded and quantise.in_place else "as they were before, not quantised"
    return f"What was measured: {quantise.note()}. The weights in this folder are {own}."


def measure_quantised(
    experiment: Experiment,
    basis: Mapping[str, Any],
    model: Model,
    record: Record,
    trackers: Trackers,
    when: str,
    folder: Path | None,
) -> None:
    """Quantises the model as it is `when` ("dense", "pruned"), or has it converted, and takes figures down: the dense
    one's from the cache, where it says what they depend on. `basis`: what identifies the dense model and how it is run.
    `folder`: of the run, where a file of the model is kept."""
    quantise, evaluators = experiment.quantise, experiment.evaluators
    if not quantise.applies:
        return
    with record.clock("quantise"):
        compute = partial(quantise, model, when, evaluators, folder)
        measured_on = quantise.measured_on(model, evaluators) if when == "dense" else None
        if measured_on is None:
            measured = compute()
        else:
            code = code_version("pruneexp.dataset", "pruneexp.evaluator", type(quantise).__module__)
            own = {"quantise": version_of(quantise), "inputs": measured_on, "code": code}
            key = {"what": "the quantised dense model's figures", **basis, **own}
            measured = recall(experiment.cache, key, compute)
    figures = {f"{when}/{name}": value for name, value in measured.items()}
    trackers.log(figures)
    record.metrics |= figures

"""What is looked at before a run starts: room on the disk, and what the run will take."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pruneexp.forecast import Calibration, Forecast, forecast, params_left, size
from pruneexp.model import Model
from pruneexp.tracker import existing
from pruneexp.types import Budget, ConfigError

if TYPE_CHECKING:
    from pruneexp.experiment import Experiment


def check_disk(experiment: Experiment, model: Model, budget: Budget) -> None:
    """Raises ConfigError where the disk has no room for the pruned checkpoint (a streamed model is always written)."""
    settings = experiment.run
    if not settings.save and not experiment.model.stream:
        return
    method = experiment.method
    params, _ = params_left(model, method.search, method.sparsity, method.compensator, budget)
    folder = Path(settings.dir or "outputs")
    needed, free = params * model.dtype.itemsize, shutil.disk_usage(existing(folder)).free
    if settings.overwrite:  # an older checkpoint makes room
        free += sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    if free < needed:
        without = "" if experiment.model.stream else ", or run.save=false"
        raise ConfigError(
            f"run.dir={settings.dir!r}: the pruned checkpoint takes about {size(needed)}, {size(free)} are free on "
            f"the disk of {existing(folder).resolve()}; expected a folder on another disk{without}"
        )


def foreseen(experiment: Experiment, model: Model, budget: Budget, tokenizer: Any, tokens_NT: Tensor) -> Forecast:
    """What the run will take, as far as it is known now."""
    settings, measured = experiment.run, []
    for evaluator in experiment.evaluators.values():
        windows = getattr(evaluator, "windows", None)
        if windows is not None:
            count, length = windows(tokenizer).shape
            measured.append(Calibration(count, length, getattr(evaluator, "batch_size", 1)))
    return forecast(
        model,
        experiment.method,
        experiment.recovery,
        budget,
        Calibration(len(tokens_NT), tokens_NT.shape[1], model.batch_size),
        measured,
        stream=experiment.model.stream,
        prove=settings.prove if settings.save else "",
    )

"""What a run will take, before it is run: parameters, bytes on disk, memory, operations, time. Needs a model's
structure alone."""

from __future__ import annotations

from pruneexp.experiment.forecast.figures import Forecast, forecast
from pruneexp.experiment.forecast.machine import available_memory, matmul_speed, out_of_memory
from pruneexp.experiment.forecast.memory import PARTS, Stage, activations, stages
from pruneexp.experiment.forecast.shape import Shape, params_left, shape_of
from pruneexp.experiment.forecast.table import duration, print_forecast, size
from pruneexp.experiment.forecast.warn import warn_of_files, warn_of_memory
from pruneexp.experiment.forecast.work import (
    Calibration,
    Work,
    flops,
    path_flops,
    refit_flops,
    removal_flops,
    work_of,
)

__all__ = [
    "PARTS",
    "Calibration",
    "Forecast",
    "Shape",
    "Stage",
    "Work",
    "activations",
    "available_memory",
    "duration",
    "flops",
    "forecast",
    "matmul_speed",
    "out_of_memory",
    "params_left",
    "path_flops",
    "print_forecast",
    "refit_flops",
    "removal_flops",
    "shape_of",
    "size",
    "stages",
    "warn_of_files",
    "warn_of_memory",
    "work_of",
]

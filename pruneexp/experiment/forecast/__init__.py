"""What a run will take, before it is run: parameters, bytes on disk, memory by stage, passes over the calibration
windows. Needs a model's structure alone."""

from pruneexp.experiment.forecast.figures import Forecast, forecast
from pruneexp.experiment.forecast.machine import available_memory, out_of_memory, resident_memory
from pruneexp.experiment.forecast.memory import Running, Stage
from pruneexp.experiment.forecast.passes import Passes
from pruneexp.experiment.forecast.shape import Shape, Windows, params_left
from pruneexp.experiment.forecast.tell import print_forecast, warn_of_files, warn_of_memory
from pruneexp.experiment.forecast.timing import timing_stages

__all__ = [
    "Forecast",
    "Passes",
    "Running",
    "Shape",
    "Stage",
    "Windows",
    "available_memory",
    "forecast",
    "out_of_memory",
    "params_left",
    "print_forecast",
    "resident_memory",
    "timing_stages",
    "warn_of_files",
    "warn_of_memory",
]

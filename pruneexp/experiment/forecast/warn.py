"""A line of the log where a run needs more than there is."""

from __future__ import annotations

import logging
import shutil

from pruneexp.criterion.spill import spill_folder
from pruneexp.experiment.forecast.figures import Forecast
from pruneexp.experiment.forecast.table import size

logger = logging.getLogger("pruneexp")


def warn_of_files(found: Forecast) -> None:
    """Logs one line where the disk may have no room for what lies in files of TMPDIR for a while."""
    if found.files and found.files > (free := shutil.disk_usage(spill_folder()).free):
        logger.warning(
            "up to %s will lie in files of %s for a while, %s are free; what would help: TMPDIR on another disk, a "
            "smaller criterion.levels or search.offspring",
            size(found.files),
            spill_folder(),
            size(free),
        )


def warn_of_memory(found: Forecast, available: int) -> None:
    """Logs one line, with what would help, where a run takes more memory than there is."""
    peak = max(found.stages, key=lambda stage: stage.needed)
    if peak.needed <= available:
        return

    def weighs(part: str) -> bool:
        return peak.parts.get(part, 0) > peak.needed / 10

    helps = []
    if not found.streams and found.streamed and max(stage.needed for stage in found.streamed) < peak.needed:
        helps.append("model.stream=true")
    if weighs("activations"):
        helps.append("a smaller model.batch_size" if peak.name != "evaluate" else "a smaller batch_size of evaluators")
    if weighs("hidden states"):
        helps.append("fewer dataset.samples" if peak.name != "evaluate" else "fewer samples of evaluators")
    if weighs("kept") or peak.files:
        helps.append("a smaller criterion.memory")
    if peak.name == "prove":
        helps.append("run.prove=off")
    logger.warning(
        "about %s of memory will be needed (%s), %s are free%s",
        size(peak.needed),
        peak.name,
        size(available),
        f"; what would help: {', '.join(helps)}" if helps else "",
    )

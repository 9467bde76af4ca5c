"""A forecast for people: a table, and lines of the log where a run needs more than there is."""

from __future__ import annotations

import logging
import shutil
import sys
from typing import TYPE_CHECKING

from pruneexp.criterion.spill import spill_folder
from pruneexp.experiment.forecast.figures import Forecast
from pruneexp.experiment.forecast.memory import PARTS
from pruneexp.experiment.forecast.shape import Shape
from pruneexp.experiment.forecast.timing import TIMED
from pruneexp.types import size_text

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger("pruneexp")


def print_forecast(forecast: Forecast, *, dtype: str, available: int) -> None:
    """Structure, sizes, memory by stage, and passes. `available`: bytes of memory."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False, markup=False, emoji=False)
    console.print(_sizes(forecast, dtype))
    console.print(_memory(forecast))
    held = forecast.peak.parts.get("process", 0)
    beside = f", of which this process holds {size_text(held)} already" if held else ""
    free = f"{size_text(available)} are free here"
    console.print(
        f"memory at most: {size_text(forecast.peak.total)} ({forecast.peak.name}){beside}; {free}", soft_wrap=True
    )
    if forecast.files:
        files = f"in files of {spill_folder()} for a while: {size_text(forecast.files)} beyond criterion.memory"
        console.print(files, soft_wrap=True)
    if not forecast.streamed:
        console.print("model.stream=true is not possible with these methods")
    passes = forecast.passes
    console.print(f"passes over the calibration windows: {passes.forward:.3g} forward, {passes.backward:.3g} backward")


def _sizes(forecast: Forecast, dtype: str) -> Table:
    table = _table("", "dense", "pruned", "change")
    shape = forecast.shape
    for what, value in _structure(shape):
        table.add_row(what, value, "", "")
    for what, dense, pruned in (
        ("parameters", shape.params, forecast.params_left),
        ("decoder parameters", shape.decoder, forecast.decoder_left),
    ):
        table.add_row(what, f"{dense:,}", f"{pruned:,}", f"{100 * (pruned / dense - 1):+.1f} %" if dense else "")
    table.add_row(f"on disk, {dtype}", size_text(shape.bytes), size_text(forecast.bytes_left), "")
    return table


def _structure(shape: Shape) -> list[tuple[str, str]]:
    rows = [("layers", f"{len(shape.layers)}"), ("hidden size", f"{shape.hidden:,}")]
    for kind, unit in (("attention", "heads (KV groups) a layer"), ("mlp", "FFN channels a layer")):
        counts = [sum(s.units for s in shape.of_layer(i) if s.kind == kind) for i in range(len(shape.layers))]
        low, high = min(counts, default=0), max(counts, default=0)
        rows.append((unit, f"{low:,}" if low == high else f"{low:,} to {high:,}"))
    return rows


def _memory(forecast: Forecast) -> Table:
    both = {"held": forecast.held, "streamed": forecast.streamed}
    shown = [part for part in PARTS if any(stage.parts.get(part) for stages in both.values() for stage in stages)]
    table = _table("memory", *(part.replace(" ", "\n") for part in shown), "in all")
    for how, stages in both.items():
        if stages:
            table.add_row(how)
        for stage in stages:
            sizes = (stage.parts.get(part) for part in shown)
            table.add_row(f"  {stage.name}", *(size_text(own) if own else "" for own in sizes), size_text(stage.total))
    return table


def _table(*columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, safe_box=True)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def warn_of_files(forecast: Forecast) -> None:
    """Logs one line where the disk may have no room for what lies in files of TMPDIR for a while."""
    if forecast.files and forecast.files > (free := shutil.disk_usage(spill_folder()).free):
        logger.warning(
            "up to %s will lie in files of %s for a while, %s are free; what would help: TMPDIR on another disk, a "
            "smaller criterion.levels or search.offspring",
            size_text(forecast.files),
            spill_folder(),
            size_text(free),
        )


def warn_of_memory(forecast: Forecast, available: int) -> None:
    """Logs one line, with what would help, where a run takes more memory than there is."""
    peak = max(forecast.stages, key=lambda stage: stage.needed)
    if peak.needed <= available:
        return

    def weighs(part: str) -> bool:
        return peak.parts.get(part, 0) > peak.needed / 10

    helps = []
    if not forecast.streams and forecast.streamed and max(stage.needed for stage in forecast.streamed) < peak.needed:
        helps.append("model.stream=true")
    if weighs("activations"):
        batch = {"evaluate": "a smaller batch_size of evaluators"}
        batch |= {name: "a smaller sparsity.batch or sparsity.context" for name in TIMED}
        helps.append(batch.get(peak.name, "a smaller model.batch_size"))
    if weighs("hidden states"):
        helps.append("fewer dataset.samples" if peak.name != "evaluate" else "fewer samples of evaluators")
    if weighs("kept") or peak.files:
        helps.append("a smaller criterion.memory")
    if peak.name == "prove":
        helps.append("run.prove=off")
    logger.warning(
        "about %s of memory will be needed (%s), %s are free%s",
        size_text(peak.needed),
        peak.name,
        size_text(available),
        f"; what would help: {', '.join(helps)}" if helps else "",
    )

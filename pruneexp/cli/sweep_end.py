"""What a tracker is given of a sweep once it has ended: its table and its figures."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from pruneexp.cli.compose import Composed
from pruneexp.progress import progress
from pruneexp.report.sweep_table import sweep_table
from pruneexp.types import RunRecord, Tracker, one_line


def hand_over(config: DictConfig, folder: Path, group: str) -> None:
    """Hands the sweep, as its folders hold it, to a tracker that takes sweeps, under the name `group`. Whatever goes
    wrong here, the sweep is done."""
    from pruneexp.cli.build import Builder

    try:
        node = OmegaConf.to_container(config.tracker, resolve=True)
        tracker = Builder(Composed({"tracker": node}, {}, ())).part("tracker", Tracker)
        summarise = tracker.summarise
        if summarise is None:
            return
        from pruneexp.report.contents import report
        from pruneexp.report.figures import as_png
        from pruneexp.report.folders import find

        read = find([folder], "same")
        pictures = report(read, [folder]).pictures if read.runs else []
        figures = {one.name: (one.caption, as_png(one.figure)) for one in progress(pictures, "draw", unit="figures")}
        record = RunRecord(folder, {}, group, f"{group}-summary", "summary")
        summarise(record, *sweep_table(folder), figures)
    except Exception as error:
        print(f"pruneexp: no summary of the sweep for the tracker: {one_line(error)}", file=sys.stderr)

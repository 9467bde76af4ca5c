"""Where a run's record goes: the run folder, always, and a tracking service where one is chosen.

A tracker has five methods, called in this order: `start`, `log` (any number of times), `artifacts`, then `finish`, or
`fail` when the run dies. `Trackers` calls several as one, so that the runner never asks which ones there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pruneexp.tracker.checkpoint_files import PROOF
from pruneexp.tracker.environment import memory_metrics, reset_peak_memory
from pruneexp.tracker.folder import CHOSEN, NOTES, SCORED, check_folder, clear_unfinished, run_folder, status_of
from pruneexp.tracker.local import LocalRun, flat_metrics
from pruneexp.tracker.weights_and_biases import Wandb
from pruneexp.types import Plan, RunRecord, Scores, Site, Tracker, filled
from pruneexp.types.defaults import TRACKER

__all__ = ["CHOSEN", "NOTES", "PROOF", "SCORED", "Local", "LocalRun", "Trackers", "Wandb", "check_folder"]
__all__ += ["clear_unfinished", "flat_metrics", "memory_metrics", "reset_peak_memory", "run_folder", "status_of"]


@dataclass(frozen=True)
class Local:
    """Nothing beside the run folder."""

    def start(self, record: RunRecord) -> None: ...

    def log(self, metrics: Mapping[str, float]) -> None: ...

    def artifacts(self, plan: Plan, scores: Scores, sites: Sequence[Site]) -> None: ...

    def finish(self, metrics: Mapping[str, float]) -> None: ...

    def fail(self, reason: str, trace: str = "") -> None: ...


@dataclass(frozen=True)
class Trackers:
    """Several trackers as one; the local run comes first.

    What is written goes first to last, so that the others find the run folder's files; the end goes last to first, so
    that `metrics.json`, which says that a run is done, is the last thing written."""

    members: tuple[Tracker, ...]

    def start(self, record: RunRecord) -> None:
        for member in self.members:
            member.start(record)

    def log(self, metrics: Mapping[str, float]) -> None:
        for member in self.members:
            member.log(metrics)

    def artifacts(self, plan: Plan, scores: Scores, sites: Sequence[Site]) -> None:
        for member in self.members:
            member.artifacts(plan, scores, sites)

    def finish(self, metrics: Mapping[str, float]) -> None:
        """Raises RunError, before any member has finished, for a metric that is no finite number."""
        checked = flat_metrics(metrics)
        for member in reversed(self.members):
            member.finish(checked)

    def fail(self, reason: str, trace: str = "") -> None:
        for member in reversed(self.members):
            member.fail(reason, trace)


for _tracker in (Local, Wandb):
    filled(_tracker, TRACKER)

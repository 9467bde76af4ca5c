"""What trackers satisfy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pruneexp.types.nouns import RunRecord, Scores
from pruneexp.types.plan import Plan
from pruneexp.types.site import Site


class Tracker(Protocol):
    """Where a run's record goes. Called in this order; `fail` instead of `finish` when the run dies. `trace`: the
    traceback of what killed it, where it is no user's mistake. `summarise(record, header, rows, figures)`, unless None:
    takes a sweep's table and figures once it has ended."""

    summarise: Any

    def start(self, record: RunRecord) -> None: ...

    def log(self, metrics: Mapping[str, float]) -> None: ...

    def artifacts(self, plan: Plan, scores: Scores, sites: Sequence[Site]) -> None: ...

    def finish(self, metrics: Mapping[str, float]) -> None: ...

    def fail(self, reason: str, trace: str = "") -> None: ...

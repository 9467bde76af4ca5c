"""What pruning leaves behind on its way, and where it keeps what it finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from pruneexp.cache import NoCache
from pruneexp.calibrate import Bookmark, Meter
from pruneexp.pruning.dense_evidence import Results
from pruneexp.pruning.notes import Notes


def _nothing(index: int) -> None:
    """A model in memory has nothing to write layer by layer."""


@dataclass
class Record:
    """`rng`: what is drawn while pruning. `metrics`: figures so far, seconds/<stage> among them. `meter`: passes spent.
    `results`: where scores and statistics of the dense model are kept. `notes`: where it is noted how far each walk has
    come. `shrunk`: called with each layer's index while the shrunk layer is at hand."""

    rng: torch.Generator = field(default_factory=torch.Generator)
    metrics: dict[str, float] = field(default_factory=dict)
    meter: Meter = field(default_factory=Meter)
    results: Results = field(default_factory=lambda: Results(NoCache(), {}))
    notes: Notes = field(default_factory=lambda: Notes(None))
    shrunk: Callable[[int], None] = _nothing

    def bookmark(self, stage: str, state: Callable[[], Any] = lambda: None) -> Bookmark:
        """Where the walk that shrinks stands. `state`: what it is to go on from, besides."""
        return self.notes.bookmark("shrink", Bookmark(self.meter, stage), state, writing=True)

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Adds the time spent inside to seconds/<stage>."""
        start = time.perf_counter()
        try:
            yield
        finally:
            key = f"seconds/{stage}"
            self.metrics[key] = self.metrics.get(key, 0.0) + time.perf_counter() - start

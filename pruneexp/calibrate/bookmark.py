"""Where a walk through the layers stands, and what calibration has spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pruneexp.progress import progress

SHARE = 0.1  # of the time that walking takes: so much may go into notes


@dataclass
class Meter:
    """What calibration spent, in plain passes of all decoder layers over the calibration windows."""

    forward: float = 0.0
    backward: float = 0.0


@dataclass
class Bookmark:
    """Where a walk through the layers stands: what it has read, noted and spent in front of layer `index`.

    `meter`: charged for what it spends. `stage`: what its progress is shown as. `hidden`: hidden states in front of
    that layer, batch by batch; of several models, one list each. `state`: what the walk's caller had noted by then,
    None at the start.
    """

    meter: Meter
    stage: str
    index: int = 0
    hidden: list[list[Tensor]] = field(default_factory=list)
    state: Any = None
    forward: float = 0.0  # passes spent in all
    note: Callable[[Bookmark], None] | None = None
    _noted: float = field(default_factory=time.monotonic)
    _cost: float = 0.0  # seconds that the last note took

    def layers(self, total: int) -> Iterable[int]:
        """The indices that are left of `total` layers, with a progress bar; the meter shows what was spent by then."""
        if self.index:
            self.meter.forward = self.forward
        indices = range(self.index, total)
        return progress(indices, self.stage, len(indices), "blocks")

    def reached(self, index: int, last: int, hidden: Sequence[list[Tensor]]) -> None:
        """All before layer `index` of `last` is done. Noted once that is cheap beside the time spent since."""
        done = index == last
        if self.note is None or not (done or self._cost <= SHARE * (time.monotonic() - self._noted)):
            return
        start = time.monotonic()
        self.index, self.hidden, self.forward = index, [] if done else list(hidden), self.meter.forward
        self.note(self)
        self.hidden = []
        self._noted = time.monotonic()
        self._cost = self._noted - start

    def take_hidden(self, device: torch.device) -> list[list[Tensor]]:
        """What `hidden` says, on `device`; held here no longer."""
        hidden, self.hidden = self.hidden, []
        return [[tensor.to(device) for tensor in batches] for batches in hidden]

"""Where a walk through the blocks stands."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SHARE = 0.1  # of the time that walking takes, at most, goes into noting how far it has come


@dataclass
class Bookmark:
    """Where a walk through the blocks stands: what it has read, found and spent in front of block `index`.

    `hidden`: hidden states in front of that block, batch by batch; of several models, one list each. `found`: what
    the walk's caller had noted by then, None at the start.
    """

    index: int = 0
    hidden: list[list[Tensor]] = field(default_factory=list)
    found: Any = None
    forward: float = 0.0  # passes spent in all
    note: Callable[[Bookmark], None] | None = None
    _noted: float = field(default_factory=time.monotonic)
    _cost: float = 0.0  # seconds that the last note took

    def reached(self, index: int, last: int, hidden: Sequence[list[Tensor]], forward: float) -> None:
        """All before block `index` of `last` is done. Noted once that is cheap beside the time spent since."""
        done = index == last
        if self.note is None or not (done or self._cost <= SHARE * (time.monotonic() - self._noted)):
            return
        start = time.monotonic()
        self.index, self.hidden, self.forward = index, [] if done else list(hidden), forward
        self.note(self)
        self.hidden = []
        self._noted = time.monotonic()
        self._cost = self._noted - start

    def take_hidden(self, device: torch.device) -> list[list[Tensor]]:
        """What `hidden` says, on `device`; held here no longer."""
        hidden, self.hidden = self.hidden, []
        return [[tensor.to(device) for tensor in batches] for batches in hidden]

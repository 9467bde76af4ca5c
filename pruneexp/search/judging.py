"""Judging structures by an oracle's losses: what it costs, and what may still be spent."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pruneexp.types import Candidate, Oracle, Plan, RunError

log = logging.getLogger("pruneexp")

_AT_ONCE = 3  # structures whose out-projections may all differ, that are held together

Tried = tuple[Plan, Sequence[int], Tensor]  # a structure, batches, and its losses on them: [batches, 1]


@dataclass
class Judge:
    """Losses of structures on batches of the windows that decide, within a search's effort."""

    method: Any  # an `Evolutionary`, which says what each setting means
    oracle: Oracle
    rng: torch.Generator
    judged: int = 0
    skipped: int = 0
    trials: int = field(init=False)  # that are left, and are paid for
    spent_before: float = field(init=False)

    def __post_init__(self) -> None:
        self.spent_before = self.oracle.passes
        self.trials = self.method.trials

    @property
    def left(self) -> float:
        """Passes that may still be spent."""
        return self.method.effort - self.trials * self.method.trial_price - (self.oracle.passes - self.spent_before)

    def count(self, share: float) -> int:
        """Batches that hold about a share of the windows that decide: at least one."""
        return max(1, round(share * self.oracle.batches))

    def price(self, structures: int, share: float) -> float:
        """Passes that judging so many structures costs at most: those that begin alike share layers."""
        return structures * self.count(share) / self.oracle.batches * self.method.deciding

    def affordable(self, structures: int, part: float) -> float | None:
        """The share of the windows that decide, `tokens` at most, on which so many structures cost no more than a part
        of the effort; None where a single batch is too dear."""
        share = part * self.method.effort / (structures * self.method.deciding)
        share = min(self.method.tokens, math.floor(share * self.oracle.batches) / self.oracle.batches)
        return share if share > 0 and self.left >= self.price(structures, share) else None

    def draw(self, share: float) -> list[int]:
        """Numbers of batches drawn at random."""
        return torch.randperm(self.oracle.batches, generator=self.rng)[: self.count(share)].tolist()

    def measure(self, candidates: Sequence[Candidate], batches: Sequence[int], last: bool = True) -> Tensor:
        """Loss of each on each of the batches, Inf where it is not finite: float64 [batches, len(candidates)]."""
        losses = torch.stack([self.oracle.losses(candidates, batch) for batch in batches])
        broken = ~losses.isfinite().all(0)
        self.judged += len(candidates)
        self.skipped += int(broken.sum())
        if last and self.skipped == self.judged:  # of those before `last`, others may be finite
            raise RunError(f"search: none of {self.judged} calibration losses is finite")
        return losses.masked_fill(broken, math.inf)

    def in_parts(self, makers: Sequence[Callable[[], Candidate]], batches: Sequence[int]) -> Tensor:
        """`measured`, few at a time, since the out-projections of structures may all be different."""
        ends = range(_AT_ONCE, len(makers) + _AT_ONCE, _AT_ONCE)
        parts = ([make() for make in makers[end - _AT_ONCE : end]] for end in ends)
        return torch.cat([self.measure(p, batches, end >= len(makers)) for p, end in zip(parts, ends, strict=True)], 1)

    def try_compensated(self, plans: Mapping[str, Plan], batches: Sequence[int]) -> list[Tried]:
        """Each as the run will compensate it; one at a time, since all their out-projections differ."""
        share, tried = self.method.tokens, []
        for name, plan in plans.items():
            self.trials = max(0, self.trials - 1)
            loss = self.measure([self.oracle.trial(plan, share)], batches)
            log.info("search: compensated, %s %.4f", name, float(loss.mean()))
            tried.append((plan, batches, loss))
        return tried

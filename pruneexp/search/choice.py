"""Choosing among structures by their losses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pruneexp.search.levels import Levels


def distinct(population: Sequence[Levels]) -> list[Levels]:
    return list({tuple(levels.items()): levels for levels in population}.values())


def least(losses: Tensor) -> int:
    """The number of the structure of least mean loss, of `losses` [batches, structures]; 0 where its lead over the
    first is within the standard error of the difference over batches."""
    best = int(losses.mean(0).argmin())
    lead = losses[:, 0] - losses[:, best]
    error = lead.std() / math.sqrt(len(lead)) if len(lead) > 1 else torch.zeros(())
    return 0 if lead.mean() <= error else best

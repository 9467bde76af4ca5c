"""Windows held out from the others."""

from __future__ import annotations

import torch
from torch import Tensor


def split(windows: int, held: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The windows to hold out, one drawn from each of so many stretches of equal length, so that every source of a
    mixture has its share, in whatever order they come; and the others."""
    bounds = torch.arange(held + 1) * windows // held
    drawn = (torch.rand(held, generator=rng) * (bounds[1:] - bounds[:-1])).long()
    held_B = bounds[:-1] + drawn
    others = torch.ones(windows, dtype=torch.bool)
    others[held_B] = False
    return held_B, others.nonzero().flatten()

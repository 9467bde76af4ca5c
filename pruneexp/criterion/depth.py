"""Importance of whole blocks: ShortGPT and SLEB."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from pruneexp.evidence import BlockChange, LossWithout
from pruneexp.types import Block, Score


@dataclass(frozen=True)
class BlockInfluence:
    """ShortGPT's block influence (Men et al., 2024): 1 - mean_t cos(x_t, y_t), x a block's input and y its output.

    distance=cosine is the paper's; angular: mean_t arccos(cos(x_t, y_t)) / pi.
    """

    evidence: ClassVar[type[BlockChange]] = BlockChange
    sequential: ClassVar[bool] = False
    judges: ClassVar[tuple[str, ...]] = ("block",)

    distance: Literal["cosine", "angular"]

    def __call__(self, block: Block, evidence: Mapping[str, BlockChange]) -> dict[str, Score]:
        scores: dict[str, Score] = {}
        for site in block.sites:
            seen = evidence[site.name]
            value = 1 - seen.mean_cosine if self.distance == "cosine" else seen.mean_angle
            scores[site.name] = torch.tensor([value], dtype=torch.float64)
        return scores


@dataclass(frozen=True)
class LossDrop:
    """What the calibration loss rises by when a block is skipped: the metric of SLEB (Song et al., ICML 2024).

    Of the whole model: the first round of SLEB. With `search=greedy` it is measured anew after every removal.
    """

    evidence: ClassVar[type[LossWithout]] = LossWithout
    sequential: ClassVar[bool] = False
    judges: ClassVar[tuple[str, ...]] = ("block",)

    def __call__(self, block: Block, evidence: Mapping[str, LossWithout]) -> dict[str, Score]:
        return {s.name: torch.tensor([evidence[s.name].rise], dtype=torch.float64) for s in block.sites}

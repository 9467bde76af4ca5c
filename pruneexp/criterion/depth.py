"""Importance of whole layers and whole sublayers: ShortGPT, SLEB, and attention or FFNs dropped alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from pruneexp.evidence import BlockChange, LossWithout
from pruneexp.types import Block, Score, Scores, unit_scores

DEAREST = 1e9  # nats: the rise of a loss that is not finite


@dataclass(frozen=True)
class BlockInfluence:
    """ShortGPT's block influence (Men et al., 2024): 1 - mean_t cos(x_t, y_t), x a layer's input and y its output.

    Of a whole sublayer (He et al., "What matters in transformers?", 2024): x and y the residual stream before and after
    it, which a model has that normalises in front of its sublayers.

    distance=cosine is the paper's; angular: mean_t arccos(cos(x_t, y_t)) / pi.

    Beside a criterion of units, where a search asks for it, each unit has the score of its whole layer.
    """

    evidence: ClassVar[type[BlockChange]] = BlockChange
    judges: ClassVar[tuple[str, ...]] = ("sublayer", "block")

    distance: Literal["cosine", "angular"]

    def __call__(self, block: Block, evidence: Mapping[str, BlockChange]) -> dict[str, Score]:
        scores: dict[str, Score] = {}
        for site in block.sites:
            seen = evidence[site.name]
            value = 1 - seen.mean_cosine if self.distance == "cosine" else seen.mean_angle
            scores[site.name] = torch.full((site.units,), value, dtype=torch.float64)
        return scores


@dataclass(frozen=True)
class LossDrop:
    """What the calibration loss rises by when a layer is skipped: the metric of SLEB (Song et al., ICML 2024). Of a
    whole sublayer: when only its out-projection's bias is left.

    Of the whole model: the first round of SLEB. With `search=greedy` it is measured anew after every removal. Without a
    finite loss (an overflow of float16, say) a layer is one of the dearest: a rise of `DEAREST`.
    """

    evidence: ClassVar[type[LossWithout]] = LossWithout
    judges: ClassVar[tuple[str, ...]] = ("sublayer", "block")

    def __call__(self, block: Block, evidence: Mapping[str, LossWithout]) -> dict[str, Score]:
        rises = {site.name: min(evidence[site.name].rise, DEAREST) for site in block.sites}
        return {name: torch.tensor([rise], dtype=torch.float64) for name, rise in rises.items()}

    def lost(self, scores: Scores) -> int:
        """How many of its scores stand for a loss that was not finite."""
        return sum(int((unit_scores(score) == DEAREST).sum()) for score in scores.values())

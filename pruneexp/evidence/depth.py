"""What whole layers do: to the hidden states that pass through them, and to the loss when they are gone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruneexp.evidence.statistics import _require_tokens, wide
from pruneexp.types import RunError, Site


@dataclass(frozen=True)
class BlockChange:
    """How far a layer turns the hidden states: sums over tokens of cos(x, y) and of arccos(cos(x, y)) / pi, in float64,
    each cosine in float32 (float64 for float64 states). Source "block"."""

    source: ClassVar[str] = "block"

    n: int  # tokens
    cosine: float
    angle: float

    @classmethod
    def empty(cls, site: Site) -> BlockChange:
        return cls(0, 0.0, 0.0)

    def update_(self, x_BTD: Tensor, y_BTD: Tensor) -> BlockChange:
        cosine_BT = torch.nn.functional.cosine_similarity(wide(x_BTD), wide(y_BTD), dim=-1).double().clamp(-1, 1)
        angle = (cosine_BT.arccos() / torch.pi).sum().item()
        return self.merge(BlockChange(cosine_BT.numel(), cosine_BT.sum().item(), angle))

    def merge(self, other: BlockChange) -> BlockChange:
        return BlockChange(self.n + other.n, self.cosine + other.cosine, self.angle + other.angle)

    @property
    def mean_cosine(self) -> float:
        """Raises RunError without tokens."""
        _require_tokens(self.n, 1)
        return self.cosine / self.n

    @property
    def mean_angle(self) -> float:
        """As a share of a half turn. Raises RunError without tokens."""
        _require_tokens(self.n, 1)
        return self.angle / self.n


@dataclass(frozen=True)
class LossWithout:
    """The calibration loss with the site's unit off, and that of the whole model. Source "probe"."""

    source: ClassVar[str] = "probe"

    without: float | None
    whole: float | None

    @staticmethod
    def passes(windows: int, sites: Sequence[Site]) -> tuple[float, float]:
        """The whole model, and without each site, which shares the layers in front of it."""
        layers = 1 + max((site.layer for site in sites), default=0)
        return 1 + sum((layers - site.layer) / layers for site in sites), 0.0

    @classmethod
    def empty(cls, site: Site) -> LossWithout:
        return cls(None, None)

    def update_(self, without: float, whole: float) -> LossWithout:
        return LossWithout(without, whole)

    def merge(self, other: LossWithout) -> LossWithout:
        raise RunError("losses of all calibration windows are one measurement and cannot be merged")

    @property
    def rise(self) -> float:
        """Inf where the loss without the unit is no number. Raises RunError where it was not measured, or the whole
        model's is no number."""
        if self.without is None or self.whole is None:
            raise RunError("the loss without this layer was not measured")
        if not math.isfinite(self.whole):
            raise RunError("the calibration loss of the whole model is NaN or Inf")
        return self.without - self.whole if math.isfinite(self.without) else math.inf

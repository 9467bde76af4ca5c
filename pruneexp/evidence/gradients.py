"""Loss gradients of a site's weights: source "gradient", `update_(gradients, windows)`.

`gradients` are the gradients of the mean next-token loss of a batch of `windows` windows, laid out as the weights are.
Kept in float32 (float64 for float64 weights). Memory: as much as the site's weights, or twice that, in that precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pruneexp.evidence.statistics import wide
from pruneexp.types import RunError, Site, SiteWeights


@dataclass(frozen=True)
class Gradient:
    """Gradient of the mean loss over all windows: one backward pass a batch."""

    source: ClassVar[str] = "gradient"

    n: int  # windows
    total: SiteWeights | None  # n times the gradient of the mean loss

    @staticmethod
    def passes(windows: int, sites: Sequence[Site]) -> tuple[float, float]:
        return 1.0, 1.0

    @staticmethod
    def held_bytes(site: Site, outputs: int, itemsize: int) -> int:
        """A batch's gradients, and their sum."""
        return site.units * site.cost.params * (itemsize + max(4, itemsize))

    @classmethod
    def empty(cls, site: Site) -> Gradient:
        return cls(0, None)

    def update_(self, gradients: SiteWeights, windows: int) -> Gradient:
        return self.merge(Gradient(windows, mapped(lambda g: wide(g) * windows, gradients)))

    def merge(self, other: Gradient) -> Gradient:
        return Gradient(self.n + other.n, _sum(self.total, other.total))

    @property
    def mean(self) -> SiteWeights:
        """dL/dw. Raises RunError without windows."""
        return _over(self.total, self.n)


@dataclass(frozen=True)
class PerSampleGradient:
    """Gradient of the mean loss, and the mean over windows of each window's squared gradient (the diagonal of the
    empirical Fisher matrix): one backward pass a window."""

    source: ClassVar[str] = "gradient"
    per_sample: ClassVar[bool] = True

    n: int  # windows
    total: SiteWeights | None
    total_square: SiteWeights | None

    @staticmethod
    def passes(windows: int, sites: Sequence[Site]) -> tuple[float, float]:
        return 1.0, 1.0

    @staticmethod
    def held_bytes(site: Site, outputs: int, itemsize: int) -> int:
        """A window's gradients, and both sums."""
        return site.units * site.cost.params * (itemsize + 2 * max(4, itemsize))

    @classmethod
    def empty(cls, site: Site) -> PerSampleGradient:
        return cls(0, None, None)

    def update_(self, gradients: SiteWeights, windows: int) -> PerSampleGradient:
        if windows != 1:
            raise ValueError(f"windows={windows}: expected one window at a time")
        own = mapped(wide, gradients)
        return self.merge(PerSampleGradient(1, own, mapped(lambda g: g.square(), own)))

    def merge(self, other: PerSampleGradient) -> PerSampleGradient:
        total, square = _sum(self.total, other.total), _sum(self.total_square, other.total_square)
        return PerSampleGradient(self.n + other.n, total, square)

    @property
    def mean(self) -> SiteWeights:
        """dL/dw. Raises RunError without windows."""
        return _over(self.total, self.n)

    @property
    def mean_square(self) -> SiteWeights:
        """Mean over windows of (dL_window/dw)^2. Raises RunError without windows."""
        return _over(self.total_square, self.n)


def mapped(function: Callable[..., Tensor], first: SiteWeights, *others: SiteWeights) -> SiteWeights:
    """`function` of the tensors that have the same place."""
    bias = None
    if first.out_projection_bias is not None:
        bias = function(first.out_projection_bias, *(o.out_projection_bias for o in others))
    return SiteWeights(
        {role: function(w, *(o.in_projections[role] for o in others)) for role, w in first.in_projections.items()},
        {
            role: function(b, *(o.in_projection_biases[role] for o in others))
            for role, b in first.in_projection_biases.items()
        },
        function(first.out_projection, *(o.out_projection for o in others)),
        bias,
    )


def _sum(a: SiteWeights | None, b: SiteWeights | None) -> SiteWeights | None:
    if a is None or b is None:
        return a or b
    return mapped(lambda x, y: x + y, a, b)


def _over(total: SiteWeights | None, n: int) -> SiteWeights:
    if total is None:
        raise RunError("0 calibration windows were seen: expected at least 1")
    return mapped(lambda x: x / n, total)

"""Second derivatives of the loss by units' gates and by weights: source "influence", `update_(batch)`.

An `Influence` stands where a criterion names an evidence type: it says which derivatives are taken, and how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from pruneexp.types import RunError, Site, require_least, require_within


@dataclass(frozen=True)
class Influence:
    """What the loss L(m, w) does when gates m move (every unit has one, which scales what it hands to its
    out-projection, and stands at 1) and the weights w answer: H_mw (H_ww + lambda I)^-1 H_wm, with H the second
    derivatives of L.

    directions  together: the matrix times 1, all gates moved at once, the sums of its rows; apart: its diagonal, gate
                by gate, where w is without the moved unit's own weights: those of the survivors
    weights     w is all matrices of all sites (coupled), or the out-projections
    hessian     by central differences of gradients, `step` the length of a step in all gates or weights; or by
                differentiating twice (exact), to which, unlike to a step, a ReLU has no kink
    inverse     damping: u / lambda for (H_ww + lambda I)^-1 u, lambda = `damping`; conjugate_gradient: at most `steps`
                steps, lambda = `damping` times the curvature along u; it stops where the curvature is not positive
    windows     calibration windows that are looked at, the first ones; None: all
    batches     parts that they are split into, each with derivatives of its own
    """

    source: ClassVar[str] = "influence"
    by_window: ClassVar[bool] = True
    by_unit: ClassVar[bool] = True

    directions: Literal["together", "apart"]
    weights: Literal["coupled", "readers"]
    hessian: Literal["finite_difference", "exact"]
    step: float
    inverse: Literal["damping", "conjugate_gradient"]
    damping: float
    steps: int
    windows: int | None
    batches: int

    def __post_init__(self) -> None:
        require_within(self, "(0, inf)", "step")
        if self.inverse == "conjugate_gradient":
            require_within(self, "[0, inf)", "damping")
        else:
            require_within(self, "(0, inf)", "damping", besides=" with inverse=damping, which divides by it")
        require_least(self, 1, "steps", "batches")
        require_least(self, 1, "windows", besides=", or null for all")

    @property
    def wide(self) -> bool:
        """Whether the rounding of half precision would hide what is measured."""
        return self.hessian == "finite_difference"

    def passes(self, windows: int, sites: Sequence[Site]) -> tuple[float, float]:
        """Along one direction two forward and two backward by finite differences, one and three exactly; together, two
        directions and one for each step of conjugate gradients; apart, one and the steps for every unit."""
        forward, backward = (1, 3) if self.hessian == "exact" else (2, 2)
        solve = self.steps if self.inverse == "conjugate_gradient" else 0
        products = 2 + solve if self.directions == "together" else sum(s.units for s in sites) * (1 + solve)
        share = products * min(self.windows or windows, windows) / windows
        return share * forward, share * backward

    def held_bytes(self, site: Site, outputs: int, itemsize: int) -> int:
        """Seven times the weights, five with inverse=damping: gradients, directions, and what the solve keeps."""
        return (7 if self.inverse == "conjugate_gradient" else 5) * site.units * site.cost.params * max(4, itemsize)

    def empty(self, site: Site) -> GateDerivatives:
        return GateDerivatives(())


@dataclass(frozen=True)
class BatchDerivatives:
    """What one part of the windows says about the gates of a site (or of several), [U] each, float64."""

    slope_U: Tensor  # dL/dm
    curvature_U: Tensor  # apart: diagonal of H_mm; together: its empirical Fisher, mean over windows of squared slopes
    retraining_U: Tensor  # H_mw (H_ww + lambda I)^-1 H_wm: sums of its rows (together) or its diagonal (apart)

    def part(self, start: int, units: int) -> BatchDerivatives:
        at = slice(start, start + units)
        return BatchDerivatives(self.slope_U[at], self.curvature_U[at], self.retraining_U[at])


@dataclass(frozen=True)
class GateDerivatives:
    """Derivatives by a site's gates, one entry for each part of the windows."""

    source: ClassVar[str] = "influence"

    parts: tuple[BatchDerivatives, ...]

    def update_(self, batch: BatchDerivatives) -> GateDerivatives:
        return GateDerivatives((*self.parts, batch))

    def merge(self, other: GateDerivatives) -> GateDerivatives:
        return GateDerivatives((*self.parts, *other.parts))

    @property
    def batches(self) -> tuple[BatchDerivatives, ...]:
        """The parts. Raises RunError without any."""
        if not self.parts:
            raise RunError("0 calibration windows were seen: expected at least 1")
        return self.parts

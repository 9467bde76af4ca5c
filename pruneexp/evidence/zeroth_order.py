"""Gradients from forward passes alone: source "zeroth_order", `update_(direction, slope)`.

A `Perturbation` stands where a criterion names an evidence type: it says which directions are tried, and what is made
of the slopes measured along them. Directions are never stored; they are drawn again from their seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pruneexp.evidence.gradients import _over, _sum, mapped
from pruneexp.types import RunError, Site, SiteWeights, require_least, require_within


@dataclass(frozen=True)
class Perturbation:
    """Simultaneous perturbation (SPSA): the loss at +epsilon z and at -epsilon z along random directions z.

    perturb=weights: z has an entry for every weight of every in-projection and out-projection; gates: one for every
    unit, which scales what the unit hands to its out-projection by 1 + epsilon z. distribution: gaussian (standard
    normal) or rademacher (+-1).
    windows: calibration windows on which one direction is measured, taken in turn; None: all of them.
    """

    source: ClassVar[str] = "zeroth_order"

    perturb: Literal["weights", "gates"]
    directions: int
    epsilon: float
    distribution: Literal["gaussian", "rademacher"]
    estimate: Literal["multiply", "divide"]
    windows: int | None
    seed: int

    def __post_init__(self) -> None:
        require_least(self, 1, "directions")
        require_least(self, 1, "windows", besides=", or null for all")
        require_within(self, "(0, inf)", "epsilon")

    @property
    def by_unit(self) -> bool:
        return self.perturb == "gates"

    def passes(self, windows: int, sites: Sequence[Site]) -> tuple[float, float]:
        """The loss on both sides of every direction."""
        return 2 * self.directions * min(self.windows or windows, windows) / windows, 0.0

    def held_bytes(self, site: Site, outputs: int, itemsize: int) -> int:
        """The sum in float32, and the new one beside it."""
        return 2 * 4 * site.units * (site.cost.params if self.perturb == "weights" else 1)

    def empty(self, site: Site) -> DirectionalGradient:
        return DirectionalGradient(0, None, self.estimate == "divide")

    def draw(self, number: int, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        """Direction `number` of the tensor called `name`: float32, the same whenever it is asked for."""
        digest = hashlib.sha256(f"{self.seed}:{number}:{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        if self.distribution == "rademacher":
            return 2.0 * torch.randint(0, 2, shape, generator=generator, device=device, dtype=torch.float32) - 1
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)


@dataclass(frozen=True)
class DirectionalGradient:
    """Mean over directions z of slope * z, unbiased for gradients of independent z (or of slope / z, classical SPSA,
    the same for z = +-1 and of unbounded variance for Gaussian z). SiteWeights, or [U] for gates."""

    source: ClassVar[str] = "zeroth_order"

    n: int  # directions
    total: SiteWeights | None  # of gates: in the place of the out-projection
    divide: bool

    def update_(self, direction: SiteWeights | Tensor, slope: float) -> DirectionalGradient:
        z = SiteWeights({}, {}, direction, None) if isinstance(direction, Tensor) else direction
        moved = mapped(lambda t: slope / t if self.divide else slope * t, z)
        return self.merge(DirectionalGradient(1, moved, self.divide))

    def merge(self, other: DirectionalGradient) -> DirectionalGradient:
        return DirectionalGradient(self.n + other.n, _sum(self.total, other.total), self.divide)

    @property
    def mean(self) -> SiteWeights:
        """The estimated dL/dw. Raises RunError without directions."""
        return _over(self.total, self.n)

    @property
    def gates_U(self) -> Tensor:
        """The estimated dL/dgate, [U]. Raises RunError without directions."""
        if self.total is None:
            raise RunError("no direction gave a loss: expected at least 1")
        return self.total.out_projection / self.n

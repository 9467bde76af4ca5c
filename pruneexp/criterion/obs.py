"""The exact least-squares cost of removing units, updated as units leave."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pruneexp.criterion.spill import spilled
from pruneexp.evidence import Gram
from pruneexp.evidence.solve import check_ridge, cholesky_, refitted_
from pruneexp.types import Block, ConfigError, Refitted, RemovalPath, Score, Site, SiteWeights, require_least

_COMPACT = 0.9  # the matrices are cut down to what is left once so much of them is


@dataclass(frozen=True)
class Obs:
    """What the out-projection's output loses with a unit, its weights on the other units fitted anew: greedy, one by
    one.

    With W [O,C] the out-projection, H = S + lambda I its inputs' covariance and a unit's columns u, the least-squares
    loss

        tr(d H d^T), d the change of W, d[:,u] = -W[:,u]    is least at    tr(W_u [(H^-1)_uu]^-1 W_u^T)

    (Optimal Brain Surgeon, Hassibi & Stork 1993; structured: ZipLM, Kurtic et al. 2023). The cheapest unit leaves, W
    takes over what it gave, H^-1 is downdated, and again; `step` units of a single channel at a time, whose joint cost
    is exact. lambda is `ridge` times the mean variance of the inputs.

    Answers with a `RemovalPath`: the order, the cumulative cost (the true increase of the squared error per token,
    scale=output: over the variance of the out-projection's output) and out-projections fitted anew, as `LeastSquares`
    fits them, at `levels` levels; an out-projection at any other level is worked out when it is asked for.

    While a search may ask for out-projections, the covariances of all sites (8 C^2 bytes each) and the out-projections
    asked for last (O K in the model's dtype, at `levels` levels a site) are kept: `memory` GiB of them in memory, the
    rest in files of TMPDIR (or /var/tmp), which are mapped, read when needed, and gone with the search. Memory beside
    the model is then at most `memory`, one layer's evidence, and 24 C^2 bytes for the site that is worked on.

    Raises:
        RunError: H is singular (a ridge of 0 and constant or dependent channels); no room on the disk.
    """

    evidence: ClassVar[type[Gram]] = Gram

    ridge: float
    step: int
    levels: int
    scale: Literal["none", "output"]
    sequential: bool
    memory: float

    def __post_init__(self) -> None:
        check_ridge(self.ridge)
        if not self.memory >= 0:
            raise ConfigError(f"memory={self.memory!r}: expected a number of GiB >= 0")
        require_least(self, 1, "step", "levels")

    def working_bytes(self, site: Site, outputs: int) -> int:
        """The covariance, its factor and what that is made of."""
        return 24 * site.channels**2

    def kept_bytes(self, sites: Sequence[Site], outputs: int, itemsize: int, refits: float) -> tuple[int, int]:
        """Covariances, 8 C^2 bytes a site, and as many out-projections of C O numbers as are asked for, at most
        `levels`; what is beyond `memory` lies in files."""
        held = 8 * sum(site.channels**2 for site in sites)
        levels = min(self.levels, math.ceil(refits))
        held += sum(min(levels, site.units) * site.channels for site in sites) * outputs * itemsize
        limit = int(self.memory * 2**30) if math.isfinite(self.memory) else held
        return min(held, limit), max(0, held - limit)

    def __call__(self, block: Block, evidence: Mapping[str, Gram]) -> dict[str, Score]:
        return {site.name: self._path(site, block.weights[site.name], evidence[site.name]) for site in block.sites}

    def _path(self, site: Site, weights: SiteWeights, gram: Gram) -> RemovalPath:
        device = weights.out_projection.device
        cov_CC, mean_C = gram.covariance_CC.to(device), gram.mean_C.to(device)
        order_U, cost_U = self._removal(site, weights.out_projection.double(), cov_CC)
        if self.scale == "output":
            weight = weights.out_projection.double()
            cost_U = cost_U / ((weight @ cov_CC) * weight).sum().clamp_min(1e-300)
        limits = (self.ridge, self.levels, self.memory)
        out_projections = Refits(
            site, weights.out_projection, weights.out_projection_bias, cov_CC, mean_C, order_U, *limits
        )
        return RemovalPath(order_U.cpu(), cost_U.cpu(), out_projections)

    def _removal(self, site: Site, weight_OC: Tensor, cov_CC: Tensor) -> tuple[Tensor, Tensor]:
        """The order in which units leave [U] and the cumulative cost [U]. Inputs that never change (an expert's without
        tokens) leave in their order, for nothing."""
        if self.ridge > 0 and not cov_CC.any():
            order_U = torch.arange(site.units, device=weight_OC.device)
            return order_U, torch.zeros_like(order_U, dtype=weight_OC.dtype)
        hessian_CC = cov_CC.clone()
        hessian_CC.diagonal().add_(self.ridge * cov_CC.diagonal().mean())
        left = _RemainingUnits(site.width, torch.cholesky_inverse(cholesky_(hessian_CC, self.ridge)), weight_OC.clone())
        step = self.step if site.width == 1 else 1
        order, cost, total = [], [], torch.zeros((), dtype=torch.float64, device=weight_OC.device)
        while left.count:
            cheapest = left.costs_U().sort(stable=True).indices[: min(step, left.count)]
            taken, steps = left.remove_(cheapest)
            order.append(taken)
            cost.append(total + steps)
            total = cost[-1][-1]
        return torch.cat(order), torch.cat(cost)


class _RemainingUnits:
    """The units that are left, by position: H^-1 and W on them, downdated in place as units leave."""

    def __init__(self, width: int, inverse_CC: Tensor, weight_OC: Tensor):
        self.width, self.inverse, self.weight = width, inverse_CC, weight_OC
        self.units_U = torch.arange(weight_OC.shape[1] // width, device=weight_OC.device)
        self.here_U = torch.ones_like(self.units_U, dtype=torch.bool)
        self.count = len(self.units_U)

    def costs_U(self) -> Tensor:
        """What each unit would cost alone, Inf for those that have left: tr(W_u [(H^-1)_uu]^-1 W_u^T)."""
        units, width = len(self.units_U), self.width
        if width == 1:
            cost_U = self.weight.square().sum(0) / self.inverse.diagonal()
        else:
            blocks_UWW = self.inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
            blocks_UWW[~self.here_U] = torch.eye(width, dtype=blocks_UWW.dtype, device=blocks_UWW.device)
            columns_UWO = self.weight.view(-1, units, width).permute(1, 2, 0)
            solved_UWO = torch.cholesky_solve(columns_UWO, torch.linalg.cholesky(blocks_UWW))
            cost_U = (columns_UWO * solved_UWO).sum((1, 2))
        return cost_U.masked_fill(~self.here_U, torch.inf)

    def remove_(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Takes units out; returns which they are and what the first 1, 2, ... of them cost together."""
        columns = (places[:, None] * self.width + torch.arange(self.width, device=places.device)).flatten()
        rows_GC = self.inverse[columns]
        factor_GG = torch.linalg.cholesky(rows_GC[:, columns])
        whitened_GO = torch.linalg.solve_triangular(factor_GG, self.weight[:, columns].T, upper=False)
        whitened_GC = torch.linalg.solve_triangular(factor_GG, rows_GC, upper=False)
        self.inverse.addmm_(whitened_GC.T, whitened_GC, alpha=-1)
        self.weight.addmm_(whitened_GO.T, whitened_GC, alpha=-1)
        taken = self.units_U[places]
        self.here_U[places] = False
        self.inverse.diagonal()[columns] = 1.0  # what has left is neither asked again nor coupled to anything
        self.count -= len(places)
        if self.count < _COMPACT * len(self.units_U):
            self._compact_()
        steps = whitened_GO.square().sum(1).view(len(places), self.width).sum(1).cumsum(0)
        return taken, steps

    def _compact_(self) -> None:
        columns = self.here_U.repeat_interleave(self.width).nonzero().flatten()
        self.inverse = self.inverse[columns[:, None], columns]
        self.weight = self.weight[:, columns].contiguous()
        self.units_U = self.units_U[self.here_U]
        self.here_U = torch.ones_like(self.units_U, dtype=torch.bool)


@dataclass(frozen=True)
class Refits(Refitted):
    """Out-projections fitted anew once the first 1, 2, ... units of an order have left; each is worked out when it is
    asked for. Iterates over `levels` levels, evenly spaced, and answers for every other one too. Covariance and
    out-projections are held in memory as long as those of all sites are within `memory` GiB, else in files."""

    site: Site
    weight_OC: Tensor
    bias_O: Tensor | None
    cov_CC: Tensor
    mean_C: Tensor
    order_U: Tensor
    ridge: float
    levels: int
    memory: float
    made: dict[int | tuple[int, ...], tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cov_CC", spilled(self.cov_CC, self.memory * 2**30))

    def __getitem__(self, removed: int) -> tuple[Tensor, Tensor | None]:
        if not 0 <= removed <= self.site.units:
            raise KeyError(removed)
        if removed == 0:
            return self.weight_OC, self.bias_O
        if removed not in self.made:
            self._fit(removed, sorted(self.order_U[removed:].tolist()))
        return self.made[removed]

    def keeping(self, units: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        if units not in self.made:
            self._fit(units, units)
        return self.made[units]

    def _fit(self, which: int | tuple[int, ...], units: Sequence[int]) -> None:
        keep_C = self.site.keep_C(units)
        cov_CC = self.cov_CC.to(self.weight_OC.device, copy=True)  # which the solve works in
        weight, bias = refitted_(self.weight_OC, self.bias_O, cov_CC, self.mean_C, keep_C, self.ridge)
        del cov_CC
        self.made[which] = spilled(weight, self.memory * 2**30), bias
        while len(self.made) > self.levels:
            self.made.pop(next(iter(self.made)))

    def __iter__(self) -> Iterator[int]:
        grid = torch.linspace(0, self.site.units, min(self.levels, self.site.units) + 1).round().int()
        return iter(grid[1:].tolist())

    def __len__(self) -> int:
        return min(self.levels, self.site.units)

    def __contains__(self, removed: object) -> bool:
        return isinstance(removed, int) and 0 <= removed <= self.site.units

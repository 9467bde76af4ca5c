"""The exact least-squares cost of removing units, updated as units leave."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pruneexp.criterion.spill import spilled
from pruneexp.evidence import Gram, Halved, Halves
from pruneexp.evidence.held_out import choosing_bytes, chosen_ridge
from pruneexp.evidence.solve import RidgePer, check_ridge, cholesky_, held_back, singular
from pruneexp.types import Block, ConfigError, RemovalPath, Score, Sequential, Site, SiteWeights, require_least

_TRIED = 0.25  # of the units, one at least: those that leave where the ridge is chosen
_COMPACT = 0.9  # the matrices are cut down to what is left once so much of them is


@dataclass(frozen=True)
class Obs:
    """What the out-projection's output loses with a unit, its weights on the other units fitted anew: greedy, one by
    one.

    With W [O,C] the out-projection, H = S + L its inputs' covariance and a unit's columns u, the least-squares loss

        tr(d H d^T), d the change of W, d[:,u] = -W[:,u]    is least at    tr(W_u [(H^-1)_uu]^-1 W_u^T)

    (Optimal Brain Surgeon, Hassibi & Stork 1993; structured: ZipLM, Kurtic et al. 2023). The cheapest unit leaves, W
    takes over what it gave, H^-1 is downdated, and again; `step` units of a single channel at a time, whose joint cost
    is exact. L is diagonal, `ridge` times each channel's variance or (ridge_per=site) times their mean; ridge=auto:
    each site's own, `chosen_ridge` for the loss of the quarter of its units that give the output least of its variance,
    of one at least; criterion.json in the run folder has it.

    Answers with a `RemovalPath`: the order, the cumulative cost (tr(d H d^T) of all that has left: what the squared
    error per token rises by, tr(d S d^T), and what the ridge charges for the change of W, tr(d L d^T); scale=output:
    over the variance of the out-projection's output) and out-projections fitted anew, as `LeastSquares` fits them, at
    `levels` levels; an out-projection at any other level is worked out when it is asked for.

    While a search may ask for out-projections, the inverse covariances of all sites (float32, 4 C^2 bytes each) and the
    out-projections asked for last (O K in the model's dtype, at `levels` levels a site) are kept: `memory` GiB of them
    in memory, the rest in files of TMPDIR (or /var/tmp), which are mapped, read when needed, and gone with the search.
    Memory beside the model is then at most `memory`, one layer's evidence, and 24 C^2 bytes for the site that is worked
    on.

    Raises:
        RunError: H is singular (constant or dependent channels, and a ridge of 0 or next to it), here or where an
            out-projection is asked for; no room on the disk.
    """

    ridge: float | Literal["auto"]
    step: int
    levels: int
    scale: Literal["none", "output"]
    sequential: Sequential
    memory: float
    ridge_per: RidgePer

    def __post_init__(self) -> None:
        if not isinstance(self.ridge, str):
            check_ridge(self.ridge)
        if not self.memory >= 0:
            raise ConfigError(f"memory={self.memory!r}: expected a number of GiB >= 0")
        require_least(self, 1, "step", "levels")

    @property
    def evidence(self) -> Any:
        return Halves(Gram) if self.ridge == "auto" else Gram

    def working_bytes(self, site: Site, outputs: int) -> int:
        """The covariance, its factor and what that is made of; ridge=auto: a half's and a fit as well."""
        chosen = choosing_bytes(site.channels, outputs) if self.ridge == "auto" else 0
        return 24 * site.channels**2 + chosen

    def kept_bytes(self, sites: Sequence[Site], outputs: int, itemsize: int, refits: float) -> tuple[int, int]:
        """Inverse covariances, 4 C^2 bytes a site, and as many out-projections of C O numbers as are asked for, at most
        `levels`; what is beyond `memory` lies in files."""
        held = 4 * sum(site.channels**2 for site in sites)
        levels = min(self.levels, math.ceil(refits))
        held += sum(min(levels, site.units) * site.channels for site in sites) * outputs * itemsize
        limit = int(self.memory * 2**30) if math.isfinite(self.memory) else held
        return min(held, limit), max(0, held - limit)

    def __call__(self, block: Block, evidence: Mapping[str, Gram | Halved]) -> dict[str, Score]:
        return {site.name: self._path(site, block.weights[site.name], evidence[site.name]) for site in block.sites}

    def _path(self, site: Site, weights: SiteWeights, evidence: Gram | Halved) -> RemovalPath:
        gram = evidence.whole if isinstance(evidence, Halved) else evidence
        weight_OC, bias_O = weights.out_projection, weights.out_projection_bias
        cov_CC, mean_C = gram.covariance_CC.to(weight_OC.device), gram.mean_C.to(weight_OC.device)
        ridge = self._ridge(site, weights, evidence, cov_CC.diagonal())
        inverse_CC = _inverse(cov_CC, ridge, self.ridge_per)
        kept_CC = cov_CC if inverse_CC is None else inverse_CC
        kept_CC = kept_CC.to(torch.promote_types(weight_OC.dtype, torch.float32), copy=True)
        wide_OC = weight_OC.double()
        order_U, cost_U = self._removal(site, wide_OC, inverse_CC, ridge)
        if self.scale == "output":
            cost_U = cost_U / ((wide_OC @ cov_CC) * wide_OC).sum().clamp_min(1e-300)
        out_projections = Refits(site, weight_OC, bias_O, kept_CC, mean_C, order_U, ridge, self.levels, self.memory)
        chosen = {"ridge": ridge} if isinstance(self.ridge, str) else {}
        return RemovalPath(order_U.cpu(), cost_U.cpu(), out_projections, chosen)

    def _ridge(self, site: Site, weights: SiteWeights, evidence: Gram | Halved, variance_C: Tensor) -> float:
        if not isinstance(self.ridge, str):
            return self.ridge
        assert isinstance(evidence, Halved)
        given_C = weights.out_projection.double().square().sum(0) * variance_C
        tried = max(1, round(_TRIED * site.units))  # where nothing leaves, all ridges err alike
        kept_U = given_C.view(site.units, site.width).sum(1).sort(stable=True).indices[tried:]
        keep_C = site.keep_C(kept_U.sort().values.tolist())
        return chosen_ridge(weights.out_projection, weights.out_projection_bias, evidence, keep_C, self.ridge_per)

    def _removal(self, site: Site, weight_OC: Tensor, inverse_CC: Tensor | None, ridge: float) -> tuple[Tensor, Tensor]:
        """The order in which units leave [U] and the cumulative cost [U], in the memory of H^-1. Inputs that never
        change, of which there is none, leave in their order, for nothing."""
        if inverse_CC is None:
            order_U = torch.arange(site.units, device=weight_OC.device)
            return order_U, torch.zeros_like(order_U, dtype=weight_OC.dtype)
        left = _RemainingUnits(site.width, inverse_CC, weight_OC.clone(), ridge)
        step = self.step if site.width == 1 else 1
        order, cost, total = [], [], torch.zeros((), dtype=torch.float64, device=weight_OC.device)
        while left.count:
            cheapest = left.costs_U().sort(stable=True).indices[: min(step, left.count)]
            taken, steps = left.remove_(cheapest)
            order.append(taken)
            cost.append(total + steps)
            total = cost[-1][-1]
        return torch.cat(order), torch.cat(cost)


def _inverse(cov_CC: Tensor, ridge: float, per: RidgePer) -> Tensor | None:
    """(S + L)^-1; None for inputs that never change (an expert's without tokens), unless the ridge is 0."""
    if ridge > 0 and not cov_CC.any():
        return None
    hessian_CC = cov_CC.clone()
    hessian_CC.diagonal().add_(ridge * held_back(cov_CC.diagonal(), per))
    return torch.cholesky_inverse(cholesky_(hessian_CC, ridge))


def _factor(matrix_GG: Tensor, ridge: float) -> Tensor:
    """Lower factor of a part of H^-1, or of several. Raises RunError where one is singular to its dtype."""
    factor_GG, info = torch.linalg.cholesky_ex(matrix_GG)
    if info.any():
        raise singular(ridge)
    return factor_GG


class _RemainingUnits:
    """The units that are left, by position: H^-1 and W on them, downdated in place as units leave."""

    def __init__(self, width: int, inverse_CC: Tensor, weight_OC: Tensor, ridge: float):
        self.width, self.inverse, self.weight, self.ridge = width, inverse_CC, weight_OC, ridge
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
            solved_UWO = torch.cholesky_solve(columns_UWO, _factor(blocks_UWW, self.ridge))
            cost_U = (columns_UWO * solved_UWO).sum((1, 2))
        return cost_U.masked_fill(~self.here_U, torch.inf)

    def remove_(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Takes units out; returns which they are and what the first 1, 2, ... of them cost together."""
        columns = (places[:, None] * self.width + torch.arange(self.width, device=places.device)).flatten()
        rows_GC = self.inverse[columns]
        factor_GG = _factor(rows_GC[:, columns], self.ridge)
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


@dataclass(eq=False)
class Refits(Mapping[int, tuple[Tensor, "Tensor | None"]]):
    """Out-projections fitted anew once the first 1, 2, ... units of an order have left; each is worked out when it is
    asked for, from G = H^-1 (zeros for inputs that never change):

        W' = W[:,keep] - W[:,gone] (G_gone,gone)^-1 G_gone,keep

    which is W[:,keep] + W[:,gone] S_gone,keep (S_keep,keep + L)^-1, in time that grows with what has left.
    Iterates over `levels` levels, evenly spaced, and answers for every other one too. G (float32 unless the weights are
    float64) and out-projections are held in memory as long as those of all sites are within `memory` GiB, else in
    files."""

    site: Site
    weight_OC: Tensor
    bias_O: Tensor | None
    inverse_CC: Tensor
    mean_C: Tensor
    order_U: Tensor
    ridge: float
    levels: int
    memory: float
    made: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inverse_CC = spilled(self.inverse_CC, self.memory * 2**30)

    def in_order(self, order_U: Tensor) -> Refits:
        """The same for units that leave in another order; H^-1 is shared."""
        other = copy(self)
        other.order_U, other.made = order_U.to(self.order_U.device), {}
        return other

    def __getitem__(self, removed: int) -> tuple[Tensor, Tensor | None]:
        if not 0 <= removed <= self.site.units:
            raise KeyError(removed)
        if removed == 0:
            return self.weight_OC, self.bias_O
        if removed not in self.made:
            gone_C, keep_C = (self.site.keep_C(sorted(u.tolist())) for u in self.order_U.tensor_split((removed,)))
            weight, bias = self._fitted(gone_C, keep_C)
            self.made[removed] = spilled(weight, self.memory * 2**30), bias
            while len(self.made) > self.levels:
                self.made.pop(next(iter(self.made)))
        return self.made[removed]

    def _fitted(self, gone_C: Tensor, keep_C: Tensor) -> tuple[Tensor, Tensor]:
        device, dtype = self.weight_OC.device, self.weight_OC.dtype
        rows_GC = self.inverse_CC[gone_C.to(self.inverse_CC.device)].to(device, torch.float64)
        gone_C, keep_C = gone_C.to(device), keep_C.to(device)
        gone_OG, kept_OK = self.weight_OC[:, gone_C].double(), self.weight_OC[:, keep_C].double()
        bias_O = gone_OG @ self.mean_C[gone_C]
        if rows_GC.any():
            change_GO = torch.cholesky_solve(gone_OG.T, _factor(rows_GC[:, gone_C], self.ridge))
            change_OK = change_GO.T @ rows_GC[:, keep_C]
            kept_OK -= change_OK
            bias_O += change_OK @ self.mean_C[keep_C]
        bias_O = bias_O if self.bias_O is None else bias_O + self.bias_O.double()
        return kept_OK.to(dtype), bias_O.to(dtype)

    def __iter__(self) -> Iterator[int]:
        grid = torch.linspace(0, self.site.units, min(self.levels, self.site.units) + 1).round().int()
        return iter(grid[1:].tolist())

    def __len__(self) -> int:
        return min(self.levels, self.site.units)

    def __contains__(self, removed: object) -> bool:
        return isinstance(removed, int) and 0 <= removed <= self.site.units

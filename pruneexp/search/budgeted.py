"""Searches that meet the budget to the nearest unit and leave every site a minimum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pruneexp.search.common import by_layer, in_order, layer_budgets, planned, prunable_params, raw, require, standardised
from pruneexp.types import Budget, ConfigError, Oracle, Plan, Scores, Site

Granularity = list[Literal["heads", "channels", "blocks"]]
KIND = {"heads": "attention", "channels": "mlp", "blocks": "block"}

# Shares that differ by rounding alone (0.3 * 10 against 3) must not end on different sides of a tie.
_EPSILON = 1e-9


@dataclass(frozen=True)
class Uniform:
    """Every site loses the same share of its units, lowest scores first; each layer meets its part of the budget.

    Within a layer the dearer sites (heads) lose round(share * U) units, the cheapest (FFN channels) as many as come
    nearest to the layer's budget; what rounding leaves over goes into the next layer's. The whole is so met to half
    the cost of the cheapest unit, ties removing more. Only sites of a kind in `granularity` lose units; each keeps
    `min_units`.
    """

    local: ClassVar[bool] = True

    min_units: int
    granularity: Granularity

    def __post_init__(self) -> None:
        _check(self.min_units, self.granularity)

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        values, chosen = raw(scores, sites), _chosen(sites, self.granularity, self.min_units, budget)
        keep, over = {}, 0.0
        for layer, share in layer_budgets(budget, chosen).items():
            own = [site for site in chosen if site.layer == layer]
            counts, over = self._counts(own, share, share.remove + over)
            keep.update({site.name: _all_but_lowest(values[site.name], counts[site.name]) for site in own})
        return planned(keep, sites, budget)

    def _counts(self, sites: list[Site], budget: Budget, target: float) -> tuple[dict[str, int], float]:
        """How many units leave each site of a layer, and the parameters still to be removed."""
        share = budget.ratio * budget.total / prunable_params(sites)
        dearest_first = sorted(sites, key=lambda site: (-site.cost.params, site.name))
        most = {site.name: max(0, site.units - self.min_units) for site in sites}
        counts = {site.name: min(_nearest(share * site.units), most[site.name]) for site in dearest_first[:-1]}
        left = target - sum(counts[site.name] * site.cost.params for site in dearest_first[:-1])
        # Cheapest first, the others where that one is exhausted (or where the heads took too much).
        for site in reversed(dearest_first):
            before = counts.get(site.name, 0)
            counts[site.name] = min(max(before + _nearest(left / site.cost.params), 0), most[site.name])
            left -= (counts[site.name] - before) * site.cost.params
        return counts, left


@dataclass(frozen=True)
class Global:
    """One ranking over all units of all sites: the lowest leave until the budget is met.

    `normalise` makes sites comparable: zscore (`common.standardised`), mean (score over the mean of the site's
    scores), per_parameter (score over the unit's cost: for scores that are losses), none. A unit that would overshoot
    by more than half the cheapest unit is passed over, and cheaper ones fill up, so that the budget is met to half
    the cheapest unit as long as there are any (to half a unit of the next dearer kind otherwise). Ties leave in the
    order of layer, site name, unit. Only sites of a kind in `granularity` lose units; each keeps `min_units`.
    """

    local: ClassVar[bool] = False

    min_units: int
    granularity: Granularity
    normalise: Literal["none", "zscore", "mean", "per_parameter"]

    def __post_init__(self) -> None:
        _check(self.min_units, self.granularity)

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        chosen = _chosen(sites, self.granularity, self.min_units, budget)
        values = self._comparable(scores, sites)
        sizes = [site.units for site in chosen]
        score = torch.cat([values[site.name].double() for site in chosen])
        cost = torch.cat([torch.full((site.units,), site.cost.params) for site in chosen])
        free = torch.cat([~_all_but_lowest(values[site.name], site.units - self.min_units) for site in chosen])
        order = score.sort(stable=True).indices
        leaves = torch.zeros(len(score), dtype=torch.bool)
        leaves[_until(budget.remove, order[free[order]], cost)] = True
        keep = {site.name: ~gone for site, gone in zip(chosen, leaves.split(sizes), strict=True)}
        return planned(keep, sites, budget)

    def _comparable(self, scores: Scores, sites: Sequence[Site]) -> dict[str, Tensor]:
        if self.normalise == "zscore":
            return standardised(scores, sites)
        values = {name: value_U.double() for name, value_U in raw(scores, sites).items()}
        if self.normalise == "per_parameter":
            return {site.name: values[site.name] / site.cost.params for site in sites}
        if self.normalise == "mean":
            return {name: value_U / value_U.mean().abs().clamp_min(1e-300) for name, value_U in values.items()}
        return values


def _until(target: float, order: Tensor, cost: Tensor) -> Tensor:
    """Of units in the order in which they may leave, those that do: indices, their costs adding up to the target."""
    gone, left = [order[:0]], target
    slack = cost[order].min() / 2 if len(order) else 0
    passed_over = order
    # Every turn takes the longest run that fits, then drops the units that no longer do: at most one turn per cost.
    rest = order[cost[order] <= left + slack + _EPSILON]
    while len(rest):
        fits = cost[rest].cumsum(0) <= left + slack + _EPSILON
        gone.append(rest[fits])
        left -= int(cost[gone[-1]].sum())
        rest = rest[~fits]
        rest = rest[cost[rest] <= left + slack + _EPSILON]
    # The cheap ones are used up: a dearer one where that comes nearer.
    passed_over = passed_over[~torch.isin(passed_over, torch.cat(gone))]
    for unit in passed_over.tolist() if left > slack else ():
        if int(cost[unit]) / 2 <= left + _EPSILON:
            gone.append(torch.tensor([unit]))
            left -= int(cost[unit])
    return torch.cat(gone)


def _check(min_units: int, granularity: Granularity) -> None:
    if min_units < 0:
        raise ConfigError(f"min_units={min_units!r}: expected an integer >= 0")
    if not granularity or len(set(granularity)) < len(granularity):
        raise ConfigError(f"granularity={granularity!r}: expected one or more of {', '.join(KIND)}, each once")
    if "blocks" in granularity and len(granularity) > 1:
        raise ConfigError(f"granularity={granularity!r}: expected blocks alone, which hold the heads and channels")


def _chosen(sites: Sequence[Site], granularity: Granularity, min_units: int, budget: Budget) -> list[Site]:
    """The sites that may lose units. Raises ConfigError where the budget is more than they can give."""
    chosen = [site for site in in_order(sites) if site.kind in {KIND[name] for name in granularity}]
    if not chosen:
        found = sorted({name for name, kind in KIND.items() if kind in {site.kind for site in sites}})
        raise ConfigError(f"search.granularity={list(granularity)!r}: expected some of {found}, which the model has")
    cheapest = min(site.cost.params for site in chosen)
    for own in by_layer(chosen).values():
        pass
    require(budget, sum(max(0, s.units - min_units) * s.cost.params for s in chosen) + cheapest / 2)
    return chosen


def _nearest(x: float) -> int:
    """Nearest whole number, halves up."""
    return math.floor(x + 0.5 + _EPSILON)


def _all_but_lowest(score_U: Tensor, n: int) -> Tensor:
    """Mask of all but the n lowest; equal scores leave in the order of their index."""
    keep = torch.ones(len(score_U), dtype=torch.bool)
    keep[score_U.sort(stable=True).indices[: max(0, n)]] = False
    return keep

"""Searches that meet the budget to the nearest unit and leave every site a minimum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pruneexp.search.common import (
    by_layer,
    in_order,
    layer_budgets,
    planned,
    prunable,
    raw,
    require,
    standardised,
)
from pruneexp.types import Budget, ConfigError, Oracle, Plan, Scores, Site

Granularity = list[Literal["heads", "channels", "blocks"]]
KIND = {"heads": "attention", "channels": "mlp", "blocks": "block"}

# Numbers that differ by rounding alone (0.3 * 10 against 3) must not end on different sides of a tie.
_UNITS_EPSILON = 1e-9
_PARAMS_EPSILON = 1e-3


@dataclass(frozen=True)
class Uniform:
    """Every site loses the same share of its units, lowest scores first; each layer meets its part of the budget.

    Within a layer the dearer sites (heads) lose round(share * U) units, the cheapest (FFN channels) as many as come
    nearest to the layer's budget; what rounding leaves over goes into the next layer's. The whole is so met to half
    the cost of the cheapest unit, ties removing more. Only sites of a kind in `granularity` lose units; each keeps
    `min_units`. The first and last layers, `protect_first` and `protect_last` as shares of the depth (to the nearest
    layer), keep everything, and the others lose so much more that the whole budget is met.
    """

    min_units: int
    granularity: Granularity
    protect_first: float
    protect_last: float

    def __post_init__(self) -> None:
        check_settings(self.min_units, self.granularity)
        if "blocks" in self.granularity:
            raise ConfigError(
                f"granularity={self.granularity!r}: expected heads, channels or both; a block has no share to lose"
            )
        for name in ("protect_first", "protect_last"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected a share of the layers, in [0, 1)")
        if self.protect_first + self.protect_last >= 1:
            raise ConfigError(
                f"protect_last={self.protect_last!r}: expected less than {1 - self.protect_first:g}, "
                "what protect_first leaves"
            )

    @property
    def local(self) -> bool:
        """A protected layer's share goes to all others: then no layer can be decided alone."""
        return not (self.protect_first or self.protect_last)

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        values, counts = raw(scores, sites), self._all_counts(sites, budget)
        keep = {name: _all_but_lowest(values[name], count) for name, count in counts.items()}
        return planned(keep, sites, budget)

    def _all_counts(self, sites: Sequence[Site], budget: Budget) -> dict[str, int]:
        """How many units leave each site that may lose any. Raises ConfigError where that is too little."""
        free = self._unprotected(sites)
        chosen = chosen_sites(free, self.granularity, budget)
        if chosen and _complete(sites, budget):
            require(budget, removable(chosen, self.min_units, budget))
        counts, over = {}, 0.0
        for layer, share in layer_budgets(budget, free).items():
            share = replace(share, added=share.added + over)
            own = [site for site in chosen if site.layer == layer]
            found, over = self._counts(own, share) if own else ({}, share.remove)
            counts.update(found)
        return counts

    def _unprotected(self, sites: Sequence[Site]) -> list[Site]:
        layers = list(by_layer(sites))
        first, last = _nearest(self.protect_first * len(layers)), _nearest(self.protect_last * len(layers))
        if len(layers) > 1 and first + last >= len(layers):
            raise ConfigError(
                f"search.protect_first={self.protect_first!r}: expected less, with search.protect_last="
                f"{self.protect_last!r} all {len(layers)} layers are protected"
            )
        kept = set(layers[first : len(layers) - last])
        return [site for site in sites if site.layer in kept]

    def _counts(self, sites: list[Site], budget: Budget) -> tuple[dict[str, int], float]:
        """How many units leave each site of a layer, and the parameters still to be removed."""
        *dearer, cheapest = sorted(sites, key=lambda site: (-budget.price(site), site.name))
        # what a layer leaves over, rounding aside, no other layer would make up for
        require(budget, removable(sites, self.min_units, budget) + len(sites) * budget.price(cheapest))
        share = budget.ratio * budget.total / prunable(sites, budget)
        counts, target = {site.name: 0 for site in sites}, budget.remove

        def remove(site: Site, more: int) -> None:
            nonlocal target
            most = max(0, site.units - self.min_units)
            more = min(max(counts[site.name] + more, 0), most) - counts[site.name]
            counts[site.name] += more
            target -= more * budget.price(site)

        for site in dearer:
            remove(site, _nearest(share * site.units))
        remove(cheapest, _nearest(target / budget.price(cheapest)))
        for site in dearer:  # where the cheapest have run out, or the dearer took too much
            if abs(target) > budget.price(cheapest) / 2 + _PARAMS_EPSILON:
                remove(site, math.ceil(abs(target) / budget.price(site)) * (1 if target > 0 else -1))
                remove(cheapest, _nearest(target / budget.price(cheapest)))
        return counts, target

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        self._all_counts(sites, budget)


@dataclass(frozen=True)
class Global:
    """One ranking over all units of all sites: the lowest leave until the budget is met.

    `normalise` makes sites comparable: zscore (`common.standardised`), mean (score over the mean of the site's
    scores), per_parameter (score over the unit's cost: for scores that are losses), none. A unit that would overshoot
    by more than half the cheapest unit is passed over, and cheaper ones fill up, so that the budget is met to half
    the cheapest unit. Ties leave in the order of layer, site name, unit. Only sites of a kind in `granularity` lose
    units; each keeps `min_units`.
    """

    local: ClassVar[bool] = False

    min_units: int
    granularity: Granularity
    normalise: Literal["none", "zscore", "mean", "per_parameter"]

    def __post_init__(self) -> None:
        check_settings(self.min_units, self.granularity)

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        chosen = within_reach(sites, self.granularity, self.min_units, budget)
        values = self._comparable(scores, sites, budget)
        sizes = [site.units for site in chosen]
        score = torch.cat([values[site.name].double() for site in chosen])
        cost = torch.cat([torch.full((site.units,), budget.price(site)) for site in chosen])
        free = torch.cat(
            [~_all_but_lowest(values[site.name], site.units - least_units(site, self.min_units)) for site in chosen]
        )
        order = score.sort(stable=True).indices
        leaves = _until(budget.remove, order[free[order]], cost)
        keep = {site.name: ~gone for site, gone in zip(chosen, leaves.split(sizes), strict=True)}
        return planned(keep, sites, budget)

    def _comparable(self, scores: Scores, sites: Sequence[Site], budget: Budget) -> dict[str, Tensor]:
        if self.normalise == "zscore":
            return standardised(scores, sites)
        values = {name: value_U.double() for name, value_U in raw(scores, sites).items()}
        if self.normalise == "per_parameter":
            return {site.name: values[site.name] / max(1, budget.price(site)) for site in sites}
        if self.normalise == "mean":
            return {name: value_U / value_U.mean().abs().clamp_min(1e-300) for name, value_U in values.items()}
        return values

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        within_reach(sites, self.granularity, self.min_units, budget)


def _until(target: float, order: Tensor, cost: Tensor) -> Tensor:
    """Mask of the units that leave, given the order in which they may: their costs add up to the target."""
    gone = torch.zeros(len(cost), dtype=torch.bool)
    if len(order) == 0:
        return gone
    cheapest = int(cost[order].min())
    slack, left, rest = cheapest / 2 + _PARAMS_EPSILON, target, order
    # Every turn takes the longest run that fits, then drops the units that no longer do: at most one turn per cost.
    while len(rest := rest[cost[rest] <= left + slack]):
        fits = cost[rest].cumsum(0) <= left + slack
        gone[rest[fits]] = True
        left -= int(cost[rest[fits]].sum())
        rest = rest[~fits]
    if left > slack:
        # The cheapest have run out: dearer ones leave, and for what these are too much, the last of the cheapest stay.
        passed_over = order[~gone[order]]
        run = passed_over[: int((cost[passed_over].cumsum(0) < left - slack).sum()) + 1]
        gone[run] = True
        left -= int(cost[run].sum())
        back = max(0, math.ceil(-left / cheapest - 0.5 - _PARAMS_EPSILON))  # halves down: ties remove more
        taken = order[gone[order] & (cost[order] == cheapest)]
        gone[taken[max(0, len(taken) - back) :]] = False
    return gone


def check_settings(min_units: int, granularity: Granularity) -> None:
    if min_units < 0:
        raise ConfigError(f"min_units={min_units!r}: expected an integer >= 0")
    if not granularity or len(set(granularity)) < len(granularity):
        raise ConfigError(f"granularity={granularity!r}: expected one or more of {', '.join(KIND)}, each once")
    if "blocks" in granularity and len(granularity) > 1:
        raise ConfigError(f"granularity={granularity!r}: expected blocks alone, which hold the heads and channels")


def chosen_sites(sites: Sequence[Site], granularity: Granularity, budget: Budget) -> list[Site]:
    """The sites that may lose units. Raises ConfigError where there are none (one layer of several may have none)."""
    chosen = [site for site in in_order(sites) if site.kind in {KIND[name] for name in granularity}]
    chosen = [site for site in chosen if budget.price(site)]  # FFN channels, say, fill no KV cache: they stay
    if not chosen and _complete(sites, budget):
        there = [name for name, kind in KIND.items() if any(s.kind == kind and budget.price(s) for s in sites)]
        raise ConfigError(f"search.granularity={list(granularity)!r}: expected some of {', '.join(there)}")
    return chosen


def within_reach(sites: Sequence[Site], granularity: Granularity, min_units: int, budget: Budget) -> list[Site]:
    """`chosen_sites`. Raises ConfigError, naming the largest ratio, where all they may lose is less than the budget."""
    chosen = chosen_sites(sites, granularity, budget)
    require(budget, removable(chosen, min_units, budget))
    return chosen


def _complete(sites: Sequence[Site], budget: Budget) -> bool:
    """Whether these are all layers, not one of several."""
    return budget.layers is None or budget.layers == len(by_layer(sites))


def least_units(site: Site, min_units: int) -> int:
    """Units that a site keeps: `min_units`, of a block none (one block of all stays)."""
    return 0 if site.kind == "block" else min_units


def removable(sites: Sequence[Site], min_units: int, budget: Budget, all_blocks: bool = True) -> int:
    """What may leave at most. `all_blocks`: where sites are blocks, there are no others."""
    most = sum(max(0, site.units - least_units(site, min_units)) * budget.price(site) for site in sites)
    blocks = [budget.price(site) for site in sites if site.kind == "block"]
    return most - max(blocks) if blocks and all_blocks else most


def _nearest(x: float) -> int:
    """Nearest whole number, halves up."""
    return math.floor(x + 0.5 + _UNITS_EPSILON)


def _all_but_lowest(score_U: Tensor, n: int) -> Tensor:
    """Mask of all but the n lowest; equal scores leave in the order of their index."""
    keep = torch.ones(len(score_U), dtype=torch.bool)
    keep[score_U.sort(stable=True).indices[: max(0, n)]] = False
    return keep

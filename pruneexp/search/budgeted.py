"""Searches that meet the budget to the nearest unit and leave every site a minimum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pruneexp.search.common import (
    by_layer,
    layer_budgets,
    planned,
    prunable,
    raw,
    require,
    standardised,
    z_scores,
)
from pruneexp.search.grain import Gone, Grain, Item, bundled, losses_in_order, unit_order, within_reach
from pruneexp.search.granularity import (
    Granularity,
    check_multiple,
    check_settings,
    chosen_sites,
    complete,
    is_plain,
    least_units,
    removal_steps,
    step_units,
)
from pruneexp.search.ranking import ranked
from pruneexp.types import Budget, ConfigError, Oracle, Plan, Scores, Site

# Numbers that differ by rounding alone (0.3 * 10 against 3) must not end on different sides of a tie.
_UNITS_EPSILON = 1e-9
_PARAMS_EPSILON = 1e-3


@dataclass(frozen=True)
class Uniform:
    """Every site loses the same share of its units, lowest scores first; each layer meets its part of the budget.

    Within a layer the dearer sites (heads) lose round(share * U) units, the cheapest (FFN channels) as many as come
    nearest to the layer's budget; what rounding leaves over goes into the next layer's. The whole is so met to half
    the cost of the cheapest unit, ties removing more. Only sites of a kind in `granularity` lose units; each keeps
    `min_units`, and FFN widths that shrink become multiples of `multiple` (the unit is then so many channels). First
    and last layers, `protect_first` and `protect_last` as shares of the depth (to the nearest layer), keep everything,
    and the others lose so much more that the whole budget is met.
    """

    min_units: int
    granularity: Granularity
    protect_first: float
    protect_last: float
    multiple: int

    def __post_init__(self) -> None:
        check_settings(self.min_units, self.granularity, self.multiple)
        if not set(self.granularity) <= {"heads", "channels", "experts"}:
            raise ConfigError(
                f"granularity={self.granularity!r}: expected heads, channels or both (or experts for channels); "
                "a whole sublayer or block has no share to lose"
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
        check_multiple(sites, self.granularity, self.multiple)
        if chosen and complete(sites, budget):
            require(budget, removable(chosen, self.min_units, budget, multiple=self.multiple))
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
        price = {site.name: step_units(site, self.multiple) * budget.price(site) for site in sites}
        *dearer, cheapest = sorted(sites, key=lambda site: (-price[site.name], site.name))
        least = price[cheapest.name]
        # what a layer leaves over, rounding aside, no other layer would make up for
        require(budget, removable(sites, self.min_units, budget, multiple=self.multiple) + len(sites) * least)
        share = budget.ratio * budget.total / prunable(sites, budget)
        steps = {site.name: removal_steps(site, self.min_units, self.multiple) for site in sites}
        taken, target = {site.name: 0 for site in sites}, budget.remove

        def remove(site: Site, more: int) -> None:
            nonlocal target
            own, before = steps[site.name], taken[site.name]
            taken[site.name] = min(max(before + more, 0), len(own) - 1)
            target -= (own[taken[site.name]] - own[before]) * budget.price(site)

        def fill() -> None:
            before = None
            while target != before:  # a width that is no multiple has a smaller first step: then once more
                before = target
                remove(cheapest, _nearest(target / least))

        for site in dearer:
            size = step_units(site, self.multiple)
            remove(site, _nearest((share * site.units + -site.units % size) / size))
        fill()
        for site in dearer:  # where the cheapest have run out, or the dearer took too much
            if abs(target) > least / 2 + _PARAMS_EPSILON:
                before, missing = dict(taken), target
                remove(site, math.ceil(abs(target) / price[site.name]) * (1 if target > 0 else -1))
                fill()
                if abs(target) > abs(missing):  # there are too few of the cheapest to make up for it
                    taken, target = before, missing
        return {name: steps[name][count] for name, count in taken.items()}, target

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        self._all_counts(sites, budget)


@dataclass(frozen=True)
class Global:
    """One ranking over all units of all sites: the lowest leave until the budget is met.

    `normalise` makes sites comparable: zscore (`common.standardised`), mean (score over the mean of the site's
    scores), per_parameter (score over the unit's cost: for scores that are losses), none. A unit that would overshoot
    by more than half the cheapest unit is passed over, and cheaper ones fill up, so that the budget is met to half
    the cheapest unit. Ties leave in the order of layer, site name, unit. Only sites of a kind in `granularity` lose
    units; each keeps `min_units`, and FFN widths that shrink become multiples of `multiple`: so many channels leave
    together, the lowest first, and rank by their mean.

    Whole sublayers and blocks rank among them (`grain` has what they are worth): zscore and mean are taken over all of
    a kind; none and per_parameter judge what they still hold, by its score and that over its cost (of a removal path,
    units then count by what they add to the cost).
    """

    local: ClassVar[bool] = False

    min_units: int
    granularity: Granularity
    normalise: Literal["none", "zscore", "mean", "per_parameter"]
    multiple: int

    def __post_init__(self) -> None:
        check_settings(self.min_units, self.granularity, self.multiple)

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        if not is_plain(self.granularity, self.multiple):
            return self._mixed(Grain(scores, sites, budget, self.granularity, self.min_units, self.multiple))
        chosen = chosen_sites(sites, self.granularity, budget)
        require(budget, removable(chosen, self.min_units, budget))
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
        within_reach(sites, budget, self.granularity, self.min_units, self.multiple)

    def _mixed(self, grain: Grain) -> Plan:
        """Units in multiples, sublayers and blocks in one ranking."""
        require(grain.budget, grain.most)
        values, added = self._of_units(grain), bool(grain.composites) and self.normalise in ("none", "per_parameter")
        unit_values = {}
        for site in grain.fine:
            score = grain.scores[site.name]
            value_U = values[site.name][unit_order(score, site.units)]
            if added:
                price = grain.budget.price(site) if self.normalise == "per_parameter" else 1
                value_U = losses_in_order(score, site.units) / price
            unit_values[site.name] = bundled(value_U, grain.unit_steps[site.name])
        return ranked(grain, unit_values, _composite_values(grain, self.normalise))

    def _of_units(self, grain: Grain) -> Mapping[str, Tensor]:
        return self._comparable({site.name: grain.scores[site.name] for site in grain.fine}, grain.fine, grain.budget)


def _composite_values(grain: Grain, normalise: str) -> Callable[[Item, Gone], float]:
    """What a whole sublayer or block counts as in the ranking, given what has left."""
    if normalise == "none":
        return grain.loss
    if normalise == "per_parameter":
        return lambda item, gone: grain.loss(item, gone) / grain.cost(item, gone)
    known: dict[str, float] = {}
    for kind in ("attention", "mlp", "block"):
        names = [site.name for site in grain.wholes if site.kind == kind]
        value = torch.tensor([grain.score[name] for name in names], dtype=torch.float64)
        if normalise == "mean":
            value = value / value.mean().abs().clamp_min(1e-300)
        elif len(names):
            value = z_scores(value)
        known |= dict(zip(names, value.tolist(), strict=True))
    return lambda item, gone: known[item[1].name]


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
        before, missing = gone.clone(), left
        passed_over = order[~gone[order]]
        run = passed_over[: int((cost[passed_over].cumsum(0) < left - slack).sum()) + 1]
        gone[run] = True
        left -= int(cost[run].sum())
        back = max(0, math.ceil(-left / cheapest - 0.5 - _PARAMS_EPSILON))  # halves down: ties remove more
        taken = order[gone[order] & (cost[order] == cheapest)]
        gone[taken[max(0, len(taken) - back) :]] = False
        left += min(back, len(taken)) * cheapest
        return gone if abs(left) <= missing else before  # too few of the cheapest to make up for it
    return gone


def removable(sites: Sequence[Site], min_units: int, budget: Budget, all_blocks: bool = True, multiple: int = 1) -> int:
    """What may leave at most. `all_blocks`: where sites are blocks, there are no others."""
    most = sum(removal_steps(site, min_units, multiple)[-1] * budget.price(site) for site in sites)
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

"""Searches that meet the budget to the nearest unit and leave every site a minimum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pruneexp.search.common import PARAMS_EPSILON, planned, raw, require, standardised, z_scores
from pruneexp.search.granularity import Granularity, check_settings, chosen_sites, is_plain, least_units, removal_steps
from pruneexp.search.ranking import ranked
from pruneexp.search.removable import Gone, Item, Removable, bundled, losses_in_order, unit_order, within_reach
from pruneexp.types import Budget, Oracle, Plan, Scores, Site


@dataclass(frozen=True)
class Global:
    """One ranking over all units of all sites: the lowest leave until the budget is met.

    `normalise` makes sites comparable: zscore (`common.standardised`), mean (score over the mean of the site's
    scores), per_parameter (score over the unit's cost: for scores that are losses), none. A unit that would overshoot
    by more than half the cheapest unit is passed over, and cheaper ones fill up, so that the budget is met to half
    the cheapest unit. Ties leave in the order of layer, site name, unit. Only sites of a kind in `granularity` lose
    units; each keeps `min_units`, and FFN widths that shrink become multiples of `multiple`: so many channels leave
    together, the lowest first, and rank by their mean.

    Whole sublayers and layers rank among them (`Removable` says what they are worth): zscore and mean are taken over
    all of a kind; none and per_parameter judge what they still hold, by its score and that over its cost (of a removal
    path, units then count by what they add to the cost).
    """

    min_units: int
    granularity: Granularity
    normalise: Literal["none", "zscore", "mean", "per_parameter"]
    multiple: int

    def __post_init__(self) -> None:
        check_settings(self)

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        if not is_plain(self.granularity, self.multiple):
            return self._mixed(Removable(self, scores, sites, budget))
        chosen = chosen_sites(sites, self.granularity, budget)
        require(budget, removable(chosen, self.min_units, budget))
        values = self._comparable(scores, sites, budget)
        sizes = [site.units for site in chosen]
        score = torch.cat([values[site.name].double() for site in chosen])
        cost = torch.cat([torch.full((site.units,), budget.price(site)) for site in chosen])
        free = torch.cat(
            [~all_but_lowest(values[site.name], site.units - least_units(site, self.min_units)) for site in chosen]
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
        within_reach(self, sites, budget)

    def _mixed(self, removable: Removable) -> Plan:
        """Units in multiples, sublayers and layers in one ranking."""
        require(removable.budget, removable.most)
        fine = {site.name: removable.scores[site.name] for site in removable.fine}
        values = self._comparable(fine, removable.fine, removable.budget)
        added, unit_values = bool(removable.composites) and self.normalise in ("none", "per_parameter"), {}
        for site in removable.fine:
            score = removable.scores[site.name]
            value_U = values[site.name][unit_order(score, site.units)]
            if added:
                price = removable.budget.price(site) if self.normalise == "per_parameter" else 1
                value_U = losses_in_order(score, site.units) / price
            unit_values[site.name] = bundled(value_U, removable.unit_steps[site.name])
        return ranked(removable, unit_values, _composite_values(removable, self.normalise))


def _composite_values(removable: Removable, normalise: str) -> Callable[[Item, Gone], float]:
    """What a whole sublayer or layer counts as in the ranking, given what has left."""
    if normalise == "none":
        return removable.loss
    if normalise == "per_parameter":
        return lambda item, gone: removable.loss(item, gone) / removable.cost(item, gone)
    known: dict[str, float] = {}
    for kind in ("attention", "mlp", "block"):
        names = [site.name for site in removable.wholes if site.kind == kind]
        value = torch.tensor([removable.score[name] for name in names], dtype=torch.float64)
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
    slack, left, rest = cheapest / 2 + PARAMS_EPSILON, target, order
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
        back = max(0, math.ceil(-left / cheapest - 0.5 - PARAMS_EPSILON))  # halves down: ties remove more
        taken = order[gone[order] & (cost[order] == cheapest)]
        gone[taken[max(0, len(taken) - back) :]] = False
        left += min(back, len(taken)) * cheapest
        return gone if abs(left) <= missing else before  # too few of the cheapest to make up for it
    return gone


def removable(sites: Sequence[Site], min_units: int, budget: Budget, multiple: int = 1) -> int:
    """What may leave at most, as the budget counts; of layers, one always stays."""
    most = sum(removal_steps(site, min_units, multiple)[-1] * budget.price(site) for site in sites)
    blocks = [budget.price(site) for site in sites if site.kind == "block"]
    return most - max(blocks, default=0)


def all_but_lowest(score_U: Tensor, n: int) -> Tensor:
    """Mask of all but the n lowest; equal scores leave in the order of their index."""
    keep = torch.ones(len(score_U), dtype=torch.bool)
    keep[score_U.sort(stable=True).indices[: max(0, n)]] = False
    return keep

"""Levels: how many units leave each site, at a fixed sum of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pruneexp.search.common import in_order, planned, raw
from pruneexp.types import Budget, Candidate, Plan, RemovalPath, Scores, Site

Levels = dict[str, int]  # site name -> units that leave
Curve = Callable[[int], float]  # units that leave a site -> loss

_EPSILON = 1e-9


class Structures:
    """The structures that a search may choose from: for each site an order in which units leave, and the readers of a
    removal path; how many leave is a choice of `Levels` that meets the budget to the nearest cheapest unit."""

    def __init__(self, scores: Scores, sites: Sequence[Site], chosen: Sequence[Site], budget: Budget, min_units: int):
        self.scores, self.sites, self.budget = scores, sites, budget
        self.chosen = in_order(chosen)
        self.most = {site.name: max(0, site.units - min_units) for site in self.chosen}
        self.order = {name: _order_U(scores[name], value_U) for name, value_U in raw(scores, sites).items()}
        cheapest = min(budget.price(site) for site in self.chosen)
        self.cheap = [site for site in self.chosen if budget.price(site) == cheapest]
        self.dear = [site for site in self.chosen if budget.price(site) > cheapest]

    def removed(self, levels: Levels) -> int:
        return sum(levels[site.name] * self.budget.price(site) for site in self.chosen)

    def plan(self, levels: Levels) -> Plan:
        keep = {}
        for site in self.chosen:
            keep[site.name] = torch.ones(site.units, dtype=torch.bool)
            keep[site.name][self.order[site.name][: levels[site.name]]] = False
        return planned(keep, self.sites, self.budget)

    def candidate(self, levels: Levels) -> Candidate:
        """The structure with the readers of the removal paths, where there are any."""
        readers = {}
        for name, level in levels.items():
            path = self.scores[name]
            if level and isinstance(path, RemovalPath) and level in path.readers:
                readers[name] = path.readers[level]
        return Candidate(self.plan(levels), readers)

    def balanced(self, levels: Mapping[str, int]) -> Levels:
        """The nearest levels that meet the budget: the cheapest units make up for what is missing or too much, the
        same number at every site that has room; dearer ones only where the cheapest do not suffice. Ties remove
        more."""
        met = {site.name: min(max(levels[site.name], 0), self.most[site.name]) for site in self.chosen}
        cost = self.budget.price(self.cheap[0])
        while self.dear:
            left = self.budget.remove - self.removed(met)
            room = sum(self.most[site.name] - met[site.name] for site in self.cheap) * cost
            there = sum(met[site.name] for site in self.cheap) * cost
            up = 1 if left > room + cost / 2 else -1 if left < -there - cost / 2 else 0
            able = [site for site in self.dear if 0 <= met[site.name] + up <= self.most[site.name]]
            if not up or not able:
                break
            site = (min if up > 0 else max)(able, key=lambda site: met[site.name] / site.units)
            met[site.name] += up
        self._spread(met, math.floor((self.budget.remove - self.removed(met)) / cost + 0.5 + _EPSILON))
        return met

    def _spread(self, levels: Levels, units: int) -> None:
        """Changes the cheapest sites' levels by `units` in all, as evenly as their limits allow."""
        up = 1 if units > 0 else -1
        while units:
            able = [site for site in self.cheap if 0 <= levels[site.name] + up <= self.most[site.name]]
            if not able:
                return
            each = max(1, abs(units) // len(able))
            for site in able[: abs(units)]:
                room = self.most[site.name] - levels[site.name] if up > 0 else levels[site.name]
                change = min(each, room, abs(units))
                levels[site.name] += up * change
                units -= up * change

    def allotted(self, curves: Mapping[str, tuple[Sequence[int], Curve]]) -> Levels:
        """Levels of least total loss, where losses add up over sites: each site takes the level, of those given, with
        the least loss + price * parameters kept; the price of a parameter is found by bisection. Balanced."""
        cost = {site.name: self.budget.price(site) for site in self.chosen}
        known = {
            name: (
                torch.tensor([float(level * cost[name]) for level in levels], dtype=torch.float64),
                torch.tensor([curve(level) for level in levels], dtype=torch.float64),
                levels,
            )
            for name, (levels, curve) in curves.items()
        }

        def at(price: float) -> Levels:
            return {name: levels[int((loss - price * gone).argmin())] for name, (gone, loss, levels) in known.items()}

        spread = max(float(loss.max() - loss.min()) for _, loss, _ in known.values())
        low, high = -spread - 1e-300, spread + 1e-300  # nats per parameter: one parameter is worth less than all
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if self.removed(at(middle)) < self.budget.remove else (low, middle)
        ends = [at(low), at(high)]
        return self.balanced(min(ends, key=lambda levels: abs(self.removed(levels) - self.budget.remove)))


def parabola(base: int, points: Mapping[int, float]) -> Curve:
    """A convex curve through the loss at `base` (0) and one or two levels beside it: a parabola through three points,
    straight pieces where they bend the other way."""
    if len(points) == 1:
        ((level, loss),) = points.items()
        return lambda n: loss * (n - base) / (level - base)
    (below, lost), (above, won) = sorted(points.items())
    left, right = lost / (below - base), won / (above - base)  # slopes
    bend = (right - left) / (above - below)
    if bend < 0:
        return lambda n: (right if n > base else left) * (n - base)
    return lambda n: (left + bend * (n - below)) * (n - base)


def _order_U(score: object, values_U: Tensor) -> Tensor:
    """Units in the order in which they leave."""
    return score.order_U.cpu() if isinstance(score, RemovalPath) else values_U.sort(stable=True).indices

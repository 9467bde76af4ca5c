"""Levels: how many units leave each site, at a fixed sum of parameters."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from copy import copy

import torch
from torch import Tensor

from pruneexp.search.common import checked, in_order, nearest, planned
from pruneexp.search.granularity import removal_steps, step_units
from pruneexp.search.removable import Removable, unit_order
from pruneexp.types import Budget, Candidate, Plan, RemovalPath, Reorderable, Scores, Site

Levels = dict[str, int]  # site name -> steps taken: units that leave, or multiples of them
Curve = Callable[[int], float]  # level of a site -> loss

_TURNS = 8  # times that the cheapest sites' levels are changed, at most


class Structures:
    """The structures that a search may choose from. Each site has an order in which its units leave, and the refitted
    out-projections that go with it, where there are any. `Levels` say how many units leave; they meet the budget to the
    nearest cheapest unit.

    A level counts the `steps` taken. Where whole sublayers may leave, the last step takes all units.
    """

    def __init__(
        self,
        scores: Scores,
        sites: Sequence[Site],
        chosen: Sequence[Site],
        budget: Budget,
        min_units: int,
        removable: Removable | None = None,
    ):
        self.scores, self.sites, self.budget = scores, sites, budget
        self.chosen = in_order(chosen)
        self.composites, self.wholes = False, []  # whether wholes may leave; the sites that may lose units or all
        if removable is None:
            checked(scores, sites)
            self.steps = {site.name: removal_steps(site, min_units, 1) for site in self.chosen}
            units = dict.fromkeys(self.steps, 1)  # of a step
        else:
            able = [site for site in self.chosen if len(removable.steps[site.name]) > 1]
            self.chosen = able or self.chosen[:1]
            self.steps = removable.steps
            units = {s.name: step_units(s, removable.multiple, s in removable.fine) for s in self.chosen}
            self.composites = bool(removable.composites)
            self.wholes = [site for _, site in removable.composites if site in removable.fine]
        self.cost = {site.name: units[site.name] * budget.price(site) for site in self.chosen}  # of a step
        self.size = {site.name: -(-site.units // units[site.name]) for site in self.chosen}  # steps of the whole site
        self.most = {site.name: len(self.steps[site.name]) - 1 for site in self.chosen}
        # a unit's place in the order in which units leave
        self.place = {site.name: unit_order(scores[site.name], site.units).argsort() for site in self.chosen}
        self.fits: dict[str, Mapping[int, tuple[Tensor, Tensor | None]]] = {
            name: path.out_projections
            for name in self.place
            if isinstance(path := scores[name], RemovalPath) and path.out_projections
        }
        cheapest = min(self.cost[site.name] for site in self.chosen)
        self.cheap = [site for site in self.chosen if self.cost[site.name] == cheapest]
        self.dear = [site for site in self.chosen if self.cost[site.name] > cheapest]

    def ordered(self, other: Scores) -> Structures:
        """With the units of the sites that `other` scores leaving in its order. Levels mean what they did."""
        copied = copy(self)
        copied.place, copied.fits = dict(self.place), dict(self.fits)
        for site in self.chosen:
            if site.name in other:
                order_U = unit_order(other[site.name], site.units)
                copied.place[site.name] = order_U.argsort()
                if (fits := copied.fits.pop(site.name, None)) is not None and isinstance(fits, Reorderable):
                    copied.fits[site.name] = fits.in_order(order_U)
        return copied

    @property
    def removable(self) -> int:
        """What may leave at most; of layers, one always stays."""
        blocks = [self.budget.price(site) for site in self.chosen if site.kind == "block"]
        return self.removed(self.most) - max(blocks, default=0)

    def units(self, levels: Mapping[str, int]) -> dict[str, int]:
        """How many units leave each site."""
        return {name: self.steps[name][level] for name, level in levels.items()}

    def levels(self, plan: Plan) -> Levels:
        """The levels of a plan, or the next above."""
        levels = {site.name: bisect_left(self.steps[site.name], plan.removed(site)) for site in self.chosen}
        return {name: min(level, self.most[name]) for name, level in levels.items()}

    def removed(self, levels: Levels) -> int:
        """What leaves the sites of these levels, as the budget counts."""
        units = self.units(levels)
        return sum(self.budget.taken(site, units[site.name]) for site in self.chosen if site.name in units)

    def plan(self, levels: Levels) -> Plan:
        keep = {name: self.place[name] >= count for name, count in self.units(levels).items()}
        return planned(keep, self.sites, self.budget)

    def candidate(self, levels: Levels) -> Candidate:
        """The structure with the out-projections fitted anew, where there are any."""
        units = self.units(levels)
        fitted = {name: fits[units[name]] for name, fits in self.fits.items() if units[name] and units[name] in fits}
        return Candidate(self.plan(levels), fitted)

    def balanced(self, levels: Mapping[str, int]) -> Levels:
        """The nearest levels that meet the budget: the cheapest units make up for what is missing or too much, the
        same number at every site that has room; dearer ones only where the cheapest do not suffice. Ties remove
        more."""
        met = {site.name: min(max(levels[site.name], 0), self.most[site.name]) for site in self.chosen}
        cost = self.cost[self.cheap[0].name]
        seen: list[Levels] = []
        while self.dear and met not in seen:
            seen.append(dict(met))
            left = self.budget.remove - self.removed(met)
            there = self.removed({site.name: met[site.name] for site in self.cheap})
            room = self.removed({site.name: self.most[site.name] for site in self.cheap}) - there
            up = 1 if left > room + cost / 2 else -1 if left < -there - cost / 2 else 0
            able = [site for site in self.dear if 0 <= met[site.name] + up <= self.most[site.name]]
            if not up or not able:
                return self._filled(met)
            site = (min if up > 0 else max)(able, key=lambda site: met[site.name] / self.size[site.name])
            met[site.name] += up
        # the cheapest are too few to make up for a dear one: the nearest of those that it went round in
        ends = [self._filled(dict(end)) for end in seen[seen.index(met) :]] if seen else [self._filled(met)]
        return min(ends, key=lambda end: abs(self.budget.remove - self.removed(end)))

    def _filled(self, met: Levels) -> Levels:
        """The cheapest sites' levels changed until the budget is met; again where steps were not of one size."""
        cost, best = self.cost[self.cheap[0].name], dict(met)
        for _ in range(_TURNS):
            left = self.budget.remove - self.removed(met)
            units = nearest(left / cost)
            self._spread(met, units)
            if abs(self.budget.remove - self.removed(met)) <= abs(self.budget.remove - self.removed(best)):
                best = dict(met)
            if not units:
                break
        return best

    def _spread(self, levels: Levels, units: int) -> None:
        """Changes the cheapest sites' levels by `units` in all, as evenly as their limits allow."""
        up = 1 if units > 0 else -1
        while units:
            able = [site for site in self.cheap if 0 <= levels[site.name] + up <= self.most[site.name]]
            able = [site for site in able if up > 0 or not self._whole(site, levels)] or able
            if not able:
                return
            each = max(1, abs(units) // len(able))
            for site in able[: abs(units)]:
                room = self.most[site.name] - levels[site.name] if up > 0 else levels[site.name]
                change = min(each, room, abs(units))
                levels[site.name] += up * change
                units -= up * change

    def _whole(self, site: Site, levels: Levels) -> bool:
        """Whether a sublayer has left as a whole, where its units might have left alone."""
        return levels[site.name] == self.most[site.name] and site in self.wholes

    def allotted(self, curves: Mapping[str, tuple[Sequence[int], Curve]]) -> Levels:
        """Levels of least total loss, where losses add up over sites: each site takes the level, of those given, with
        the least loss + price * parameters kept; the price of a parameter is found by bisection. Balanced."""
        sites = {site.name: site for site in self.chosen}
        known = {
            name: (
                torch.tensor(
                    [float(self.budget.taken(sites[name], self.steps[name][n])) for n in levels], dtype=torch.float64
                ),
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

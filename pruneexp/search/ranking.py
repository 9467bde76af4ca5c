"""One ranking of items that differ in size and may hold each other: the lowest leave until the budget is met."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from pruneexp.search.common import PARAMS_EPSILON
from pruneexp.search.removable import BLOCK, SUBLAYER, UNIT, Gone, Item, Removable
from pruneexp.types import Plan, Site

_FINEST = 100_000  # parts of all times that sums of them are told apart by
_MANY = 4096  # options of all layers, beyond which sums are not searched

Event = tuple[Item, int, int]  # what left, how many of its units were gone before, what it took along


def ranked(
    removable: Removable, unit_values: Mapping[str, Sequence[float]], composite_value: Callable[[Item, Gone], float]
) -> Plan:
    """The plan of a walk up the ranking: the item of lowest value leaves unless it overshoots by more than half the
    cheapest one (or half of itself).

    `unit_values`: by site, of what leaves with each step; a site's units leave in the order of its scores.
    `composite_value`: of a whole sublayer or layer given what has left, asked anew whenever something in it leaves.
    Where the walk ends too early, the first item in the ranking that can be made up for leaves, and the last of those
    that have left come back; where that does not do, layers change as little as they have to. Ties leave in the order
    of layer, units before sublayers before layers, site name.
    """
    walk = _Walk(removable, unit_values, composite_value)
    walk.up()
    if walk.left > walk.slack:
        walk.repair()
    met = abs(walk.left) <= walk.slack
    return removable.plan_without(walk.gone if met else _nearest(removable, walk.gone, abs(walk.left)))


class _Walk:
    def __init__(
        self,
        removable: Removable,
        unit_values: Mapping[str, Sequence[float]],
        composite_value: Callable[[Item, Gone], float],
    ):
        self.removable, self.unit_values, self.composite_value = removable, unit_values, composite_value
        self.gone, self.left = removable.nothing(), removable.budget.remove
        self.slack = removable.cheapest / 2 + PARAMS_EPSILON
        self.at = {site.name: 0 for site in removable.fine}  # steps taken
        self.last = {name: len(steps) - 1 for name, steps in removable.unit_steps.items()}
        self.holders: dict[int, list[Item]] = {}
        for item in removable.composites:
            self.holders.setdefault(item[1].layer, []).append(item)
        self.heap: list[tuple[float, int, int, str, int]] = []
        self.items: dict[tuple[int, str], Item] = {}
        self.version: dict[tuple[int, str], int] = {}
        self.passed: list[Item] = []
        self.events: list[Event] = []

    def up(self) -> None:
        for site in self.removable.fine:
            self._push((UNIT, site))
        for item in self.removable.composites:
            self._push(item)
        while self.heap:
            _, _, tier, name, version = heapq.heappop(self.heap)
            item = self.items[tier, name]
            if version != self.version[tier, name] or not self._there(item):
                continue
            cost = self._cost(item)
            if cost > self.left + min(self.slack, cost / 2 + PARAMS_EPSILON):  # and ever after: `left` shrinks as fast
                self.passed.append(item)
                self.version[tier, name] = -1
                continue
            self._take(item)
            self._renew(item)

    def repair(self) -> None:
        """One item more, and others back for what it is too much."""
        best: tuple[float, Item, list[int]] | None = None
        for item in self.passed:
            if not self._there(item):
                continue
            over, back = self._made_up(item)
            if best is None or abs(over) < best[0]:
                best = abs(over), item, back
            if abs(over) <= self.slack:
                break
        if best is not None and best[0] < abs(self.left):
            for number in best[2]:
                self._return(self.events[number])
            self._take(best[1])

    def _made_up(self, item: Item) -> tuple[float, list[int]]:
        """What would be removed too much if `item` left, and the events to undo for that."""
        over, back = self._cost(item) - self.left, []
        _, held = item
        kept: set[str] = set()  # a later event there is not undone: no earlier one can be
        for number in reversed(range(len(self.events))):
            if over <= self.slack:
                break
            (tier, site), _, cost = self.events[number]
            inside = {inner.name for inner in self.removable.inside[site.layer]} if tier == BLOCK else {site.name}
            mine = site.layer == held.layer if BLOCK in (item[0], tier) else site.name == held.name
            if mine or cost > over + self.slack or inside & kept or (tier != BLOCK and site.layer in self.gone.layers):
                kept |= inside
                continue
            over -= cost
            back.append(number)
        return over, back

    def _there(self, item: Item) -> bool:
        """Whether it may still leave."""
        tier, site = item
        if site.layer in self.gone.layers:
            return False
        if tier == UNIT:
            at = self.at[site.name]
            return at < self.last[site.name] and self.gone.units[site.name] == self.removable.steps[site.name][at]
        return self._cost(item) > 0

    def _cost(self, item: Item) -> int:
        tier, site = item
        if tier != UNIT:
            return self.removable.cost(item, self.gone)
        steps, at, budget = self.removable.steps[site.name], self.at[site.name], self.removable.budget
        return budget.taken(site, steps[at + 1]) - budget.taken(site, steps[at])

    def _take(self, item: Item) -> None:
        (tier, site), cost = item, self._cost(item)
        self.events.append((item, self.gone.units.get(site.name, 0), cost))
        self.left -= cost
        if tier == BLOCK:
            self.gone.layers.add(site.layer)
        elif tier == SUBLAYER:
            self.gone.units[site.name] = site.units
        else:
            self.at[site.name] += 1
            self.gone.units[site.name] = self.removable.steps[site.name][self.at[site.name]]

    def _return(self, event: Event) -> None:
        (tier, site), units, cost = event
        self.left += cost
        if tier == BLOCK:
            self.gone.layers.discard(site.layer)
            return
        self.at[site.name] = self.at.get(site.name, 0) - (tier == UNIT)
        self.gone.units[site.name] = units

    def _renew(self, taken: Item) -> None:
        """New values of what is next, and of what held the item that has left."""
        tier, site = taken
        if tier == UNIT:
            self._push(taken)
        for item in self.holders.get(site.layer, ()):
            key = (item[0], item[1].name)
            if item is not taken and self.version[key] >= 0 and (item[0] == BLOCK or item[1] is site):
                self._push(item)

    def _push(self, item: Item) -> None:
        if not self._there(item):
            return
        tier, site = item
        self.items[tier, site.name] = item
        version = self.version[tier, site.name] = self.version.get((tier, site.name), 0) + 1
        if tier == UNIT:
            value = self.unit_values[site.name][self.at[site.name]]
        else:
            value = self.composite_value(item, self.gone)
        heapq.heappush(self.heap, (value, site.layer, tier, site.name, version))


def _nearest(removable: Removable, gone: Gone, off: float) -> Gone:
    """Of all that may leave, what comes nearest to the budget and then changes layers least from `gone`: a subset sum
    over the options of the layers. `gone`, which is `off` by so much, where nothing is nearer or the options are too
    many."""
    layers = sorted({site.layer for site in removable.chosen})
    if sum(math.prod(len(removable.steps[s.name]) for s in _inside(removable, layer)) for layer in layers) > _MANY:
        return gone
    options = [_options(removable, layer) for layer in layers]
    unit = math.gcd(*(cost for own in options for cost, _, _ in own)) or 1
    if removable.budget.times is not None:  # times have no common measure, and sums to the picosecond would be too many
        unit = max(unit, round(removable.budget.total / _FINEST))
    reach = [1]  # of the layers from each on: bit n for a sum of n
    for own in reversed(options):
        reachable = 0
        for cost, _, _ in own:
            reachable |= reach[-1] << round(cost / unit)
        reach.append(reachable)
    sums = [n for n in range(reach[-1].bit_length()) if reach[-1] >> n & 1]
    rest = min(reversed(sums), key=lambda n: abs(n * unit - removable.budget.remove))
    if abs(rest * unit - removable.budget.remove) >= off:
        return gone
    result = removable.nothing()
    for layer, own, after in zip(layers, options, reversed(reach[:-1]), strict=True):
        now = next(cost for cost, units, out in own if _is(gone, layer, units, out))
        able = [o for o in own if round(o[0] / unit) <= rest and after >> (rest - round(o[0] / unit)) & 1]
        cost, units, out = min(able, key=lambda option: abs(option[0] - now))
        rest -= round(cost / unit)
        result.units.update(units)
        result.layers |= {layer} if out else set()
    return result


def _inside(removable: Removable, layer: int) -> list[Site]:
    return [site for site in removable.chosen if site.layer == layer and site.kind != "block"]


def _options(removable: Removable, layer: int) -> list[tuple[int, dict[str, int], bool]]:
    """What may leave a layer: its cost, the units of each site, whether the layer leaves."""
    own, options = _inside(removable, layer), []
    for counts in itertools.product(*(removable.steps[site.name] for site in own)):
        cost = sum(removable.budget.taken(site, count) for count, site in zip(counts, own, strict=True))
        options.append((cost, {site.name: count for count, site in zip(counts, own, strict=True)}, False))
    blocks = [site for tier, site in removable.composites if tier == BLOCK and site.layer == layer]
    return options + [(removable.budget.price(site), {}, True) for site in blocks]


def _is(gone: Gone, layer: int, units: Mapping[str, int], out: bool) -> bool:
    return out if layer in gone.layers else not out and all(gone.units[n] == count for n, count in units.items())

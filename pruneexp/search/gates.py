"""Probabilities of staying, for every unit, whole sublayer and whole layer that may leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pruneexp.search.removable import BLOCK, SUBLAYER, UNIT, Item, Removable
from pruneexp.types import Plan


class Gates:
    """Independent Bernoulli variables in one vector: the units of each site that may leave, then a gate for every
    sublayer and layer. What is inside a closed gate is gone."""

    def __init__(self, removable: Removable):
        self.removable = removable
        self.items: list[Item] = [(UNIT, site) for site in removable.fine] + removable.composites
        self.sizes = [site.units if tier == UNIT else 1 for tier, site in self.items]
        kinds = zip(self.items, self.sizes, strict=True)
        self.kinds = [(tier, site.kind) for (tier, site), size in kinds for _ in range(size)]
        number = {(tier, site.name): i for i, (tier, site) in enumerate(self.items)}
        block_of = {site.layer: number[tier, site.name] for tier, site in removable.composites if tier == BLOCK}
        self.holders = [self._holders(item, number, block_of) for item in self.items]
        own = [float(self._own(item, number)) for item in self.items]
        self.cost = torch.tensor(own, dtype=torch.float64).repeat_interleave(
            torch.tensor(self.sizes, dtype=torch.int64)
        )

    def _holders(self, item: Item, number: Mapping[tuple[int, str], int], block_of: Mapping[int, int]) -> list[int]:
        """The gates that an item is inside of."""
        tier, site = item
        sublayer = [number[SUBLAYER, site.name]] if tier == UNIT and (SUBLAYER, site.name) in number else []
        return sublayer + ([block_of[site.layer]] if tier != BLOCK and site.layer in block_of else [])

    def _own(self, item: Item, number: Mapping[tuple[int, str], int]) -> int:
        """What leaves with one variable alone, and with no other."""
        tier, site = item
        budget = self.removable.budget
        if tier == UNIT:
            return budget.price(site)
        if tier == SUBLAYER:
            return budget.beside(site) if (UNIT, site.name) in number else budget.taken(site, site.units)
        apart = [s for s in self.removable.inside[site.layer] if {(UNIT, s.name), (SUBLAYER, s.name)} & number.keys()]
        return budget.price(site) - sum(budget.taken(inner, inner.units) for inner in apart)

    @property
    def depths(self) -> list[int]:
        """By item: the most variables that anything in it depends on, its own included."""
        depths = [1 + len(holders) for holders in self.holders]
        for holders in self.holders:
            for holder in holders:
                depths[holder] = max(depths[holder], 1 + len(holders))
        return depths

    def split(self, s: Tensor) -> list[Tensor]:
        return list(s.split(self.sizes))

    def kept(self, s: Tensor) -> float:
        """What stays on average, as the budget counts."""
        parts, costs = self.split(s), self.split(self.cost)
        total = 0.0
        for part, cost, holders in zip(parts, costs, self.holders, strict=True):
            open_ = 1.0
            for holder in holders:
                open_ *= parts[holder].item()
            total += open_ * (part * cost).sum().item()
        return total

    def shifted(self, s: Tensor, most: float) -> Tensor:
        """All probabilities less the same, clamped to [0, 1], so that on average no more than `most` stays."""
        inside = s.clamp(0, 1)
        if self.kept(inside) <= most:
            return inside
        low, high = 0.0, s.max().item()
        for _ in range(60):
            v = (low + high) / 2
            low, high = (v, high) if self.kept((s - v).clamp(0, 1)) > most else (low, v)
        return (s - high).clamp(0, 1)

    def plan(self, mask: Tensor) -> Plan:
        """The structure of one draw, True = stays."""
        keep: dict[str, Tensor] = {}
        out: set[int] = set()
        for (tier, site), stays in zip(self.items, self.split(mask), strict=True):
            if tier == BLOCK:
                out |= set() if stays.item() else {site.layer}
            elif tier == SUBLAYER:
                keep[site.name] = keep.get(site.name, torch.ones(site.units, dtype=torch.bool)) & stays
            else:
                keep[site.name] = stays
        return self.removable.plan(keep, out)


def projected(s: Tensor, cost: Tensor, most: float) -> Tensor:
    """The nearest point of {s in [0, 1], sum s cost <= most}: clamp(s - v cost), v >= 0 by bisection."""
    inside = s.clamp(0, 1)
    if (inside * cost).sum() <= most:
        return inside
    unit = cost / cost.max()
    low, high = 0.0, (s / unit).max().item()
    for _ in range(100):
        v = (low + high) / 2
        above = ((s - v * unit).clamp(0, 1) * cost).sum() > most
        low, high = (v, high) if above else (low, v)
    return (s - high * unit).clamp(0, 1)


def as_groups(kinds: Sequence[tuple[int, str]], joint: bool) -> list[Tensor]:
    """Masks of the variables that share a budget: all of them, or those of each kind."""
    if joint:
        return [torch.ones(len(kinds), dtype=torch.bool)]
    return [torch.tensor([kind == each for kind in kinds]) for each in dict.fromkeys(kinds)]

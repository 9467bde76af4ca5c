"""What may leave in one search, what it costs and what it is worth: units, whole sublayers, whole layers.

A *composite* (a whole sublayer or layer) is worth what it holds: a sublayer's score is the sum of its units' (of a
removal path: its last cumulative cost), a layer's the sum of its sublayers', unless the criterion scores it as a whole.
When it leaves, what it still holds leaves with it, and only that is counted. It ignores `min_units`. Of the whole
attention sublayers, of the FFNs and of the layers, the one with the highest score always stays; among layers, it keeps
its sublayers too. A whole expert, a unit like others, is worth what its channels are together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pruneexp.search.common import checked_score, in_order, planned, require
from pruneexp.search.granularity import (
    UNITS,
    WHOLE,
    Amounts,
    check_multiple,
    chosen_sites,
    is_plain,
    removal_steps,
    step_units,
)
from pruneexp.types import Budget, Plan, RemovalPath, Score, Scores, Site, start_name, unit_scores

UNIT, SUBLAYER, BLOCK = range(3)
Item = tuple[int, Site]  # what may leave at once: the next units of a site, a whole sublayer, a whole layer


def unit_order(score: Score, units: int) -> Tensor:
    """Units in the order in which they leave: int64 [U]."""
    if isinstance(score, RemovalPath):
        return score.order_U.cpu()
    values_U = unit_scores(score)
    return values_U.detach().cpu().sort(stable=True).indices if len(values_U) == units else torch.arange(units)


def losses_in_order(score: Score, units: int) -> Tensor:
    """What each unit adds to the loss, in the criterion's terms, in the order in which they leave: float64 [U]."""
    if isinstance(score, RemovalPath):
        return torch.diff(score.cost_U.cpu().double(), prepend=torch.zeros(1, dtype=torch.float64))
    return unit_scores(score).detach().cpu().double()[unit_order(score, units)]


def whole_score(score: Score) -> float:
    """What all units of a sublayer are worth together: of a removal path the last cumulative cost."""
    return (score.cost_U[-1] if isinstance(score, RemovalPath) else unit_scores(score).double().sum()).item()


def block_scores(scores: Scores, blocks: Sequence[Site]) -> dict[str, Tensor]:
    """Scores of whole layers, [1] each, from those of the sublayers in them."""
    inside = {block.name: [scores[name] for name in scores if name.startswith(f"{block.name}.")] for block in blocks}
    return {name: torch.tensor([sum(map(whole_score, own))]).double() for name, own in inside.items()}


def expert_scores(scores: Scores, sites: Sequence[Site], starts: Iterable[str] = ()) -> dict[str, Tensor]:
    """Scores of whole experts, [U] for each of the sites whose units they are, from those of their channels: the
    criterion's, and those of a search's starts."""
    wholes = {}
    for site in (site for site in sites if site.kind == "experts"):
        for own in (site.name, *(start_name(start, site.name) for start in starts)):
            names = [f"{own}.{unit}" for unit in range(site.units)]
            if all(name in scores for name in names):
                wholes[own] = torch.tensor([whole_score(scores[name]) for name in names], dtype=torch.float64)
    return wholes


def bundled(values: Tensor, steps: Sequence[int]) -> list[float]:
    """The mean value of the units that leave with each step; `values` are in the order in which units leave."""
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), values.double().cumsum(0)])[torch.tensor(steps)]
    return (sums.diff() / torch.tensor(steps).diff()).tolist()


@dataclass
class Gone:
    """What has left so far: units by site, and whole layers."""

    units: dict[str, int]
    layers: set[int] = field(default_factory=set)


class Removable:
    """What may leave in one search, by its settings. `layers`: only there; the layers beside them stay whole.

    Raises:
        RunError: scores are missing, of another length or not finite; the message names the site.
    """

    def __init__(
        self,
        method: Amounts,
        scores: Scores,
        sites: Sequence[Site],
        budget: Budget,
        layers: Collection[int] | None = None,
    ):
        granularity, min_units, multiple = method.granularity, method.min_units, method.multiple
        check_multiple(sites, granularity, multiple)
        chosen = chosen_sites(sites, granularity, budget)
        self.sites, self.budget, self.scores, self.multiple = in_order(sites), budget, scores, multiple
        self.chosen = [site for site in chosen if layers is None or site.layer in layers]
        self.fine = [site for site in self.chosen if UNITS.get(site.kind) in granularity]
        self.inside: dict[int, list[Site]] = {site.layer: [] for site in sites}
        for site in self.sites:
            if site.kind != "block":
                self.inside[site.layer].append(site)
        self.wholes = [site for site in self.chosen if WHOLE.get(site.kind) in granularity]
        fine = {site.name for site in self.fine}
        self.score = {site.name: self._whole_score(site, site.name in fine) for site in self.wholes}
        self.losses: dict[str, list[float]] = {}  # what the first 0, 1, 2, ... units of a site take along
        for site in self.fine:
            self.score.setdefault(site.name, self._whole_score(site, True))
            added = losses_in_order(scores[site.name], site.units).cumsum(0)
            self.losses[site.name] = [0.0, *added.tolist()]
        plain = is_plain(granularity, multiple)  # layers alone: any may leave, and one of all stays
        self.composites = [(BLOCK, site) for site in self.wholes] if plain else self._but_the_best(self.wholes)
        self.one_stays = plain and len(self.chosen) == len(self.sites)
        self.unit_steps = {site.name: removal_steps(site, min_units, multiple) for site in self.fine}
        whole = {site.name for _, site in self.composites}
        self.steps = {
            site.name: removal_steps(site, min_units, multiple, site.name in fine, site.name in whole)
            for site in self.chosen
        }

    def _whole_score(self, site: Site, by_unit: bool) -> float:
        """Of a sublayer or layer, as it was scored, or summed up."""
        if site.kind == "block" and site.name not in self.scores:
            return sum(self._whole_score(inner, True) for inner in self.inside[site.layer])
        return whole_score(checked_score(self.scores, site, or_one=not by_unit))

    def _but_the_best(self, composites: Sequence[Site]) -> list[Item]:
        """The composites that may leave: all but the best of each kind, or all but those of the best layer."""
        stay: set[str] = set()
        best = [site for site in composites if site.kind == "block"]
        for kind in ["block"] if best else ["attention", "mlp"]:
            own = [site for site in composites if site.kind == kind]
            beside = [site for site in self.sites if site.kind == kind and site not in self.chosen]
            if own and not beside:  # of equals, which leave in order, the last
                stays = max(reversed(own), key=lambda site: self.score[site.name])
                stay |= {stays.name, *(site.name for site in self.inside[stays.layer] if kind == "block")}
        return [(BLOCK if s.kind == "block" else SUBLAYER, s) for s in composites if s.name not in stay]

    def rescored(self, scores: Scores) -> Removable:
        """With other scores of units; what may leave is the same."""
        other = copy(self)
        other.scores = {**self.scores, **scores}
        return other

    @property
    def most(self) -> int:
        """What may leave at most."""
        out = {site.layer: site for tier, site in self.composites if tier == BLOCK}
        inner = [site for site in self.chosen if site.kind != "block" and site.layer not in out]
        prices = [self.budget.price(site) for site in out.values()]
        stays = max(prices) if prices and self.one_stays else 0
        return sum(prices) - stays + sum(self.budget.taken(site, self.steps[site.name][-1]) for site in inner)

    @property
    def cheapest(self) -> int:
        """What leaves with the cheapest item."""
        units = [step_units(site, self.multiple) * self.budget.price(site) for site in self.fine]
        wholes = [self.budget.taken(site, site.units) for _, site in self.composites]
        return min([*units, *wholes], default=1)

    def nothing(self) -> Gone:
        return Gone({site.name: 0 for site in self.sites if site.kind != "block"})

    def cost(self, item: Item, gone: Gone) -> int:
        """What leaves with a composite, as the budget counts: what it still holds."""
        tier, site = item
        if tier == SUBLAYER:
            return self.budget.taken(site, site.units) - self.budget.taken(site, gone.units[site.name])
        before = sum(self.budget.taken(inner, gone.units[inner.name]) for inner in self.inside[site.layer])
        return self.budget.price(site) - before

    def loss(self, item: Item, gone: Gone) -> float:
        """The score of what a composite still holds."""
        tier, site = item
        inside = [site] if tier == SUBLAYER else self.inside[site.layer]
        return self.score[site.name] - sum(self._lost(inner, gone.units[inner.name]) for inner in inside)

    def _lost(self, site: Site, units: int) -> float:
        if not units:
            return 0.0
        return self.score[site.name] if units == site.units else self.losses[site.name][units]

    def plan(self, keep: Mapping[str, Tensor], out: Collection[int]) -> Plan:
        """Masks [U] of units that stay (sites without one stay whole), and the layers that leave."""
        base = any(site.kind != "block" for site in self.sites)
        shown = [s for s in self.sites if not base or (s.layer in out) == (s.kind == "block")]
        masks = {site.name: keep[site.name] for site in shown if site.name in keep}
        masks |= {s.name: torch.tensor([s.layer not in out]) for s in shown if s.kind == "block"}
        return planned(masks, shown, self.budget)

    def plan_without(self, gone: Gone) -> Plan:
        """The plan of units that have left in the criterion's order."""
        keep = {}
        for site in self.chosen:
            if count := gone.units.get(site.name):
                keep[site.name] = torch.ones(site.units, dtype=torch.bool)
                keep[site.name][unit_order(self.scores[site.name], site.units)[:count]] = False
        return self.plan(keep, gone.layers)


def within_reach(method: Amounts, sites: Sequence[Site], budget: Budget, layers: Collection[int] | None = None) -> None:
    """Raises ConfigError, naming the largest ratio, where all that may leave is less than the budget."""
    equal = {site.name: torch.zeros(site.units) for site in sites}
    require(budget, Removable(method, equal, sites, budget, layers).most)

"""What may leave, and by how much at a time: units, whole sublayers, whole blocks; FFN widths in multiples.

The units are heads and channels; or, of a mixture's FFN, whole experts in the place of their channels, a layer keeping
as many as a token is routed to. An expert's score is the sum of its channels'.

A *composite* (a whole sublayer or block) is worth what it holds: a sublayer's score is the sum of its units' (of a
removal path: its last cumulative cost), a block's the sum of its sublayers', unless the criterion scores it as a whole.
When it leaves, what it still holds leaves with it, and only that is counted. It ignores `min_units`. Of the whole
attention sublayers, of the FFNs and of the blocks, the one with the highest score always stays; among blocks, it keeps
its sublayers too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pruneexp.search.common import by_layer, in_order, planned, require
from pruneexp.types import Budget, ConfigError, Plan, RemovalPath, RunError, Score, Scores, Site, unit_scores

Granularity = list[Literal["heads", "channels", "blocks", "attention", "ffn", "experts"]]
KIND = {
    "heads": "attention",
    "channels": "mlp",
    "blocks": "block",
    "attention": "attention",
    "ffn": "mlp",
    "experts": "experts",
}
UNITS = {"attention": "heads", "mlp": "channels", "experts": "experts"}  # kind -> what its units are called
WHOLE = {"attention": "attention", "mlp": "ffn", "block": "blocks"}  # kind -> what the whole of it is called
_AS_WHOLE = {"attention": "sublayer", "ffn": "sublayer", "blocks": "block"}  # what a criterion `judges` then
_FROM_UNITS = {**{name: {kind} for name, kind in KIND.items()}, "experts": {"mlp"}, "blocks": {"attention", "mlp"}}

UNIT, SUBLAYER, BLOCK = range(3)
Item = tuple[int, Site]  # what may leave at once: the next units of a site, a whole sublayer, a whole block


def check_settings(min_units: int, granularity: Granularity, multiple: int = 1) -> None:
    if min_units < 0:
        raise ConfigError(f"min_units={min_units!r}: expected an integer >= 0")
    if not granularity or len(set(granularity)) < len(granularity):
        raise ConfigError(f"granularity={granularity!r}: expected one or more of {', '.join(KIND)}, each once")
    if {"channels", "experts"} <= set(granularity):
        raise ConfigError(f"granularity={granularity!r}: expected channels or experts, which hold them")
    if multiple < 1:
        raise ConfigError(f"multiple={multiple!r}: expected an integer >= 1, of which FFN widths are multiples")


def is_plain(granularity: Granularity, multiple: int) -> bool:
    """Units one by one, nothing that holds others: heads, channels or both; or blocks alone."""
    if set(granularity) <= {"heads", "channels", "experts"}:
        return multiple == 1 or "channels" not in granularity
    return granularity == ["blocks"]


def is_nested(granularity: Granularity) -> bool:
    """Whether something that may leave holds other things that may."""
    named = set(granularity)
    return {"heads", "attention"} <= named or {"channels", "ffn"} <= named or ("blocks" in named and len(named) > 1)


def scored_as(granularity: Sequence[str], judges: Collection[str]) -> Literal["wholes", "units"] | None:
    """What a criterion is shown for a search to have the scores it needs: whole sublayers and blocks, or units, whose
    scores add up to those of wholes; None where it judges neither."""
    if all(_AS_WHOLE.get(name) in judges for name in granularity):
        return "wholes"
    return "units" if all(_FROM_UNITS[name] <= set(judges) for name in granularity) else None


def chosen_sites(sites: Sequence[Site], granularity: Granularity, budget: Budget) -> list[Site]:
    """The sites that may lose units. Raises ConfigError where there are none (one layer of several may have none)."""
    priced = [site for site in in_order(sites) if budget.price(site)]  # FFN channels, say, fill no KV cache: they stay
    chosen = [site for site in priced if site.kind in {KIND[name] for name in granularity}]
    if not chosen and complete(sites, budget):
        there = [name for name, kind in KIND.items() if any(site.kind == kind for site in priced)]
        raise ConfigError(f"search.granularity={list(granularity)!r}: expected some of {', '.join(there)}")
    return chosen


def complete(sites: Sequence[Site], budget: Budget) -> bool:
    """Whether these are all layers, not one of several."""
    return budget.layers is None or budget.layers == len(by_layer(sites))


def least_units(site: Site, min_units: int) -> int:
    """Units that a site keeps: `min_units`, of experts as many as a token needs, of a block none (one block of all
    stays)."""
    return 0 if site.kind == "block" else max(min_units, site.least)


def removal_steps(site: Site, min_units: int, multiple: int, units: bool = True, whole: bool = False) -> list[int]:
    """How many units may have left, ascending from 0. What stays of an FFN is a multiple, of any site at least
    `min_units`; `units`: they may leave; `whole`: all of them together may."""
    multiple = multiple if site.kind == "mlp" else 1
    steps = [0]
    if units:
        least = -(-least_units(site, min_units) // multiple)
        steps += [site.units - n * multiple for n in range((site.units - 1) // multiple, least - 1, -1)]
    if whole and steps[-1] < site.units:
        steps.append(site.units)
    return steps


def step_units(site: Site, multiple: int, units: bool = True) -> int:
    """Units that leave in one step (the first one of a width that is no multiple, and a jump to nothing, aside)."""
    if not units:
        return site.units
    return min(multiple, max(1, site.units)) if site.kind == "mlp" else 1


def check_multiple(sites: Sequence[Site], granularity: Granularity, multiple: int) -> None:
    """Raises ConfigError where no FFN is as wide as `multiple`."""
    widest = max((site.units for site in sites if site.kind == "mlp"), default=multiple)
    if "channels" in granularity and multiple > widest:
        raise ConfigError(f"search.multiple={multiple!r}: expected at most {widest}, the FFN width")


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
    """Scores of whole blocks, [1] each, from those of the sublayers in them."""
    inside = {block.name: [scores[name] for name in scores if name.startswith(f"{block.name}.")] for block in blocks}
    return {name: torch.tensor([sum(map(whole_score, own))]).double() for name, own in inside.items()}


def expert_scores(scores: Scores, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Scores of whole experts, [U] for each of the sites whose units they are, from those of their channels."""
    found = {}
    for site in (site for site in sites if site.kind == "experts"):
        names = [f"{site.name}.{unit}" for unit in range(site.units)]
        if all(name in scores for name in names):
            found[site.name] = torch.tensor([whole_score(scores[name]) for name in names], dtype=torch.float64)
    return found


def bundled(values: Tensor, steps: Sequence[int]) -> list[float]:
    """Means of what leaves with each step, of values in the order in which units leave."""
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), values.double().cumsum(0)])[torch.tensor(steps)]
    return (sums.diff() / torch.tensor(steps).diff()).tolist()


@dataclass
class Gone:
    """What has left so far: units by site, blocks by layer."""

    units: dict[str, int]
    layers: set[int] = field(default_factory=set)


class Grain:
    """What may leave in one search. `layers`: only there; the layers beside them stay whole.

    Raises:
        RunError: scores are missing, of another length or not finite; the message names the site.
    """

    def __init__(
        self,
        scores: Scores,
        sites: Sequence[Site],
        budget: Budget,
        granularity: Granularity,
        min_units: int,
        multiple: int,
        layers: Collection[int] | None = None,
    ):
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
        plain = is_plain(granularity, multiple)  # blocks alone: any may leave, and one of all stays
        self.composites = [(BLOCK, site) for site in self.wholes] if plain else self._but_the_best(self.wholes)
        self.one_stays = plain and len(self.chosen) == len(self.sites)
        self.unit_steps = {site.name: removal_steps(site, min_units, multiple) for site in self.fine}
        whole = {site.name for _, site in self.composites}
        self.steps = {
            site.name: removal_steps(site, min_units, multiple, site.name in fine, site.name in whole)
            for site in self.chosen
        }

    def _whole_score(self, site: Site, by_unit: bool) -> float:
        """Of a sublayer or block, as it was scored, or summed up."""
        if site.kind == "block" and site.name not in self.scores:
            return sum(self._whole_score(inner, True) for inner in self.inside[site.layer])
        if site.name not in self.scores:
            raise RunError(f"{site.name}: the criterion gave no scores")
        values_U = unit_scores(self.scores[site.name])
        if values_U.shape != (site.units,) and (by_unit or values_U.shape != (1,)):
            raise RunError(
                f"{site.name}: {list(values_U.shape)} scores, expected one for each of its {site.units} units"
            )
        if not torch.isfinite(values_U).all():
            raise RunError(f"{site.name}: scores hold NaN or Inf")
        return whole_score(self.scores[site.name])

    def _but_the_best(self, composites: Sequence[Site]) -> list[Item]:
        """The composites that may leave: all but the best of each kind, or all but those of the best block's layer."""
        stay: set[str] = set()
        best = [site for site in composites if site.kind == "block"]
        for kind in ["block"] if best else ["attention", "mlp"]:
            own = [site for site in composites if site.kind == kind]
            beside = [site for site in self.sites if site.kind == kind and site not in self.chosen]
            if own and not beside:  # of equals, which leave in order, the last
                stays = max(reversed(own), key=lambda site: self.score[site.name])
                stay |= {stays.name, *(site.name for site in self.inside[stays.layer] if kind == "block")}
        return [(BLOCK if s.kind == "block" else SUBLAYER, s) for s in composites if s.name not in stay]

    def rescored(self, scores: Scores) -> Grain:
        """With other scores of units, to the same effect on what may leave."""
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
        return sum(prices) - stays + sum(self.steps[site.name][-1] * self.budget.price(site) for site in inner)

    @property
    def cheapest(self) -> int:
        """What leaves with the cheapest item."""
        units = [step_units(site, self.multiple) * self.budget.price(site) for site in self.fine]
        wholes = [self.budget.price(s) * (s.units if tier == SUBLAYER else 1) for tier, s in self.composites]
        return min([*units, *wholes], default=1)

    def nothing(self) -> Gone:
        return Gone({site.name: 0 for site in self.sites if site.kind != "block"})

    def cost(self, item: Item, gone: Gone) -> int:
        """What leaves with a composite, as the budget counts: what it still holds."""
        tier, site = item
        if tier == SUBLAYER:
            return (site.units - gone.units[site.name]) * self.budget.price(site)
        before = sum(gone.units[inner.name] * self.budget.price(inner) for inner in self.inside[site.layer])
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
        """Masks [U] of units that stay (sites without one stay whole), and the layers whose blocks leave."""
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


def within_reach(
    sites: Sequence[Site],
    budget: Budget,
    granularity: Granularity,
    min_units: int,
    multiple: int,
    layers: Collection[int] | None = None,
) -> None:
    """Raises ConfigError, naming the largest ratio, where all that may leave is less than the budget."""
    equal = {site.name: torch.zeros(site.units) for site in sites}
    require(budget, Grain(equal, sites, budget, granularity, min_units, multiple, layers).most)

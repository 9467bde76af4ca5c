"""The same share from every sublayer, to the nearest unit; on request the same widths in every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch

from pruneexp.search.budgeted import all_but_lowest, removable
from pruneexp.search.common import (
    PARAMS_EPSILON,
    UNITS_EPSILON,
    by_layer,
    in_order,
    layer_budgets,
    nearest,
    planned,
    prunable,
    raw,
    require,
)
from pruneexp.search.granularity import (
    UNITS,
    Granularity,
    check_multiple,
    check_settings,
    check_units_alone,
    chosen_sites,
    complete,
    removal_steps,
    step_units,
)
from pruneexp.types import QUERY_HEADS, Budget, ConfigError, Cost, Oracle, Plan, Scores, Site, require_within

COARSE = 0.25  # of their share: how far from it the units that leave may be without a warning


@dataclass(frozen=True)
class Uniform:
    """Every site loses the same share of its units, lowest scores first; each layer meets its part of the budget.

    Within a layer the dearer sites (heads) lose the whole units in share * U, as `remainder` rounds them, the cheapest
    (FFN channels) as many as come nearest to the layer's budget; what rounding leaves over goes into the next layer's.
    The whole is so met to half the cost of the cheapest unit, ties removing more. Only sites of a kind in `granularity`
    lose units; each keeps `min_units`, and FFN widths that shrink become multiples of `multiple` (the unit is then so
    many channels). First and last layers, `protect_first` and `protect_last` as shares of the depth (to the nearest
    layer), keep everything, and the others lose so much more that the whole budget is met.

    `alike`: every layer keeps as many heads, and as many channels (or experts) as every other, so that a config without
    a value for each layer holds the model. A unit then leaves all layers at once, and the budget is met to half the
    cost of the cheapest in all of them together.

    `remainder`: what becomes of the part of a dear unit that the share comes to (0.6 of one KV group of three). down:
    the unit stays, unless the share is short of it by less than a row of a key; nearest: each layer rounds for itself,
    so that all of them may lose a third of their heads for a fifth; carried: it goes on to the next layer, and as many
    heads leave as the share says, from some layers. The cheapest units make up for it in every layer. The papers say
    nothing of it: a fifth of their models' 32 heads is 6 either way. With three KV groups, `nearest` left nine times
    the perplexity of `down`. dropped: nothing makes up for it. Of a share p, a site of U units of w rows (1 of
    channels) then loses ceil(p U w) // w units, as LLM-Pruner's released code does (commit 128a07d), whose p is the
    share of the layers that it prunes: with sparsity.of=prunable, the ratio over the part that is not protected.
    """

    min_units: int
    granularity: Granularity
    protect_first: float
    protect_last: float
    multiple: int
    alike: bool
    remainder: Literal["nearest", "carried", "down", "dropped"]

    def __post_init__(self) -> None:
        check_settings(self)
        check_units_alone(self.granularity, "a whole sublayer or layer has no share to lose")
        require_within(self, "[0, 1)", "protect_first", "protect_last", what="a share of the layers,")
        if self.protect_first + self.protect_last >= 1:
            raise ConfigError(
                f"protect_last={self.protect_last!r}: expected less than {1 - self.protect_first:g}, "
                "what protect_first leaves"
            )
        if self.alike and (self.protect_first or self.protect_last):
            raise ConfigError(
                f"alike={self.alike!r}: expected false with protect_first={self.protect_first!r} and protect_last="
                f"{self.protect_last!r}, which leave some layers wider than others"
            )
        if self.alike and self.remainder == "carried":
            raise ConfigError(
                f"remainder={self.remainder!r}: expected nearest or down with alike=true; what is carried leaves some "
                "layers with fewer heads than others"
            )

    @property
    def local(self) -> bool:
        """A protected layer's share goes to all others, and layers that are alike are decided together: then no layer
        can be decided alone."""
        return not (self.protect_first or self.protect_last or self.alike)

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        values, counts = raw(scores, sites), self._all_counts(sites, budget)
        keep = {name: all_but_lowest(values[name], count) for name, count in counts.items()}
        return planned(keep, sites, budget)

    def _all_counts(self, sites: Sequence[Site], budget: Budget) -> dict[str, int]:
        """How many units leave each site that may lose any. Raises ConfigError where that is too little."""
        free = self._unprotected(sites)
        chosen = chosen_sites(free, self.granularity, budget)
        check_multiple(sites, self.granularity, self.multiple)
        if chosen and complete(sites, budget):
            require(budget, removable(chosen, self.min_units, budget, multiple=self.multiple))
        if self.alike:
            return self._alike_counts(sites, chosen, budget)
        if self.remainder == "dropped":
            return self._dropped_counts(chosen, budget)
        counts, over = {}, 0.0
        for layer, share in layer_budgets(budget, free).items():
            share = replace(share, added=share.added + over)
            own = [site for site in chosen if site.layer == layer]
            own_counts, over = self._counts(own, share) if own else ({}, share.remove)
            counts.update(own_counts)
        return counts

    def _alike_counts(self, sites: Sequence[Site], chosen: list[Site], budget: Budget) -> dict[str, int]:
        """The counts of one layer that stands for all, whose units cost what one in every layer costs together."""
        check_every_layer(sites, self.alike)
        pairs = [(stand_in(group), site) for group in together(chosen) for site in group]
        wider = sum((site.units - one.units) * budget.price(site) for one, site in pairs)
        stand_ins = list({one.name: one for one, _ in pairs}.values())
        if self.remainder == "dropped":
            counts = self._dropped_counts(stand_ins, budget)
        else:
            counts, _ = self._counts(stand_ins, replace(budget, added=budget.added - wider))
        return {site.name: site.units - one.units + counts[one.name] for one, site in pairs}

    def _unprotected(self, sites: Sequence[Site]) -> list[Site]:
        layers = list(by_layer(sites))
        first, last = nearest(self.protect_first * len(layers)), nearest(self.protect_last * len(layers))
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
                remove(cheapest, nearest(target / least))

        alike = 0  # as cheap as the cheapest: a mixture's experts, which share what rounding leaves over
        for site in dearer:
            size = step_units(site, self.multiple)
            wanted = (share * site.units + -site.units % size) / size
            if price[site.name] > least:
                remove(site, self._rounded(wanted, site))
            else:
                remove(site, _carried(wanted, alike))
                alike += 1
        fill()
        for site in dearer:  # where the cheapest have run out, or the dearer took too much
            if abs(target) > least / 2 + PARAMS_EPSILON:
                before, missing = dict(taken), target
                remove(site, math.ceil(abs(target) / price[site.name]) * (1 if target > 0 else -1))
                fill()
                if abs(target) > abs(missing):  # there are too few of the cheapest to make up for it
                    taken, target = before, missing
        return {name: steps[name][count] for name, count in taken.items()}, target

    def _dropped_counts(self, sites: Sequence[Site], budget: Budget) -> dict[str, int]:
        """The whole units in each site's share; nothing makes up for what the budget then lacks."""
        share, counts = budget.ratio * budget.total / max(1, prunable(sites, budget)), {}
        for site in sites:
            rows = max(1, site.width // site.group)  # of a key or value
            wanted = math.ceil(share * site.units * rows - UNITS_EPSILON) // rows
            counts[site.name] = max(n for n in removal_steps(site, self.min_units, self.multiple) if n <= wanted)
        return counts

    def _rounded(self, steps: float, site: Site) -> int:
        """Whole steps of a dear unit."""
        if self.remainder == "nearest":
            return nearest(steps)
        if self.remainder == "carried":
            return _carried(steps, site.layer)
        if site.kind != "attention":
            return math.floor(steps + UNITS_EPSILON)
        rows = max(1, site.width // site.group)  # of a key or value
        return math.ceil(steps * rows - UNITS_EPSILON) // rows

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        self._all_counts(sites, budget)

    def warning(self, sites: Sequence[Site], budget: Budget) -> str | None:
        """For units so large that rounding takes many more of them, or many fewer, than their share."""
        rounds = self.remainder in ("nearest", "down")
        said = self.too_coarse(self._all_counts(sites, budget), sites, budget) if rounds else None
        carries = said is not None and self.remainder == "down" and not self.alike
        return f"{said}; search.remainder=carried takes as many, from some layers" if carries else said

    def too_coarse(
        self, counts: Mapping[str, int], sites: Sequence[Site], budget: Budget, leave: str = "leave"
    ) -> str | None:
        """What to say where these numbers of units are far from their share; None where they are not."""
        able = sorted((site for site in sites if site.name in counts), key=lambda site: -budget.price(site))
        for kind in list(dict.fromkeys(site.kind for site in able))[:-1]:  # the cheapest make up for the others
            own = [site for site in able if site.kind == kind]
            units, gone = sum(site.units for site in own), sum(counts[site.name] for site in own)
            wanted = budget.remove / prunable(able, budget) * units
            if abs(gone - wanted) >= max(1.0, COARSE * wanted):
                down = self.remainder == "down"
                rest = "other units make up for it" if down else "search.remainder=down leaves the rest to other units"
                return (
                    f"search.remainder={self.remainder}: {gone / units:.1%} of the {UNITS[kind].replace('_', ' ')} "
                    f"{leave} for a share of {wanted / units:.1%}, of which a layer has {own[0].units}; {rest}"
                )
        return None


def _carried(steps: float, before: int) -> int:
    """Whole steps: those of all sites up to this one, less those of the sites before, as if all were like it; so no
    site need know what others took."""
    return nearest(steps * (before + 1)) - nearest(steps * before)


def together(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites that are to be alike: all attention sublayers, all FFNs, all experts."""
    groups: dict[tuple[str, bool], list[Site]] = {}
    for site in in_order(sites):
        groups.setdefault((site.kind, site.expert is None), []).append(site)
    return list(groups.values())


def stand_in(sites: Sequence[Site]) -> Site:
    """One site for all of them: as wide as the narrowest, a unit costing what one in each of them costs together."""
    cost = Cost(**{field.name: sum(getattr(site.cost, field.name) for site in sites) for field in fields(Cost)})
    return replace(sites[0], units=min(site.units for site in sites), cost=cost)


def check_every_layer(sites: Sequence[Site], alike: bool) -> None:
    """Raises ConfigError where a layer has lost a whole sublayer, and so cannot be like the others."""
    for layer, own in by_layer(sites).items():
        if len({site.kind in ("attention", QUERY_HEADS) for site in own}) < 2:
            raise ConfigError(
                f"search.alike={alike!r}: expected attention and an FFN in every layer; layer {layer} has lost one"
            )

"""Heads and FFN channels in one ranking inside each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from pruneexp.search.budgeted import Global, removable
from pruneexp.search.common import completed, layer_budgets, removed, require
from pruneexp.search.granularity import Granularity, check_units_alone, chosen_sites
from pruneexp.types import Budget, Oracle, Plan, Scores, Site


@dataclass(frozen=True)
class Layerwise:
    """Every layer loses the same share; inside a layer, heads and channels are ranked together, lowest first.

    `Global` for one layer at a time, `normalise` included (none: scores on one scale, as LLM-BIP's bounds of what a
    layer's output changes by are; per_parameter: the same, by what a unit costs). What a layer leaves over or takes
    too much goes into the next layer's budget, so that the whole is met to half the cost of the cheapest unit.
    """

    local: ClassVar[bool] = True

    min_units: int
    granularity: Granularity
    normalise: Literal["none", "zscore", "mean", "per_parameter"]

    def __post_init__(self) -> None:
        _ = self._inside  # raises ConfigError for settings that cannot be
        check_units_alone(self.granularity, "a layer has no second sublayer")

    @property
    def _inside(self) -> Global:
        return Global(self.min_units, self.granularity, self.normalise, 1)

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        chosen = chosen_sites(sites, self.granularity, budget)
        self.check(sites, budget)
        plan, over = Plan({}), 0.0
        for layer, share in layer_budgets(budget, sites).items():
            own = [site for site in chosen if site.layer == layer]
            share = replace(share, added=share.added + over)
            over = share.remove
            if own:
                most = removable(own, self.min_units, budget)
                require(share, most + min(budget.price(site) for site in own))  # rounding may be carried on
                within = replace(share, added=share.added + min(0.0, most - share.remove))
                part = self._inside(scores, own, within, oracle, rng)
                plan = plan.merged(part)
                over -= removed(plan, own, budget)
        return completed(plan, sites, budget)

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        if budget.layers is None:
            require(budget, removable(chosen_sites(sites, self.granularity, budget), self.min_units, budget))

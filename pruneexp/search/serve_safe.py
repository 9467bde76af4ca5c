"""Structures that servers take: as many heads in every layer, FFN widths free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from pruneexp.search.budgeted import Global, removable
from pruneexp.search.common import UNITS_EPSILON, checked, completed, prunable, require
from pruneexp.search.granularity import Granularity, check_multiple, check_settings, chosen_sites, step_units
from pruneexp.search.removable import unit_order
from pruneexp.types import Budget, ConfigError, Oracle, Plan, Scores, Site


@dataclass(frozen=True)
class ServeSafe:
    """Every layer keeps the same number of heads, its best; FFN channels leave by one ranking over all layers.

    The number of heads comes nearest to their share of the budget, of those for which FFN channels can make up the
    rest; with `remainder` down, it takes no more than that share where it need not (of a share of 0.6 of a head,
    nothing). `Global` over the channels alone then meets the budget (`normalise`, `multiple` as there). Heads alone
    come nearest to the budget. At least one head stays in every layer, and `min_units` of every site. `granularity`:
    heads, channels or both.
    """

    min_units: int
    granularity: Granularity
    normalise: Literal["none", "zscore", "mean", "per_parameter"]
    multiple: int
    remainder: Literal["down", "nearest"]

    def __post_init__(self) -> None:
        check_settings(self)
        if not set(self.granularity) <= {"heads", "channels", "query_heads"}:
            raise ConfigError(
                f"granularity={self.granularity!r}: expected heads or query_heads, channels or both; "
                "a layer without a whole sublayer is not alike the others"
            )

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        heads, channels, kept = self._structure(sites, budget)
        checked(scores, [*heads, *channels])
        keep = {}
        for site in heads:
            gone = unit_order(scores[site.name], site.units)[: max(0, site.units - kept)]
            keep[site.name] = torch.ones(site.units, dtype=torch.bool).index_fill(0, gone, False)
        plan = Plan.from_masks(heads, keep)
        if channels:
            most = removable(channels, self.min_units, budget, multiple=self.multiple)
            rest = min(max(0.0, budget.remove - _leaving(heads, kept, budget)), most)
            within = replace(budget, added=budget.added + rest - budget.remove)
            ranking = Global(self.min_units, ["channels"], self.normalise, self.multiple)
            plan = plan.merged(ranking(scores, channels, within, oracle, rng))
        return completed(plan, sites, budget)

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        self._structure(sites, budget)

    def _structure(self, sites: Sequence[Site], budget: Budget) -> tuple[list[Site], list[Site], int]:
        """Attention sites, FFN sites, and how many heads each of the former keeps. Raises ConfigError where all that
        may leave is less than the budget."""
        check_multiple(sites, self.granularity, self.multiple)
        chosen = chosen_sites(sites, self.granularity, budget)
        heads = [site for site in chosen if site.kind != "mlp"]
        channels = [site for site in chosen if site.kind == "mlp"]
        most = max((site.units for site in heads), default=0)
        least = min(most, max(1, self.min_units))
        free = removable(channels, self.min_units, budget, multiple=self.multiple)
        require(budget, _leaving(heads, least, budget) + free)
        slack = max((step_units(s, self.multiple) * budget.price(s) for s in channels), default=0) / 2
        share = budget.remove * prunable(heads, budget) / max(1, prunable(chosen, budget))

        def misfit(kept: int) -> tuple[float, bool, float, int]:
            leaving = _leaving(heads, kept, budget)
            rest = budget.remove - leaving
            more = self.remainder == "down" and leaving > share + UNITS_EPSILON * budget.total
            return max(0.0, -slack - rest, rest - free - slack), more, abs(leaving - share), kept

        return heads, channels, min(range(least, most + 1), key=misfit)


def _leaving(heads: Sequence[Site], kept: int, budget: Budget) -> int:
    """What leaves where every attention sublayer keeps so many heads."""
    return sum(max(0, site.units - kept) * budget.price(site) for site in heads)

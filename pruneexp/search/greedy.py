"""Unit by unit, each time the one that the loss misses least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pruneexp.search.budgeted import Granularity, check_settings, chosen_sites, least_units, removable
from pruneexp.search.common import in_order, planned, raw, require
from pruneexp.types import Budget, Candidate, ConfigError, Oracle, Plan, RunError, Scores, Site

Unit = tuple[Site, int]


@dataclass(frozen=True)
class Greedy:
    """SLEB's search (Song et al., ICML 2024): in every round the unit leaves without which the calibration loss is
    lowest, given those that have left; until no unit would bring what is removed nearer to the budget (ties remove).

    first=scores: the first unit leaves by the scores (with criterion=loss_drop they are that round's losses); probes:
    by losses, as all others. `shortlist`: how many of the lowest-scored units a round probes, null: all. Sites in the
    first `keep_first` and last `keep_last` layers stay whole, the others keep `min_units` (blocks: one of all).
    Candidates without a finite loss are passed over; ties in the loss go to the first in the order of the layers.
    """

    local: ClassVar[bool] = False
    probes: ClassVar[bool] = True

    min_units: int
    granularity: Granularity
    keep_first: int
    keep_last: int
    shortlist: int | None
    first: Literal["scores", "probes"]

    def __post_init__(self) -> None:
        check_settings(self.min_units, self.granularity)
        for name in ("keep_first", "keep_last"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected an integer >= 0, layers that stay whole")
        if self.shortlist is not None and self.shortlist < 1:
            raise ConfigError(f"shortlist={self.shortlist!r}: expected an integer >= 1, or null for all units")

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        if oracle is None:
            raise RunError("the greedy search measures losses: it needs a model in memory and calibration windows")
        values, chosen = raw(scores, sites), self._chosen(sites, budget)
        keep = {site.name: torch.ones(site.units, dtype=torch.bool) for site in chosen}
        left, by_score = budget.remove, self.first == "scores"
        while units := self._units(chosen, keep, left, budget):
            units.sort(key=lambda unit: values[unit[0].name][unit[1]].item())
            units = units[:1] if by_score else self._probed(units[: self.shortlist], keep, sites, oracle)
            (site, index), by_score = units[0], False
            keep[site.name][index] = False
            left -= budget.price(site)
        return planned(keep, sites, budget)

    def _units(self, chosen: Sequence[Site], keep: Mapping[str, Tensor], left: float, budget: Budget) -> list[Unit]:
        """The units that may leave, and whose removal brings what is removed nearer to the budget, or as near."""
        units = []
        for site in chosen:
            free = int(keep[site.name].sum()) > least_units(site, self.min_units)
            if free and 0 < budget.price(site) <= 2 * left + 1e-3:
                units.extend((site, index) for index in torch.nonzero(keep[site.name]).flatten().tolist())
        return units

    def _probed(self, units: list[Unit], keep: dict[str, Tensor], sites: Sequence[Site], oracle: Oracle) -> list[Unit]:
        """The unit without which the loss is lowest, alone in a list."""
        ordered = in_order(sites)
        units = sorted(units, key=lambda unit: (ordered.index(unit[0]), unit[1]))
        candidates = []
        for site, index in units:
            mask = keep[site.name].clone()
            mask[index] = False
            without = {**keep, site.name: mask}
            candidates.append(Candidate(Plan.from_masks([s for s in ordered if s.name in without], without)))
        losses = oracle.losses(candidates)
        losses = torch.where(losses.isfinite(), losses, torch.inf)
        if not losses.isfinite().any():
            raise RunError(f"the losses of all {len(units)} candidates are NaN or Inf")
        return [units[int(losses.argmin())]]

    def _chosen(self, sites: Sequence[Site], budget: Budget) -> list[Site]:
        """The sites that may lose units. Raises ConfigError, naming the largest ratio, where that is too little."""
        layers = sorted({site.layer for site in sites})
        inner = set(layers[self.keep_first : max(0, len(layers) - self.keep_last)])
        if not inner and budget.ratio > 0:
            raise ConfigError(
                f"search.keep_first={self.keep_first!r}: expected less, with search.keep_last={self.keep_last!r} "
                f"all {len(layers)} layers stay whole"
            )
        chosen = [site for site in chosen_sites(sites, self.granularity, budget) if site.layer in inner]
        require(budget, removable(chosen, self.min_units, budget, all_blocks=len(inner) == len(layers)))
        return chosen

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        self._chosen(sites, budget)

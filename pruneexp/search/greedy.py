"""Unit by unit, each time the one that the loss misses least."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pruneexp.search.common import PARAMS_EPSILON, require
from pruneexp.search.granularity import KIND, UNITS, Granularity, check_settings, least_units, step_units
from pruneexp.search.removable import BLOCK, SUBLAYER, UNIT, Gone, Removable, losses_in_order, unit_order, within_reach
from pruneexp.types import (
    Budget,
    Candidate,
    ConfigError,
    Oracle,
    Plan,
    RunError,
    Scores,
    Site,
    require_least,
    unit_scores,
)

logger = logging.getLogger("pruneexp")

Choice = tuple[int, Site, tuple[int, ...]]  # units, a whole sublayer or a layer; which units leave with it
Keep = dict[str, Tensor]  # site -> mask [U] of units that are left


@dataclass(frozen=True)
class Greedy:
    """SLEB's search (Song et al., ICML 2024): in every round the unit leaves without which the calibration loss is
    lowest, given those that have left; until no unit would bring what is removed nearer to the budget (ties remove).
    With granularity=[attention, ffn] it is BlockPruner's (Zhong et al., 2024).

    first=scores: the first unit leaves by the scores (with criterion=loss_drop they are that round's losses); probes:
    by losses, as all others. `shortlist`: how many of the lowest-scored units a round probes, null: all. Sites in the
    first `keep_first` and last `keep_last` layers stay whole, the others keep `min_units` (layers: one of all).
    Losses that are not finite are skipped and counted; ties in the loss go to the first in the order of the layers.

    Whole sublayers and layers are units like others (`Removable` has their scores). normalise=per_parameter: by what
    the loss rises by over what leaves, for units that differ in size, and scores likewise. Of an FFN whose widths are
    to be multiples of `multiple`, the channels of lowest score are probed together.
    """

    probes: ClassVar[bool] = True

    min_units: int
    granularity: Granularity
    keep_first: int
    keep_last: int
    shortlist: int | None
    first: Literal["scores", "probes"]
    normalise: Literal["none", "per_parameter"]
    multiple: int

    def __post_init__(self) -> None:
        check_settings(self)
        require_least(self, 0, "keep_first", "keep_last", besides=", layers that stay whole")
        require_least(self, 1, "shortlist", besides=", or null for all units")

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        if oracle is None:
            raise RunError("the greedy search measures losses: it needs a model in memory and calibration windows")
        inner = self._inner(sites, budget)
        removable = Removable(self, scores, sites, budget, inner)
        require(budget, removable.most)
        rounds, by_score = _Rounds(self, removable, oracle), self.first == "scores"
        while choices := rounds.choices():
            choices = sorted(choices, key=rounds.score)
            rounds.take(choices[0] if by_score else rounds.probed(choices[: self.shortlist]))
            by_score = False
        if rounds.lost:
            logger.warning("search: %d of %d losses were not finite and were skipped", rounds.lost, rounds.judged)
        return removable.plan(rounds.keep, rounds.out)

    def _inner(self, sites: Sequence[Site], budget: Budget) -> set[int]:
        """Layers that may lose anything."""
        layers = sorted({site.layer for site in sites})
        inner = set(layers[self.keep_first : max(0, len(layers) - self.keep_last)])
        if not inner and budget.ratio > 0:
            raise ConfigError(
                f"search.keep_first={self.keep_first!r}: expected less, with search.keep_last={self.keep_last!r} "
                f"all {len(layers)} layers stay whole"
            )
        return inner

    def spends(self, sites: Sequence[Site], budget: Budget, batches: int) -> float:
        """Plain passes over the calibration windows, about: in every round all that may still leave, or the shortlist
        of it, each from its own layer on; as many rounds as units of mean size fill the budget."""
        inner, layers = self._inner(sites, budget), 1 + max(site.layer for site in sites)
        pieces = []  # how many there are, what one costs, and the share of the layers that a probe of it runs by itself
        for name in self.granularity:
            for site in (site for site in sites if site.kind == KIND[name] and site.layer in inner):
                size = step_units(site, self.multiple, name in UNITS.values())
                pieces.append((site.units // size, size * budget.price(site), (layers - site.layer) / layers))
        count = sum(n for n, _, _ in pieces)
        mean, depth = (sum(piece[0] * piece[at] for piece in pieces) / max(1, count) for at in (1, 2))
        rounds = min(count, round(budget.remove / mean)) if mean else 0
        probed = range(1 if self.first == "scores" else 0, rounds)
        return sum(1 + depth * min(self.shortlist or count, count - gone) for gone in probed)

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        within_reach(self, sites, budget, self._inner(sites, budget))


class _Rounds:
    """One search under way."""

    def __init__(self, method: Greedy, removable: Removable, oracle: Oracle):
        self.method, self.removable, self.oracle = method, removable, oracle
        self.keep = {s.name: torch.ones(s.units, dtype=torch.bool) for s in removable.chosen if s.kind != "block"}
        self.out: set[int] = set()
        self.left = removable.budget.remove
        self.judged = self.lost = 0  # losses, and those that are NaN or Inf
        self.score_U = {s.name: unit_scores(removable.scores[s.name]).detach().cpu().double() for s in removable.fine}
        self.losses_U = {site.name: _by_unit(removable, site) for site in removable.fine}
        self.place = {site.name: place for place, site in enumerate(removable.sites)}

    def choices(self) -> list[Choice]:
        """What may leave next and takes what is removed no farther from the budget."""
        possible: list[Choice] = []
        for site in self.removable.fine:
            kept = torch.nonzero(self.keep[site.name]).flatten()
            size = self._step(site, len(kept))
            if site.layer in self.out or len(kept) - size < least_units(site, self.method.min_units):
                continue
            lowest = kept[self.score_U[site.name][kept].sort(stable=True).indices[:size]].tolist()
            units = [(unit,) for unit in kept.tolist()] if size == 1 == self._multiple(site) else [tuple(lowest)]
            possible.extend((UNIT, site, each) for each in units if each)
        possible.extend((tier, site, ()) for tier, site in self.removable.composites if site.layer not in self.out)
        return [choice for choice in possible if 0 < self.cost(choice) <= 2 * self.left + PARAMS_EPSILON]

    def _multiple(self, site: Site) -> int:
        return self.method.multiple if site.kind == "mlp" else 1

    def _step(self, site: Site, kept: int) -> int:
        """Units that leave next: what is more than a multiple, or one of it."""
        return kept % self._multiple(site) or self._multiple(site)

    def cost(self, choice: Choice) -> int:
        tier, site, units = choice
        if tier == UNIT:
            left, budget = site.units - int(self.keep[site.name].sum()), self.removable.budget
            return budget.taken(site, left + len(units)) - budget.taken(site, left)
        gone = {name: len(keep_U) - int(keep_U.sum()) for name, keep_U in self.keep.items()}
        return self.removable.cost((tier, site), Gone({**self.removable.nothing().units, **gone}))

    def score(self, choice: Choice) -> float:
        """Of what leaves with a choice, as the criterion has it."""
        tier, site, units = choice
        if tier == UNIT:
            score = self.score_U[site.name][list(units)].mean().item()
        else:
            inside = [site] if tier == SUBLAYER else self.removable.inside[site.layer]
            score = self.removable.score[site.name] - sum(map(self._lost, inside))
        return score / self.cost(choice) if self.method.normalise == "per_parameter" else score

    def _lost(self, site: Site) -> float:
        """The score of the site's units that have left."""
        keep_U = self.keep.get(site.name)
        if keep_U is None or keep_U.all():
            return 0.0
        return self.losses_U[site.name][~keep_U].sum().item() if keep_U.any() else self.removable.score[site.name]

    def take(self, choice: Choice) -> None:
        self.left -= self.cost(choice)
        self.keep, self.out = self._after(choice)

    def _after(self, choice: Choice) -> tuple[Keep, set[int]]:
        tier, site, units = choice
        if tier == BLOCK:
            return self.keep, self.out | {site.layer}
        mask_U = self.keep[site.name].clone()
        mask_U[list(units) if tier == UNIT else slice(None)] = False
        return {**self.keep, site.name: mask_U}, self.out

    def probed(self, choices: list[Choice]) -> Choice:
        """The choice without which the loss is lowest, or rises least over what leaves."""
        choices = sorted(choices, key=lambda choice: (self.place[choice[1].name], choice[0], choice[2]))
        structures = [self._after(choice) for choice in choices]
        weighed = self.method.normalise == "per_parameter"
        if weighed:
            structures.append((self.keep, self.out))
        losses = self.oracle.losses([Candidate(self.removable.plan(keep, out)) for keep, out in structures])
        if weighed:
            costs = torch.tensor([self.cost(choice) for choice in choices], dtype=torch.float64)
            losses = (losses[:-1] - losses[-1]) / costs
        self.judged += len(choices)
        self.lost += int((~losses.isfinite()).sum())
        losses = torch.where(losses.isfinite(), losses, torch.inf)
        if not losses.isfinite().any():
            raise RunError(f"the losses of all {len(choices)} candidates are NaN or Inf")
        return choices[int(losses.argmin())]


def _by_unit(removable: Removable, site: Site) -> Tensor:
    """What each unit adds to the loss, in the criterion's terms: float64 [U]."""
    score = removable.scores[site.name]
    losses_U = losses_in_order(score, site.units)
    return torch.empty_like(losses_U).scatter_(0, unit_order(score, site.units), losses_U)

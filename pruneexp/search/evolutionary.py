"""How many units leave each site, found by the calibration loss: sensitivities first, then evolution."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from pruneexp.search.common import require
from pruneexp.search.evolution import HEAD_SHARES, Evolution
from pruneexp.search.granularity import Granularity, check_settings, chosen_sites, is_plain
from pruneexp.search.judging import Judge
from pruneexp.search.levels import Structures
from pruneexp.search.removable import Removable, within_reach
from pruneexp.search.reordered import followed, orders_followed, reordered
from pruneexp.search.starts import AL_AM, begun_with, standardised_share
from pruneexp.types import (
    QUERY_HEADS,
    Budget,
    ConfigError,
    Criterion,
    Objective,
    Oracle,
    Plan,
    Scores,
    Site,
    require_least,
    start_name,
)

log = logging.getLogger(__name__)

_TRIAL = 3.0  # passes over the windows fitted to that a structure's compensation takes, about


@dataclass(frozen=True)
class Evolutionary:
    """Levels of least calibration loss: how many units leave each site, which ones being the criterion's order.

    A structure is judged with the out-projections of its removal paths, fitted anew, where the criterion gives any. All
    structures meet the budget to the nearest FFN channel (to `multiple` of them, of which FFN widths that shrink become
    multiples). With attention or ffn in `granularity`, a level may also be all units of such a site (`Removable` says
    what stays); layers only leave alone. For `effort` plain passes over the calibration tokens:

    1. The best of some starts: the same share everywhere, heads spared or charged more, the allotment of least summed
       removal cost, and, with whole sublayers, what `Global` removes by score over cost. Where the effort is too little
       to tell, the last of these that there is; without removal paths or whole sublayers, the same share. With
       `starts`, other criteria by name, also shares that rise or fall with depth, and what FLAP's AL-AM removes by the
       standardised scores of each (the first one's, where the effort is too little to tell); then the best order of
       units, of the criterion's and theirs, and where the effort pays for it beside two rounds of 2 the best order of
       each site by itself.
    2. `rounds` rounds of sensitivities: every site's level is moved up and down by itself; the parabolas through the
       losses, taken to add up, give the levels of least loss at the budget within that distance. The step (or half of
       it, or the one that leaves heads alone) is taken if its loss is lower; else the distance is halved.
    3. Evolution, as in EvoPress (Sieberling et al., 2024), with what is left: `offspring` copies of the best structure
       with parameters moved from some sites to others (or a whole sublayer gone, or back) are judged on a few batches,
       the best quarter on four times as many, together with the parent, which the best one replaces. At most `steps`
       generations (null: what `effort` pays for).
    4. What the search began with (1) and what it found, each compensated as the run will do it, on the windows scored
       on: the first stays where the other is no better. Left out where that would take more than half of the effort.
       With `starts`, the best start by (1) and what AL-AM removes by each criterion are tried so before the search goes
       on from the best of them, as far as a third of the effort pays for it; where it pays for two trials alone, the
       better of two starts is the plan.

    `tokens` is the share of the windows that decide which is looked at to choose between structures in 1 and 2 (less of
    them where the effort would not pay for two rounds of 2), in the last turn of 3 and in 4. A structure takes
    another's place once its loss is lower by more than the standard error of the difference over batches. Losses that
    are not finite are skipped and counted.

    `held_out`: the share of the calibration windows, drawn at random, that decides; scores, orders and the fits that
    structures are judged with are then of the others alone, so that nothing is judged by what it was fitted to. Which
    units leave is told by scores of all windows in the end, in the order that was chosen. 0: all windows do both.
    `objective`: next_token, the mean loss of the next token, or kl, the divergence KL(p || q) of the
    structure's predictions q from the dense model's p, in nats per token (where an output head costs more than all
    layers, of every second token, or of fewer).

    Raises:
        RunError: no loss is finite.
    """

    local: ClassVar[bool] = False
    probes: ClassVar[bool] = True

    min_units: int
    granularity: Granularity
    effort: float
    tokens: float
    rounds: int
    distance: float
    offspring: int
    steps: int | None
    multiple: int
    starts: Mapping[str, Criterion]
    held_out: float
    objective: Objective

    def __post_init__(self) -> None:
        check_settings(self)
        if "blocks" in self.granularity and len(self.granularity) > 1:
            raise ConfigError(
                f"granularity={self.granularity!r}: expected blocks alone, or without them; search=evolutionary "
                "chooses how much leaves each sublayer, search=global, greedy and policy_gradient mix blocks in"
            )
        require_least(self, 0, "rounds")
        require_least(self, 1, "offspring")
        require_least(self, 0, "steps", besides=", or null for what `effort` pays for")
        for name, value in (("tokens", self.tokens), ("distance", self.distance)):
            if not 0 < value <= 1:
                raise ConfigError(f"{name}={value!r}: expected a number in (0, 1]")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out!r}: expected a number in [0, 1)")
        for name, start in self.starts.items():
            if set(start.judges) - {"attention", "mlp"}:
                scored = f"{name} scores {', '.join(start.judges)}"
                raise ConfigError(f"starts={list(self.starts)!r}: {scored}; expected criteria of heads and channels")
        if not (self.effort > 0 and math.isfinite(self.effort)):
            raise ConfigError(f"effort={self.effort!r}: expected a number above 0")

    def rebalanced(self, plan: Plan, scores: Scores, sites: Sequence[Site], budget: Budget) -> Plan:
        """The plan at a budget that differs a little (biases that nothing has to pay for), without a probe."""
        orders = orders_followed(plan, scores, ("", *self.starts), sites)
        structures = followed(self.structures(scores, sites, budget), plan, scores, orders)
        return begun_with(structures.plan(structures.balanced(structures.levels(plan))), plan.budget.get("start", ""))

    def rescored(self, plan: Plan, before: Scores, after: Scores, sites: Sequence[Site], budget: Budget) -> Plan:
        """The plan by scores `after` of all windows, where those `before` were of a part: the lowest units leave in the
        order that each site follows, and levels that are AL-AM's become those of all windows."""
        began = plan.budget.get("start", "")
        if not began.startswith(AL_AM) or QUERY_HEADS in self.granularity:
            return reordered(plan, before, after, self.starts, sites)
        budget = replace(budget, added=plan.budget[f"target_{budget.counts}"] - replace(budget, added=0).remove)
        start = next((each for each in self.starts if began == AL_AM + each), "")
        names = {site.name: start_name(start, site.name) if start else site.name for site in sites}
        structures = self.structures(after, sites, budget)
        levels = standardised_share(structures, {site.name: after[names[site.name]] for site in structures.chosen})
        orders = orders_followed(plan, before, (start, "", *self.starts), sites)
        orders |= {site.name: names[site.name] for site in sites if not plan.removed(site)}
        return begun_with(followed(structures, plan, after, orders).plan(levels), began)

    def structures(self, scores: Scores, sites: Sequence[Site], budget: Budget) -> Structures:
        """Those that it may choose from."""
        chosen = chosen_sites(sites, self.granularity, budget)
        plain = is_plain(self.granularity, self.multiple)
        removable = None if plain else Removable(self, scores, sites, budget)
        return Structures(scores, sites, chosen, budget, self.min_units, removable)

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        structures = self.structures(scores, sites, budget)
        require(budget, structures.removable)
        if budget.remove <= 0:
            return structures.plan({site.name: 0 for site in structures.chosen})
        if oracle is None:
            raise ConfigError("search=evolutionary: needs the whole model in memory; expected model.stream=false")
        judge = Judge(self, oracle, rng)
        plan = Evolution(self, structures, judge).decide()
        if judge.skipped:
            log.warning("search: %d of %d losses were not finite and were skipped", judge.skipped, judge.judged)
        return plan

    def spends(self, sites: Sequence[Site], budget: Budget, batches: int) -> float:
        """Plain passes over the calibration windows, at most."""
        return self.effort

    @property
    def refits(self) -> float:
        """About those of the structures to start from, and one more for every pass: a pass judges many structures, most
        of which differ in few sites."""
        return len(HEAD_SHARES) + 1 + self.effort

    @property
    def deciding(self) -> float:
        """The share of the calibration windows that decides between structures."""
        return self.held_out or 1.0

    @property
    def trials(self) -> int:
        """How many structures are tried with compensation: none where two take more than half of the effort; else two,
        or with `starts` as many as a third of it pays for, from two to three and one for each start."""
        most = 3 + len(self.starts) if self.starts else 2
        able = math.floor(self.effort / 3 / self.trial_price)
        return max(2, min(most, able)) if 2 * self.trial_price <= self.effort / 2 else 0

    @property
    def trial_price(self) -> float:
        """Passes that one takes, about."""
        return self.tokens * (_TRIAL * (1 - self.held_out) + self.deciding)

    @property
    def tries(self) -> float:
        return self.tokens * (1 - self.held_out) if self.trials else 0.0

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        within_reach(self, sites, budget)

"""FFN channels first, then whole attention sublayers: 2SSP's two stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pruneexp.search.budgeted import removable
from pruneexp.search.common import UNITS_EPSILON, completed, nearest, prunable, require
from pruneexp.search.granularity import chosen_sites
from pruneexp.search.greedy import Greedy
from pruneexp.search.uniform import Uniform
from pruneexp.types import Budget, Candidate, Oracle, Plan, RunError, Scores, Site, require_within


@dataclass(frozen=True)
class TwoStage:
    """2SSP's search (Sandri et al., 2025; released code): the lowest-scored FFN channels leave, as many in every layer
    to one channel (`Uniform`); then, one after the other, the attention sublayers without which the calibration loss is
    lowest, the channels being gone (`Greedy`). How many of them, of the L there are (eq. 5):

        round(L s^(P_FFN / (alpha P_attention)))

    s the share to remove and P what a sublayer's units hold, as the budget counts; the FFNs make up for the rest, to
    the nearest channel. At small shares nearly all leaves the FFNs, which hold more.

    Departs: what rounding leaves over goes into the next layer, where the authors give all FFNs one width; more
    attention sublayers leave where the FFNs cannot make up for them, fewer where they alone are too much (an error
    there), and the best-scored one always stays; losses are of all calibration windows, in place of one of 2,048
    tokens. In rounds, the formula is of each round's model.
    """

    probes: ClassVar[bool] = True
    granularity: ClassVar[tuple[str, ...]] = ("channels", "attention")

    min_units: int
    alpha: float
    multiple: int

    def __post_init__(self) -> None:
        _ = self._first  # raises ConfigError for settings that cannot be
        require_within(self, "(0, inf)", "alpha")

    @property
    def _first(self) -> Uniform:
        return Uniform(self.min_units, ["channels"], 0.0, 0.0, self.multiple, False, "nearest")

    @property
    def _second(self) -> Greedy:
        return Greedy(1, ["attention"], 0, 0, None, "probes", "none", 1)

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        if oracle is None:
            raise RunError("the two-stage search measures losses: it needs a model in memory and calibration windows")
        ffns, attention = _parted(sites, budget)
        later = self._second_budget(ffns, attention, budget)
        plan = Plan({})
        if ffns:
            sooner = replace(budget, added=budget.added - later.remove)
            plan = plan.merged(self._first(scores, ffns, sooner, oracle, rng))
        if later.remove:
            plan = plan.merged(self._second(scores, attention, later, _Behind(oracle, plan), rng))
        return completed(plan, sites, budget)

    def rebalanced(self, plan: Plan, scores: Scores, sites: Sequence[Site], budget: Budget) -> Plan:
        """The plan at a budget that differs a little, without a probe: the attention sublayers stay as they are, the
        FFNs make up for the difference."""
        ffns, attention = _parted(sites, budget)
        gone = Plan({site.name: plan.sites[site.name] for site in attention if plan.removed(site)})
        left = replace(budget, added=budget.added - sum(budget.taken(site, gone.removed(site)) for site in attention))
        if not ffns or not 0 <= left.remove <= removable(ffns, self.min_units, budget, multiple=self.multiple):
            return plan  # more or fewer attention sublayers would have to leave
        return completed(gone.merged(self._first(scores, ffns, left, None, torch.Generator())), sites, budget)

    def _second_budget(self, ffns: Sequence[Site], attention: Sequence[Site], budget: Budget) -> Budget:
        """What leaves in the second stage. Raises ConfigError where both together cannot remove so much."""
        held, most = prunable(attention, budget), removable(ffns, self.min_units, budget, multiple=self.multiple)
        able = held - max((prunable([site], budget) for site in attention), default=0)
        require(budget, most + able)
        if not attention or not held or budget.remove <= 0:
            return replace(budget, ratio=0.0)
        count, each = len(attention), held / len(attention)
        layers = max(1, len({site.layer for site in ffns}))
        share = max(0.0, budget.remove / budget.total)
        wanted = round(count * share ** (prunable(ffns, budget) / layers / each / self.alpha))
        least = math.ceil((budget.remove - most) / each - UNITS_EPSILON)
        greatest = math.floor(budget.remove / each + UNITS_EPSILON)
        if not most:  # nothing makes up for the rest, so that the nearest number meets the budget best
            least = greatest = nearest(budget.remove / each)
        leave = min(max(min(wanted, greatest), least, 0), count - 1)
        return replace(budget, ratio=1.0, total=round(leave * each), added=0.0)

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        ffns, attention = _parted(sites, budget)
        later = self._second_budget(ffns, attention, budget)
        if ffns:
            self._first.check(ffns, replace(budget, added=budget.added - later.remove))

    def spends(self, sites: Sequence[Site], budget: Budget, batches: int) -> float:
        """Plain passes over the calibration windows, about: in the second stage all that is left is probed."""
        ffns, attention = _parted(sites, budget)
        later = self._second_budget(ffns, attention, budget)
        return self._second.spends(attention, later, batches) if later.remove else 0.0


def _parted(sites: Sequence[Site], budget: Budget) -> tuple[list[Site], list[Site]]:
    """FFNs and attention sublayers that hold anything of what the budget counts."""
    chosen = chosen_sites(sites, ["channels", "attention"], budget)
    return [s for s in chosen if s.kind == "mlp"], [s for s in chosen if s.kind == "attention"]


@dataclass(frozen=True)
class _Behind:
    """An oracle of structures that have lost some units already."""

    of: Oracle
    plan: Plan

    @property
    def passes(self) -> float:
        return self.of.passes

    @property
    def batches(self) -> int:
        return self.of.batches

    def losses(self, candidates: Sequence[Candidate], batch: int | None = None) -> Tensor:
        return self.of.losses([replace(each, plan=self.plan.merged(each.plan)) for each in candidates], batch)

    def trial(self, plan: Plan, share: float) -> Candidate:
        return self.of.trial(self.plan.merged(plan), share)

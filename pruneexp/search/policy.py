"""Keep-probabilities learned from losses alone: policy gradients over Bernoulli masks."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pruneexp.search.budgeted import Global
from pruneexp.search.common import PARAMS_EPSILON, completed, planned, prunable, removed, require
from pruneexp.search.gates import Gates, as_groups, projected
from pruneexp.search.granularity import KIND, UNITS, Granularity, check_settings, is_nested, is_plain, step_units
from pruneexp.search.ranking import ranked
from pruneexp.search.removable import UNIT, Removable, bundled, unit_order, within_reach
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
    require_within,
    unit_scores,
)

logger = logging.getLogger("pruneexp")

_TINY = 1e-7  # added to s and 1 - s, as the released code has it


@dataclass(frozen=True)
class PolicyGradient:
    """Bypassing back-propagation (Gao et al., ACL 2025; released code, commit 60f0d31): every unit has a probability s
    of staying, and masks m ~ Bernoulli(s) are tried on one batch of calibration windows a step.

    A step draws `samples` masks (K), runs the model under each, and moves s against
        g = 1 / (K - 1) sum_k (L_k - delta) (m_k - s) / sqrt(s (1 - s))       estimator=sqrt, the released code's
    with delta the moving average of the losses over `memory` steps (its first value: the first step's loss). The exact
    score function divides by s (1 - s): estimator=exact. The rate falls to 0 along a cosine; s is then projected onto
    what the budget lets stay, sum s cost <= budget: of heads and of channels apart (budgets=separate, the code's) or
    together (joint). At last the units of lowest s leave, the budget met to the nearest unit.

    Whole sublayers and layers have a probability too: a gate that what they hold is behind. Beside what they hold
    (granularity=[channels, ffn], say) there is one budget for all, and all probabilities are lowered alike to meet it.

    `initial`: scores, standardised within each site (of wholes, among those of a kind), through a sigmoid, and shifted
    to the keep ratio; or random, the same of normal draws. `steps` null: as many as `passes` plain passes over the
    calibration windows pay for. How far s travels goes by `rate` times steps: the paper's rate is 0.002 for 15,000
    steps; a tenth as many at that rate hardly leave the scores that they start from. The released code scores layer l
    behind the layers before it, masked by their own scores: criterion=wanda_sp_masked, with sparsity.of=prunable.
    Masks whose loss is NaN or Inf are left out of a step.
    """

    probes: ClassVar[bool] = True

    min_units: int
    granularity: Granularity
    budgets: Literal["separate", "joint"]
    initial: Literal["scores", "random"]
    estimator: Literal["sqrt", "exact"]
    samples: int
    rate: float
    memory: int
    passes: float
    steps: int | None
    multiple: int

    def __post_init__(self) -> None:
        check_settings(self)
        if is_nested(self.granularity) and self.budgets != "joint":
            raise ConfigError(
                f"budgets={self.budgets!r}: expected joint with granularity={self.granularity!r}, "
                "some of which hold others and so share a budget"
            )
        require_least(self, 2, "samples")
        require_least(self, 1, "memory")
        require_least(self, 1, "steps", besides=", or null for what `passes` pays for")
        require_within(self, "(0, inf)", "rate", "passes")

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        if oracle is None:
            raise RunError("the policy gradient measures losses: it needs a model in memory and calibration windows")
        removable = Removable(self, scores, sites, budget)
        require(budget, removable.most)
        if budget.ratio == 0:
            return planned({}, sites, budget)
        gates = Gates(removable)
        share = 1 - budget.remove / gates.kept(torch.ones(len(gates.cost), dtype=torch.float64))
        learned = gates.split(self._learned(self._started(gates, share, rng), gates, share, oracle, rng))
        if is_nested(self.granularity):
            return self._ranked(gates, learned)
        stays = {s.name: torch.tensor([2.0]).double() for s in removable.wholes}  # the best, which no gate closes
        known = {site.name: s_U for (_, site), s_U in zip(gates.items, learned, strict=True)}
        return self._planned({**scores, **stays, **known}, sites, removable.chosen, budget)

    def _started(self, gates: Gates, share: float, rng: torch.Generator) -> Tensor:
        """By the scores: units within their site, gates among those of a kind."""
        removable, parts = gates.removable, []
        spread = {
            kind: torch.tensor([removable.score[s.name] for _, s in removable.composites if s.kind == kind]).double()
            for kind in KIND.values()
        }
        for (tier, site), depth in zip(gates.items, gates.depths, strict=True):
            if tier == UNIT:
                score_U = unit_scores(removable.scores[site.name]).detach().cpu().double()
                parts.append(self._shaped(score_U, score_U, share ** (1 / depth), rng))
            else:
                own = torch.tensor([removable.score[site.name]]).double()
                parts.append(self._shaped(own, spread[site.kind], share ** (1 / depth), rng))
        return torch.cat(parts)

    def _shaped(self, score_U: Tensor, among: Tensor, share: float, rng: torch.Generator) -> Tensor:
        """Scores among others like them, through a sigmoid, to probabilities of mean `share`."""
        if self.initial == "random":
            score_U = torch.randn(len(score_U), generator=rng, dtype=torch.float64)
            among = score_U if len(score_U) == len(among) else torch.tensor([-1.0, 1.0]).double()
        spread = among.std() if len(among) > 1 else torch.zeros(())
        shaped, whole = (torch.sigmoid((each - among.mean()) / (spread + 1e-8)) for each in (score_U, among))
        return (shaped + share - whole.mean()).clamp(0, 1)

    def _learned(self, start: Tensor, gates: Gates, share: float, oracle: Oracle, rng: torch.Generator) -> Tensor:
        groups = as_groups(gates.kinds, self.budgets == "joint")
        most = share * gates.kept(torch.ones_like(gates.cost))
        s = self._projected(start, gates, groups, share, most)
        steps = self._steps(oracle.batches)
        baseline, lost = None, 0
        for step in range(steps):
            drawn = torch.rand(self.samples, len(s), generator=rng, dtype=torch.float64) < s
            candidates = [Candidate(gates.plan(mask)) for mask in drawn]
            losses = oracle.losses(candidates, batch=step % oracle.batches).double()
            finite = losses.isfinite()
            lost += int((~finite).sum())
            if not finite.any():
                continue
            mean = losses[finite].mean().item()
            baseline = mean if baseline is None else baseline
            baseline += (mean - baseline) / self.memory
            gradient = policy_gradient(s, drawn[finite], losses[finite], baseline, self.samples, self.estimator)
            rate = self.rate * (1 + math.cos(math.pi * step / steps)) / 2
            s = self._projected(s - rate * gradient, gates, groups, share, most)
        if baseline is None:
            raise RunError(f"the losses of all {lost} masks are NaN or Inf")
        if lost:
            logger.warning("search: %d of %d losses were not finite and were skipped", lost, steps * self.samples)
        return s

    def _projected(self, s: Tensor, gates: Gates, groups: Sequence[Tensor], share: float, most: float) -> Tensor:
        if is_nested(self.granularity):
            return gates.shifted(s, most)
        s = s.clone()
        for group in groups:
            s[group] = projected(s[group], gates.cost[group], share * gates.cost[group].sum().item())
        return s

    def _ranked(self, gates: Gates, learned: Sequence[Tensor]) -> Plan:
        """What has the lowest probability leaves, sublayers and layers among the units."""
        known = {(tier, site.name): s for (tier, site), s in zip(gates.items, learned, strict=True)}
        removable = gates.removable.rescored({site.name: known[UNIT, site.name] for site in gates.removable.fine})
        units = {}
        for site in removable.fine:
            s_U = known[UNIT, site.name]
            units[site.name] = bundled(s_U[unit_order(s_U, site.units)], removable.unit_steps[site.name])
        return ranked(removable, units, lambda item, gone: known[item[0], item[1].name].item())

    def _planned(self, scores: Scores, sites: Sequence[Site], chosen: list[Site], budget: Budget) -> Plan:
        """The units of lowest probability leave: of each kind its share, the cheapest kind making up for rounding."""
        together = Global(self.min_units, self.granularity, "none", self.multiple)
        if self.budgets == "joint" or len(self.granularity) == 1:
            return together(scores, sites, budget, None, torch.Generator())
        names = sorted(self.granularity, key=lambda name: -self._step_price(name, chosen, budget))
        left, plan, whole = budget.remove, Plan({}), prunable(chosen, budget)
        for name in names:
            own = [site for site in chosen if site.kind == KIND[name]]
            wanted = left if name == names[-1] else budget.remove * prunable(own, budget) / whole
            if not own:
                continue
            search = Global(self.min_units, [name], "none", self.multiple)
            most = Removable(search, scores, own, budget).most
            part = replace(budget, total=0, added=min(max(wanted, 0.0), float(most)))
            plan = plan.merged(search(scores, own, part, None, torch.Generator()))
            left -= removed(plan, own, budget)
        off = abs(left) > self._step_price(names[-1], chosen, budget) / 2 + PARAMS_EPSILON
        if off and not is_plain(self.granularity, self.multiple):
            return together(scores, sites, budget, None, torch.Generator())  # what is left of one kind is too much
        return completed(plan, sites, budget)

    def spends(self, sites: Sequence[Site], budget: Budget, batches: int) -> float:
        """Plain passes over the calibration windows, at most: masks of one step may share layers."""
        return self._steps(batches) * self.samples / batches

    def _steps(self, batches: int) -> int:
        return self.steps or max(1, round(self.passes * batches / self.samples))

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        within_reach(self, sites, budget)

    def _step_price(self, name: str, chosen: Sequence[Site], budget: Budget) -> int:
        units = name in UNITS.values()
        prices = [step_units(s, self.multiple, units) * budget.price(s) for s in chosen if s.kind == KIND[name]]
        return max(prices, default=0)


def policy_gradient(
    s: Tensor, masks: Tensor, losses: Tensor, baseline: float, samples: int, estimator: Literal["sqrt", "exact"]
) -> Tensor:
    """1 / (samples - 1) sum_k (L_k - baseline) (m_k - s) / (s (1 - s)), or its root; `masks` [k, units]."""
    spread = (s + _TINY) * (1 - s + _TINY)
    scale = spread.sqrt() if estimator == "sqrt" else spread
    return ((losses - baseline)[:, None] * (masks.double() - s)).sum(0) / scale / (samples - 1)

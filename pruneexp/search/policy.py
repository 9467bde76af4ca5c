"""Keep-probabilities learned from losses alone: policy gradients over Bernoulli masks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pruneexp.search.budgeted import KIND, Global, Granularity, check_settings, removable, within_reach
from pruneexp.search.common import in_order, planned, prunable, raw, removed
from pruneexp.types import Budget, Candidate, ConfigError, Oracle, Plan, RunError, Scores, Site

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

    `initial`: scores, standardised within each site, through a sigmoid, and shifted to the keep ratio; or random, the
    same of normal draws. `steps` null: as many as `passes` plain passes over the calibration windows pay for.
    Masks whose loss is NaN or Inf are left out of a step.
    """

    local: ClassVar[bool] = False
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

    def __post_init__(self) -> None:
        check_settings(self.min_units, self.granularity)
        for name, least in (("samples", 2), ("memory", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected an integer >= {least}")
        for name in ("rate", "passes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected a number > 0")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps={self.steps!r}: expected an integer >= 1, or null for what `passes` pays for")

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        if oracle is None:
            raise RunError("the policy gradient measures losses: it needs a model in memory and calibration windows")
        chosen = within_reach(sites, self.granularity, self.min_units, budget)
        if budget.ratio == 0:
            return planned({}, sites, budget)
        share = 1 - budget.remove / prunable(chosen, budget)
        values = raw(scores, sites)
        start = [self._started(values[site.name].double(), share, rng) for site in chosen]
        learned = dict(
            zip((s.name for s in chosen), self._learned(start, chosen, share, budget, oracle, rng), strict=True)
        )
        return self._planned({**values, **learned}, sites, chosen, budget)

    def _started(self, score_U: Tensor, share: float, rng: torch.Generator) -> Tensor:
        if self.initial == "random":
            score_U = torch.randn(len(score_U), generator=rng, dtype=torch.float64)
        spread = score_U.std() if len(score_U) > 1 else torch.zeros(())
        shaped_U = torch.sigmoid((score_U - score_U.mean()) / (spread + 1e-8))
        return (shaped_U + share - shaped_U.mean()).clamp(0, 1)

    def _learned(
        self,
        start: list[Tensor],
        chosen: list[Site],
        share: float,
        budget: Budget,
        oracle: Oracle,
        rng: torch.Generator,
    ) -> tuple[Tensor, ...]:
        sizes = [len(s_U) for s_U in start]
        groups = self._groups(chosen)
        cost = torch.cat([torch.full((site.units,), float(budget.price(site))) for site in chosen]).double()
        s = self._projected(torch.cat(start), cost, groups, share)
        steps = self.steps or max(1, round(self.passes * oracle.batches / self.samples))
        baseline, lost = None, 0
        for step in range(steps):
            masks = torch.rand(self.samples, len(s), generator=rng, dtype=torch.float64) < s
            plans = [Plan.from_masks(chosen, _by_site(mask, chosen, sizes)) for mask in masks]
            losses = oracle.losses([Candidate(plan) for plan in plans], batch=step % oracle.batches).double()
            found = losses.isfinite()
            lost += int((~found).sum())
            if not found.any():
                continue
            mean = losses[found].mean().item()
            baseline = mean if baseline is None else baseline
            baseline += (mean - baseline) / self.memory
            gradient = policy_gradient(s, masks[found], losses[found], baseline, self.samples, self.estimator)
            rate = self.rate * (1 + math.cos(math.pi * step / steps)) / 2
            s = self._projected(s - rate * gradient, cost, groups, share)
        if baseline is None:
            raise RunError(f"the losses of all {lost} masks are NaN or Inf")
        if lost:
            logger.warning("%d of %d masks gave losses that are NaN or Inf", lost, steps * self.samples)
        return s.split(sizes)

    def _groups(self, chosen: Sequence[Site]) -> list[Tensor]:
        """Masks of the units that share a budget."""
        kinds = [site.kind for site in chosen for _ in range(site.units)]
        if self.budgets == "joint":
            return [torch.ones(len(kinds), dtype=torch.bool)]
        return [torch.tensor([kind == each for kind in kinds]) for each in dict.fromkeys(kinds)]

    def _projected(self, s: Tensor, cost: Tensor, groups: Sequence[Tensor], share: float) -> Tensor:
        s = s.clone()
        for group in groups:
            s[group] = projected(s[group], cost[group], share * cost[group].sum().item())
        return s

    def _planned(self, values: Mapping[str, Tensor], sites: Sequence[Site], chosen: list[Site], budget: Budget) -> Plan:
        """The units of lowest probability leave: of each kind its share, the cheapest kind making up for rounding."""
        if self.budgets == "joint" or len(self.granularity) == 1:
            return Global(self.min_units, self.granularity, "none")(values, sites, budget, None, torch.Generator())
        names = sorted(
            self.granularity, key=lambda n: -max((budget.price(s) for s in chosen if s.kind == KIND[n]), default=0)
        )
        left, plan, whole = budget.remove, Plan({}), prunable(chosen, budget)
        for name in names:
            own = [site for site in chosen if site.kind == KIND[name]]
            wanted = left if name == names[-1] else budget.remove * prunable(own, budget) / whole
            if not own:
                continue
            wanted = min(max(wanted, 0.0), float(removable(own, self.min_units, budget)))
            part = replace(budget, total=0, added=wanted)
            plan = plan.merged(Global(self.min_units, [name], "none")(values, own, part, None, torch.Generator()))
            left -= removed(plan, own, budget)
        keep = {}
        for site in in_order(chosen):
            keep[site.name] = torch.zeros(site.units, dtype=torch.bool)
            keep[site.name][list(plan.sites[site.name].kept)] = True
        return planned(keep, sites, budget)

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        within_reach(sites, self.granularity, self.min_units, budget)


def policy_gradient(
    s: Tensor, masks: Tensor, losses: Tensor, baseline: float, samples: int, estimator: Literal["sqrt", "exact"]
) -> Tensor:
    """1 / (samples - 1) sum_k (L_k - baseline) (m_k - s) / (s (1 - s)), or its root; `masks` [k, units]."""
    spread = (s + _TINY) * (1 - s + _TINY)
    scale = spread.sqrt() if estimator == "sqrt" else spread
    return ((losses - baseline)[:, None] * (masks.double() - s)).sum(0) / scale / (samples - 1)


def projected(s: Tensor, cost: Tensor, most: float) -> Tensor:
    """The nearest point of {s in [0, 1], sum s cost <= most}: clamp(s - v cost), v >= 0 by bisection."""
    inside = s.clamp(0, 1)
    if (inside * cost).sum() <= most:
        return inside
    unit = cost / cost.max()
    low, high = 0.0, (s / unit).max().item()
    for _ in range(100):
        v = (low + high) / 2
        above = ((s - v * unit).clamp(0, 1) * cost).sum() > most
        low, high = (v, high) if above else (low, v)
    return (s - high * unit).clamp(0, 1)


def _by_site(mask: Tensor, chosen: Sequence[Site], sizes: Sequence[int]) -> dict[str, Tensor]:
    return dict(zip((site.name for site in chosen), mask.split(list(sizes)), strict=True))

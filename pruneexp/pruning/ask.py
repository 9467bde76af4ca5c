"""Asking the search: a budget that pays for the biases which compensation will add."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pruneexp.calibrate import Probe
from pruneexp.pruning.budget import biases_added, refusal, whole_budget
from pruneexp.pruning.method import Pruning
from pruneexp.search import Turns
from pruneexp.types import QUERY_HEADS, Budget, Candidate, Oracle, Plan, Score, Site, evidence_kinds, filled
from pruneexp.types.defaults import EVIDENCE

# of held-out windows: their spread is the standard error of a choice, and one alone is the least that can be asked for
LEAST_BATCHES = 16

Fit = Callable[[Pruning, Plan, Tensor], Candidate]


def plan_all_layers(work: Pruning, sites: Sequence[Site], scores: Mapping[str, Score], fit: Fit | None) -> Plan:
    """The plan of a search over all layers, which may probe the model where it is held in memory. `fit`: gives a plan
    the out-projections of the run's compensation, on some windows."""
    oracle, search = None, work.method.search
    if work.tokens_NT is not None and not work.model.streamed:
        fitting, judging = parted(work.tokens_NT, search.held_out, work.record.rng.initial_seed())
        fits = None if fit is None else partial(_fitted, work, fit, fitting)
        windows = len(work.tokens_NT)
        least, meter = LEAST_BATCHES if search.held_out else 1, work.record.meter
        oracle = Probe(work.model, judging, meter, search.effort, search.objective, windows, fits, least)
    try:
        budget = whole_budget(work.model, work.method.search, work.method.sparsity, work.ratio)
        return plan_within_budget(work, scores, sites, budget, oracle)[0]
    finally:
        if oracle is not None:
            oracle.close()


def _fitted(work: Pruning, fit: Fit, fitting_NT: Tensor, plan: Plan, share: float) -> Candidate:
    """Fitted to a share of the windows, from the first on: sources are mixed in every run of them."""
    kinds = evidence_kinds(work.method.compensator.evidence)
    least = max((filled(kind, EVIDENCE).least_windows for kind in kinds), default=1)
    return fit(work, plan, fitting_NT[: max(least, round(share * len(fitting_NT)))])


def parted(tokens_NT: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """The windows that are scored on, and those that decide between structures: a share `held_out`, drawn at random;
    all of them for both where it is 0."""
    if not held_out:
        return tokens_NT, tokens_NT
    drawn = torch.randperm(len(tokens_NT), generator=torch.Generator().manual_seed(seed))
    deciding = round(held_out * len(tokens_NT))
    return tokens_NT[drawn[deciding:].sort().values], tokens_NT[drawn[:deciding].sort().values]


def plan_within_budget(
    work: Pruning, scores: Mapping[str, Score], sites: Sequence[Site], budget: Budget, oracle: Probe | None
) -> tuple[Plan, float]:
    """The search's plan, and the parameters that it falls short of the budget (below 0: removed too many).

    New biases are paid for by removing more. Sites that stay whole get none, so that a search which spends nothing is
    asked again once it is known which sites those are; where its answers go round in circles, the nearest counts. One
    that probes is too dear to ask again: it may offer to rebalance its plan instead.

    Query heads are searched in turns; the plan names those that leave.
    """
    if QUERY_HEADS not in work.method.search.granularity:
        return _settled(work, scores, sites, budget, oracle)
    turns = Turns(work.model.sites(), scores)
    asked = None if oracle is None else turns.oracle(oracle)
    plan, short = _settled(work, turns.scored(), sites, budget, asked)
    return turns.resolved(plan), short


def _settled(
    work: Pruning, scores: Mapping[str, Score], sites: Sequence[Site], budget: Budget, oracle: Oracle | None
) -> tuple[Plan, float]:
    """As `plan_within_budget`, of turns."""
    answers: list[tuple[Plan, float]] = []
    added = budget.added_params(_biases_added(work, sites))
    if refusal(work.method.search, sites, replace(budget, added=budget.added + added)) is not None:
        added = 0  # most of these sites may have to stay whole
    for _ in range(4):
        paying = replace(budget, added=budget.added + added)
        plan = work.method.search(scores, sites, paying, oracle, work.record.rng)
        needed, short = _left_over(work, plan, sites, budget)
        settled = needed == added or work.ratio == 0
        if oracle is not None and oracle.passes:
            return (plan, short) if settled else _rebalanced(work, plan, scores, sites, budget)
        answers.append((plan, short))
        if settled:
            return answers[-1]
        added = needed
    return min(answers, key=lambda answer: abs(answer[1]))


def _rebalanced(
    work: Pruning, plan: Plan, scores: Mapping[str, Score], sites: Sequence[Site], budget: Budget
) -> tuple[Plan, float]:
    """A probing search's plan at the biases that it really adds, where the search offers that for nothing."""
    needed, short = _left_over(work, plan, sites, budget)
    rebalanced = work.method.search.rebalanced
    if rebalanced is None:
        return plan, short
    plan = rebalanced(plan, scores, sites, replace(budget, added=budget.added + needed))
    return plan, _left_over(work, plan, sites, budget)[1]


def _left_over(work: Pruning, plan: Plan, sites: Sequence[Site], budget: Budget) -> tuple[int, float]:
    """What the biases that `plan` leads to add, and what is missing for the budget and them together."""
    needed = budget.added_params(_biases_added(work, [site for site in sites if plan.removed(site)]))
    removed = sum(plan.removed(site) * budget.price(site) for site in sites)
    return needed, replace(budget, added=budget.added + needed).remove - removed


def _biases_added(work: Pruning, sites: Sequence[Site]) -> int:
    """Parameters of the biases that compensation would add, were all `sites` to lose units."""
    return biases_added(work.model, work.method.sparsity, work.method.compensator, sites) if work.ratio else 0

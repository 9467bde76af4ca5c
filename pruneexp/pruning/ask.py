"""Asking the search: a budget that pays for the biases which compensation will add."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pruneexp.calibrate import Probe
from pruneexp.pruning.answers import checked_plan
from pruneexp.pruning.budget import biases_added, loses_units, refusal, whole_budget
from pruneexp.pruning.method import Pruning
from pruneexp.search import Turns
from pruneexp.types import (
    QUERY_HEADS,
    Budget,
    Candidate,
    Oracle,
    Plan,
    Score,
    Search,
    Site,
    SitePlan,
    evidence_kinds,
    filled,
)
from pruneexp.types.defaults import EVIDENCE

# of held-out windows: their spread is the standard error of a choice, and one alone is the least that can be asked for
LEAST_BATCHES = 16
TURNS, TURNS_OF_TIMES = 4, 12  # times that a search which spends nothing is asked

Fit = Callable[[Pruning, Plan, Tensor], Candidate]


def plan_all_layers(work: Pruning, sites: Sequence[Site], scores: Mapping[str, Score], fit: Fit | None) -> Plan:
    """The plan of a search over all layers, which may probe the model where it is held in memory. `fit`: gives a plan
    the out-projections of the run's compensation, on some windows."""
    oracle, search = None, work.method.search
    if work.tokens_NT is not None and not work.model.streamed:
        fitting, judging = parted(work.tokens_NT, search.held_out, work.record.rng.initial_seed())
        oracle = Probe(
            work.model,
            judging,
            work.record.meter,
            search.objective,
            windows=len(work.tokens_NT),
            fits=None if fit is None else partial(_fitted, work, fit, fitting),
            least_batches=LEAST_BATCHES if search.held_out else 1,
        )
    try:
        budget = whole_budget(work.model, search, work.method.sparsity, work.ratio)
        if oracle is not None and search.spends is not None:
            oracle.show("search", search.spends(sites, budget, oracle.batches))
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
    in_turns = None if oracle is None else turns.oracle(oracle)
    plan, short = _settled(work, turns.scored(), sites, budget, in_turns)
    return turns.resolved(plan), short


def _settled(
    work: Pruning, scores: Mapping[str, Score], sites: Sequence[Site], budget: Budget, oracle: Oracle | None
) -> tuple[Plan, float]:
    """As `plan_within_budget`, of turns."""
    answers: list[tuple[Plan, float]] = []
    added: float = budget.added_params(_biases_added(work, sites))
    if refusal(work.method.search, sites, replace(budget, added=budget.added + added)) is not None:
        added = 0  # most of these sites may have to stay whole
    by_times, search = budget.counts == "latency", work.method.search
    if by_times:
        over = _expected(search, sites, budget)
        if refusal(search, sites, replace(budget, added=budget.added + over)) is None:
            added = over
    corrected = _Corrected(min((price for site in sites if (price := budget.price(site))), default=1) / 2)
    for _ in range(TURNS_OF_TIMES if by_times else TURNS):
        paying = replace(budget, added=budget.added + added)
        if by_times and answers and refusal(search, sites, paying) is not None:
            added = corrected.less(added)
            continue
        probed = bool(answers) and oracle is not None and oracle.passes > 0
        if probed:
            answer = search.rebalanced(answers[-1][0], scores, sites, paying)
        else:
            answer = search(scores, sites, paying, oracle, work.record.rng)
        plan = checked_plan(answer, sites)
        needed, short = _left_over(work, plan, sites, budget)
        again = any(plan.sites == known.sites for known, _ in answers)
        answers.append((plan, short))
        if needed == added or work.ratio == 0 or (by_times and abs(short) <= corrected.slack):
            return answers[-1]
        dear = oracle is not None and oracle.passes > 0
        if dear and (search.rebalanced is None or (probed and not by_times)):
            return answers[-1]
        added = corrected.more(added, needed, short, again) if by_times else needed
        if corrected.high - corrected.low < corrected.slack:
            break
    return min(answers, key=lambda answer: abs(answer[1]))


def _expected(search: Search, sites: Sequence[Site], budget: Budget) -> float:
    """By how much prices exceed the table's times at this budget, where every sublayer that may lose units loses the
    same share of them."""
    inner = [site for site in sites if loses_units(search, site) and budget.price(site)]

    def with_share(share: float) -> tuple[float, float]:
        gone = {s.name: SitePlan(s.kind, s.units, tuple(range(round((1 - share) * s.units)))) for s in inner}
        plan = Plan(gone)
        freed = sum(budget.freed(plan, site) for site in inner)
        return freed, sum(budget.taken(site, plan.removed(site)) for site in inner) - freed

    low, high, over = 0.0, 1.0, 0.0
    for _ in range(20):
        share = (low + high) / 2
        freed, over = with_share(share)
        low, high = (share, high) if freed < budget.remove else (low, share)
    if budget.remove + over > sum(budget.taken(site, site.units) for site in inner):
        return with_share(high)[1]  # the last units take more along than their prices say: no more can be asked for
    return over


class _Corrected:
    """What to ask for on top of a budget in times, which are no multiples of a unit's price. At first it is what prices
    count too much. Once one amount was too little and another too much, it is the middle of the two: times may have a
    step between them."""

    def __init__(self, slack: float):
        self.slack, self.low, self.high = slack, -math.inf, math.inf

    def more(self, added: float, needed: float, short: float, again: bool) -> float:
        """After a plan that was `short` by so much; one that was known already says nothing new."""
        if short > 0:
            self.low = max(self.low, added)
        else:
            self.high = min(self.high, added)
        return needed if self.low < needed < self.high and not again else self._between(added + short)

    def less(self, added: float) -> float:
        """After what was out of reach."""
        self.high = min(self.high, added)
        return self._between(added)

    def _between(self, otherwise: float) -> float:
        return (self.low + self.high) / 2 if math.isfinite(self.high - self.low) else otherwise


def _left_over(work: Pruning, plan: Plan, sites: Sequence[Site], budget: Budget) -> tuple[float, float]:
    """What to ask for on top of the budget: what the biases that `plan` leads to add, and what its units' prices count
    too much. Beside it, what the plan misses of the budget and the biases together."""
    biases = budget.added_params(_biases_added(work, [site for site in sites if plan.removed(site)]))
    removed = sum(budget.freed(plan, site) for site in sites)
    over = sum(budget.taken(site, plan.removed(site)) for site in sites) - removed
    return biases + over, replace(budget, added=budget.added + biases).remove - removed


def _biases_added(work: Pruning, sites: Sequence[Site]) -> int:
    """Parameters of the biases that compensation would add, were all `sites` to lose units."""
    return biases_added(work.model, work.method.sparsity, work.method.compensator, sites) if work.ratio else 0

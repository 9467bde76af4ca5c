"""What a search found, tried as the run will compensate it."""

from __future__ import annotations

import pytest
import torch

from pruneexp.calibrate import Meter, Probe
from pruneexp.compensator import Bias, LeastSquares, NoCompensation
from pruneexp.criterion import Flap
from pruneexp.model import sharing
from pruneexp.pruning.method import Method, Pruning
from pruneexp.pruning.record import Record
from pruneexp.pruning.steps import _compensate_and_shrink, _trial, prune_
from pruneexp.search import AlAm, Evolutionary
from pruneexp.search.starts import begun_with, standardised_share
from pruneexp.sparsity import OneShot
from pruneexp.surgery import shrink_
from pruneexp.types import Budget, Candidate, Plan, RemovalPath, SitePlan, start_name
from tests.cases import UNTIMED
from tests.test_evolutionary import SITES, Loss, convex, paths, plan_of, search
from tests.toy_sites import HEAD_COST, params


def weights_of(model):
    return {name: (p, p.detach().clone()) for name, p in model.module.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
@pytest.mark.parametrize(
    "compensator",
    [
        LeastSquares(1e-2, "dense", True, "channel"),
        LeastSquares("auto", "pruned", True, "channel"),
        LeastSquares(1e-2, "pruned", False, "site"),
        Bias(True),
    ],
    ids=["dense", "pruned", "once", "bias"],
)
def test_a_trial_is_the_model_that_the_run_would_make_and_changes_none(family, compensator, tiny, tokens_NT):
    model, made = tiny(family), tiny(family)
    method = Method(Flap("WIFV", False), OneShot(0.3, "decoder", 0, *UNTIMED), AlAm(), compensator)
    plan = prune_(made, tokens_NT, method, 0.3, Record()).plan
    before, record = weights_of(model), Record()
    tried = _trial(Pruning(model, tokens_NT, method, 0.3, record), plan, tokens_NT)
    for name, parameter in model.module.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    assert record.meter.forward > 0 and tried.plan == plan
    loss = float(Probe(model, tokens_NT, Meter()).losses([tried])[0])
    assert loss == pytest.approx(float(Probe(made, tokens_NT, Meter()).losses([Candidate(Plan({}))])[0]), rel=1e-9)


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
@pytest.mark.parametrize("compensator", [LeastSquares(1e-2, "pruned", True, "channel"), NoCompensation(False)])
def test_a_trial_may_lose_whole_sublayers_and_experts(family, compensator, tiny, tokens_NT):
    model, made = tiny(family), tiny(family)
    sites = {site.name: SitePlan(site.kind, site.units, tuple(range(1, site.units))) for site in model.sites()}
    gone = [site for site in model.sites() if site.layer == 1 and site.expert in (None, 0)]
    sites |= {site.name: SitePlan(site.kind, site.units, ()) for site in gone}
    sites |= {s.name: SitePlan(s.kind, s.units, tuple(range(1, s.units))) for s in model.whole_experts(0)}
    method = Method(Flap("WIFV", False), OneShot(0.3, "decoder", 0, *UNTIMED), AlAm(), compensator)
    tried = _trial(Pruning(model, tokens_NT, method, 0.3, Record()), Plan(sites), tokens_NT)
    _compensate_and_shrink(Pruning(made, tokens_NT, method, 0.3, Record()), Plan(sites), {}, "shrink")
    loss = float(Probe(model, tokens_NT, Meter()).losses([tried])[0])
    assert loss == pytest.approx(float(Probe(made, tokens_NT, Meter()).losses([Candidate(Plan({}))])[0]), rel=1e-9)


def test_a_model_that_shares_tensors_is_shrunk_alone(tiny, tokens_NT):
    model = tiny("llama")
    expected, before = model.module(tokens_NT).logits, weights_of(model)
    other = sharing(model)
    assert all(p is before[name][0] for name, p in other.module.named_parameters())
    plan = Plan.from_masks(model.sites(), {s.name: torch.arange(s.units) > 0 for s in model.sites()})
    shrink_(other, plan)
    assert other.decoder_params < model.decoder_params
    assert torch.equal(model.module(tokens_NT).logits, expected)


class Tried(Loss):
    """What compensation makes of a structure is told apart by the out-projections that come with it."""

    def __init__(self, compensated):
        super().__init__(convex)
        self.compensated = compensated

    def losses(self, candidates, batch=None):
        losses = super().losses(candidates, batch)
        tried = [self.compensated(c.plan) if c.out_projections else None for c in candidates]
        return torch.tensor([float(f) if t is None else t for f, t in zip(losses, tried, strict=True)])

    def trial(self, plan, share):
        self.passes += 0.75
        return Candidate(plan, {SITES[0].name: (torch.zeros(1), None)})


def test_what_it_began_with_stays_where_compensation_makes_it_as_good():
    method = search(effort=30.0)
    probed = plan_of(method, Loss(convex))[0]
    begun = plan_of(search(effort=30.0, rounds=0, steps=0), Loss(convex))[0]
    assert probed != begun

    def loss(better: Plan):
        return lambda plan: 0.0 if plan.sites == better.sites else 1.0

    assert plan_of(method, Tried(loss(begun)))[0].sites == begun.sites
    other = plan_of(method, Tried(lambda plan: 1.0 if plan.sites == begun.sites else 0.0))[0]
    assert other.sites != begun.sites
    same = plan_of(method, Tried(lambda plan: 1.0))[0]
    assert same.sites == begun.sites, "no better is not better"


def with_starts(names) -> dict[str, RemovalPath]:
    return paths() | {start_name(n, site): path for i, n in enumerate(names, 1) for site, path in paths(i).items()}


def test_what_a_criterion_alone_would_remove_is_tried_too():
    started = {"starts": dict.fromkeys(("one", "two"), Flap("WIFV", False)), "effort": 60.0}
    method, scores = search(**started), with_starts(("one", "two"))
    alone = alone_by(method, scores, "two", Budget(0.4, params(SITES)))
    oracle = Tried(lambda plan: 0.0 if plan.sites == alone.sites else 1.0)
    assert plan_of(method, oracle, scores=scores)[0].sites == alone.sites
    assert oracle.passes <= 60.0 + 1e-9


def test_no_structure_is_tried_twice():
    """As where the run's criterion is among the starts."""
    scores = with_starts(("one", "two", "three"))
    scores |= {start_name("one", site): scores[site] for site in paths()}
    tried: list[Plan] = []
    method = search(starts=dict.fromkeys(("one", "two", "three"), Flap("WIFV", False)), effort=60.0)
    oracle = Tried(lambda plan: 1.0)
    trial = oracle.trial
    oracle.trial = lambda plan, share: tried.append(plan) or trial(plan, share)
    plan_of(method, oracle, scores=scores)
    known = [plan.sites for plan in tried]
    assert not any(sites in known[:number] for number, sites in enumerate(known))
    budget = Budget(0.4, params(SITES))
    assert all(alone_by(method, scores, start, budget).sites in known for start in ("", "two", "three"))


def test_orders_of_single_sites_leave_enough_for_sensitivities():
    scores = with_starts(("one", "two"))
    started = {"starts": dict.fromkeys(("one", "two"), Flap("WIFV", False)), "tokens": 0.5}
    began = plan_of(search(effort=20.0, rounds=0, steps=0, **started), Loss(convex, 16), scores=scores)[0]
    searched = plan_of(search(effort=20.0, **started), Loss(convex, 16), scores=scores)[0]
    worth = [convex({site.name: plan.removed(site) for site in SITES}) for plan in (searched, began)]
    assert worth[0] < 0.7 * worth[1], "where orders came first, 0.81 of where it began was left"


@pytest.mark.parametrize("more", [-1.5, 1.5], ids=["fewer leave", "more leave"])
def test_a_plan_in_a_starts_order_stays_in_it_when_the_budget_moves(more):
    method, scores = search(starts={"one": Flap("WIFV", False)}), with_starts(("one",))
    own = {site.name: scores[start_name("one", site.name)] for site in SITES}
    structures = method.structures(scores, SITES, Budget(0.4, params(SITES)))
    plan = structures.ordered(own).plan(structures.balanced(dict.fromkeys((site.name for site in SITES), 2)))
    budget = Budget(0.4 + more * HEAD_COST / params(SITES), params(SITES))
    after = method.rebalanced(plan, scores, SITES, budget)
    assert after.sites != plan.sites
    for site in SITES:
        gone = set(range(site.units)) - set(after.sites[site.name].kept)
        assert gone == set(own[site.name].order_U[: len(gone)].tolist())


def alone_by(method, scores, start, budget) -> Plan:
    own = {site.name: scores[start_name(start, site.name) if start else site.name] for site in SITES}
    structures = method.structures(scores, SITES, budget).ordered(own)
    return structures.plan(standardised_share(structures, own))


@pytest.mark.parametrize("start", ["", "one"], ids=["criterion", "start"])
def test_what_a_criterion_alone_would_remove_becomes_what_it_would_by_all_windows(start):
    method, before = search(starts={"one": Flap("WIFV", False)}), with_starts(("one",))
    after = paths(7) | {start_name("one", site): path for site, path in paths(8).items()}
    budget = Budget(0.4, params(SITES))
    plan = begun_with(alone_by(method, before, start, budget), f"al_am of {start or 'criterion'}")
    rescored = method.rescored(plan, before, after, SITES, budget)
    expected = alone_by(method, after, start, budget)
    assert rescored.sites == expected.sites != plan.sites and rescored.budget["start"] == plan.budget["start"]


def test_levels_that_did_not_begin_with_al_am_stay_by_all_windows():
    method, before = search(starts={"one": Flap("WIFV", False)}), with_starts(("one",))
    after = before | paths(7)
    budget = Budget(0.4, params(SITES))
    plan = begun_with(alone_by(method, before, "", budget), "shares 1")
    rescored = method.rescored(plan, before, after, SITES, budget)
    for site in SITES:
        assert rescored.removed(site) == plan.removed(site)
        gone = set(range(site.units)) - set(rescored.sites[site.name].kept)
        assert gone == set(after[site.name].order_U[: len(gone)].tolist())


@pytest.mark.parametrize("effort, trials", [(3.9, 0), (4, 2), (8.9, 2), (9, 3), (15, 5), (100, 5)])
def test_more_effort_tries_more(effort, trials):
    assert search(starts=dict.fromkeys(("one", "two"), Flap("WIFV", False)), effort=effort).trials == trials
    assert search(effort=effort).trials == min(trials, 2)


def test_trials_are_paid_for_out_of_the_effort_or_left_out():
    oracle = Tried(lambda plan: 1.0)
    plan_of(search(effort=6.0), oracle)
    assert oracle.passes <= 6.0 + 1e-9
    oracle = Tried(lambda plan: pytest.fail("too dear"))
    plan_of(search(effort=1.0), oracle)


@pytest.mark.parametrize("tokens", [0.15, 0.25, 0.3, 0.35])
def test_the_trial_of_what_the_search_finds_is_left_whatever_a_trial_costs(tokens):
    started = {"starts": dict.fromkeys(("one", "two"), Flap("WIFV", False)), "held_out": 0.5, "tokens": tokens}
    oracle = Tried(lambda plan: 1.0)
    plan_of(search(effort=20.0, **started), oracle, scores=with_starts(("one", "two")))
    assert 0.6 * 20.0 < oracle.passes, "the rest of the effort is spent, too"


def test_a_search_asks_for_trials_through_the_run(tiny, tokens_NT):
    model, seen = tiny("llama"), []
    settings = {"granularity": ("heads", "channels"), "held_out": 0.5, "objective": "kl", "tokens": 0.5, "effort": 9.0}
    settings |= {"rounds": 1, "distance": 0.3, "offspring": 4, "steps": 1, "multiple": 1, "min_units": 1, "starts": {}}
    method = Method(
        Flap("WIFV", False),
        OneShot(0.3, "decoder", 0, *UNTIMED),
        Evolutionary(**settings),
        LeastSquares(1e-2, "dense", True, "channel"),
    )
    original = Probe.trial

    def noted(self, plan, share):
        seen.append((plan, share, original(self, plan, share)))
        return seen[-1][2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probe, "trial", noted)
        prune_(model, tokens_NT, method, 0.3, Record())
    assert len(seen) == 2 and seen[0][0] != seen[1][0]
    assert all(share == 0.5 and candidate.out_projections for _, share, candidate in seen)

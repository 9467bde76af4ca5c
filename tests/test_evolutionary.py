from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence

import pytest
import torch

from pruneexp.search import Evolutionary, Global
from pruneexp.search.levels import Structures, parabola
from pruneexp.types import Budget, Candidate, ConfigError, Plan, RemovalPath, RunError
from tests.cases import each
from tests.toy_sites import CHANNEL_COST, HEAD_COST, model_sites, params

BOTH = ["heads", "channels"]
SITES = model_sites(3)
NAMES = [site.name for site in SITES]
COST = {site.name: site.cost.params for site in SITES}


class Loss:
    """An oracle whose loss is a function of the levels; every batch says the same."""

    def __init__(self, loss: Callable[[dict[str, int]], float], batches: int = 8):
        self.loss, self.batches, self.passes, self.seen = loss, batches, 0.0, []

    def losses(self, candidates: Sequence[Candidate], batch: int | None = None) -> torch.Tensor:
        self.passes += len(candidates) / (self.batches if batch is not None else 1)
        levels = [{s.name: c.plan.removed(s) for s in SITES} for c in candidates]
        self.seen += levels
        return torch.tensor([self.loss(each) for each in levels], dtype=torch.float64)

    def trial(self, plan: Plan, share: float) -> Candidate:
        return Candidate(plan)


def search(**settings) -> Evolutionary:
    plain = {"min_units": 1, "granularity": BOTH, "effort": 30.0, "tokens": 0.25, "rounds": 4, "distance": 0.2}
    plain |= {"starts": {}, "held_out": 0.0, "objective": "next_token"}
    return Evolutionary(**{**plain, "offspring": 8, "steps": None, "multiple": 1, **settings})


def paths(seed: int = 0) -> dict[str, RemovalPath]:
    generator, made = torch.Generator().manual_seed(seed), {}
    for site in SITES:
        order = torch.randperm(site.units, generator=generator)
        cost = torch.rand(site.units, generator=generator, dtype=torch.float64).cumsum(0)
        made[site.name] = RemovalPath(order, cost)
    return made


def plan_of(method, oracle, ratio=0.4, scores=None, seed=0):
    budget = Budget(ratio, params(SITES))
    return method(scores or paths(), SITES, budget, oracle, torch.Generator().manual_seed(seed)), budget


def removed(plan) -> int:
    return sum(plan.removed(site) * site.cost.params for site in SITES)


WEIGHTS = {name: 1.0 + 3 * (i % 4) for i, name in enumerate(NAMES)}


def convex(levels: dict[str, int]) -> float:
    return sum(WEIGHTS[name] * (levels[name] * COST[name] / 3000) ** 2 for name in NAMES)


@pytest.mark.parametrize("ratio", [0.1, 0.33, 0.5])
def test_it_comes_near_the_best_levels_of_a_convex_loss(ratio):
    plan, budget = plan_of(search(), Loss(convex), ratio)
    levels = {site.name: plan.removed(site) for site in SITES}
    ranges = [range(4) for name in NAMES if "attn" in name]
    best = math.inf
    for heads in itertools.product(*ranges):  # heads by trying them all, channels by their closed form
        left = budget.remove - HEAD_COST * sum(heads)
        mlps = [name for name in NAMES if "mlp" in name]
        share = {name: left / WEIGHTS[name] / sum(1 / WEIGHTS[other] for other in mlps) for name in mlps}
        if all(0 <= params_left <= 39 * CHANNEL_COST for params_left in share.values()):
            ideal = dict(zip([name for name in NAMES if "attn" in name], heads, strict=True))
            ideal |= {name: value / CHANNEL_COST for name, value in share.items()}
            best = min(best, convex(ideal))
    uniform = Structures(paths(), SITES, SITES, budget, 1).balanced({name: 0 for name in NAMES})
    assert convex(levels) <= 1.1 * best
    assert convex(levels) < convex(uniform)


@each("ratio, granularity", itertools.product([0.0, 0.07, 0.25, 0.5, 0.7], [BOTH, ["channels"]]))
def test_every_structure_meets_the_budget_to_half_a_channel_and_keeps_a_minimum(ratio, granularity):
    ratio = ratio / 2 if granularity == ["channels"] else ratio
    oracle = Loss(convex)
    plan, budget = plan_of(search(granularity=granularity, min_units=2, effort=8.0), oracle, ratio)
    for levels in [*oracle.seen[-20:], {site.name: plan.removed(site) for site in SITES}]:
        assert all(levels[site.name] <= site.units - 2 for site in SITES)
    assert abs(removed(plan) - budget.remove) <= CHANNEL_COST / 2
    assert plan.budget["removed_params"] == removed(plan)


def test_heads_alone_meet_the_budget_to_half_a_head():
    plan, budget = plan_of(search(granularity=["heads"], effort=8.0), Loss(convex), 0.2)
    assert abs(removed(plan) - budget.remove) <= HEAD_COST / 2


def test_units_leave_in_the_order_of_the_path_or_by_score():
    scores = paths()
    plan, _ = plan_of(search(), Loss(convex), scores=scores)
    for site in SITES:
        gone = set(scores[site.name].order_U[: plan.removed(site)].tolist())
        assert gone == set(range(site.units)) - set(plan.sites[site.name].kept)
    plain = {site.name: torch.randn(site.units, generator=torch.Generator().manual_seed(3)) for site in SITES}
    plan, _ = plan_of(search(), Loss(convex), scores=plain)
    for site in SITES:
        gone = [u for u in range(site.units) if u not in plan.sites[site.name].kept]
        assert set(gone) == set(plain[site.name].argsort()[: len(gone)].tolist())


def test_candidates_carry_the_readers_of_their_level():
    out_projections = {n: (torch.full((2, 40 - n), float(n)), None) for n in range(1, 41)}
    scores = {**paths(), NAMES[1]: RemovalPath(torch.arange(40), torch.arange(40.0), out_projections)}
    structures = Structures(scores, SITES, SITES, Budget(0.2, params(SITES)), 1)
    candidate = structures.candidate(structures.balanced({name: 0 for name in NAMES}))
    assert set(candidate.out_projections) == {NAMES[1]}
    assert candidate.out_projections[NAMES[1]] is out_projections[candidate.plan.removed(SITES[1])]


def test_it_spends_its_effort_and_no_more():
    for effort in (0.3, 2.0, 9.0, 40.0):
        oracle = Loss(convex)
        plan_of(search(effort=effort), oracle)
        assert oracle.passes <= effort
        assert effort < 5 or oracle.passes > 0.6 * effort


def test_without_the_effort_to_probe_every_site_loses_the_same_share():
    scores = {site.name: torch.rand(site.units, generator=torch.Generator().manual_seed(1)) for site in SITES}
    oracle = Loss(convex)
    plan = search(effort=0.01)(scores, SITES, Budget(0.5, params(SITES)), oracle, torch.Generator())
    assert oracle.passes == 0
    assert all(plan.removed(site) == pytest.approx(site.units / 2, abs=0.5) for site in SITES)


@pytest.mark.slow
def test_more_effort_is_no_worse():
    losses = [
        convex({s.name: plan_of(search(effort=e), Loss(convex))[0].removed(s) for s in SITES}) for e in (1, 8, 60)
    ]
    assert losses[0] >= losses[1] >= losses[2]


def test_the_same_seed_gives_the_same_plan():
    plans = [plan_of(search(), Loss(convex), seed=seed)[0].to_json() for seed in (0, 0, 1)]
    assert plans[0] == plans[1]


def test_losses_that_are_no_numbers_are_skipped_and_counted(caplog):
    def broken(levels):
        return math.nan if levels[NAMES[1]] > 8 else convex(levels)

    plan, budget = plan_of(search(), Loss(broken), 0.2)
    assert plan.removed(SITES[1]) <= 8 and abs(removed(plan) - budget.remove) <= CHANNEL_COST / 2
    assert re.search(r"\d+ of \d+ losses were not finite", caplog.text)
    with pytest.raises(RunError, match=r"^search: none of \d+ calibration losses is finite"):
        plan_of(search(), Loss(lambda levels: math.nan))


def test_the_first_children_may_all_be_no_numbers():
    """Few children are judged at a time: those that follow may be finite."""
    oracle = Loss(lambda levels: math.nan if len(oracle.seen) <= 3 else convex(levels))
    once = search(rounds=0, tokens=0.7, offspring=4, effort=2.1, steps=1)  # too little to judge where to start
    plan, budget = plan_of(once, oracle, 0.2, seed=1)
    assert len(oracle.seen) > 4 and abs(removed(plan) - budget.remove) <= CHANNEL_COST / 2
    with pytest.raises(RunError, match=r"^search: none of \d+ calibration losses is finite"):
        plan_of(once, Loss(lambda levels: math.nan), 0.2)


def test_no_order_of_sites_matters():
    budget, plans = Budget(0.3, params(SITES)), []
    for sites in (SITES, SITES[::-1]):
        plans.append(search(effort=6.0)(paths(), sites, budget, Loss(convex), torch.Generator().manual_seed(0)))
    assert plans[0].to_json() == plans[1].to_json()


def test_without_an_oracle_it_says_what_it_needs():
    with pytest.raises(ConfigError, match="needs the whole model in memory"):
        plan_of(search(), None)


def test_a_budget_that_cannot_be_met_names_the_largest():
    with pytest.raises(ConfigError, match=r"^sparsity\.ratio=0\.99: expected at most 0\.875"):
        plan_of(search(), Loss(convex), 0.99)


@each(
    "key, value",
    [
        ("effort", 0.0),
        ("tokens", 0.0),
        ("tokens", 1.5),
        ("distance", 0.0),
        ("rounds", -1),
        ("offspring", 0),
        ("steps", -1),
        ("min_units", -1),
        ("granularity", []),
    ],
)
def test_settings_that_cannot_be(key, value):
    with pytest.raises(ConfigError, match=f"^{key}="):
        search(**{key: value})


def test_parabolas_go_through_their_points():
    curve = parabola(10, {6: 2.0, 12: 3.0})
    assert [curve(6), curve(10), curve(12)] == pytest.approx([2.0, 0.0, 3.0])
    bent = parabola(10, {6: -8.0, 12: 1.0})  # concave: straight pieces
    assert [bent(6), bent(8), bent(10), bent(11), bent(12)] == pytest.approx([-8.0, -4.0, 0.0, 0.5, 1.0])
    assert parabola(4, {6: 1.0})(5) == pytest.approx(0.5)


def test_allotment_equalises_marginal_losses():
    structures = Structures(paths(), SITES, SITES, Budget(0.3, params(SITES)), 1)
    curves = {
        site.name: (range(site.units), lambda n, site=site: WEIGHTS[site.name] * (n * COST[site.name] / 3000) ** 2)
        for site in SITES
    }
    levels = structures.allotted(curves)
    assert abs(structures.removed(levels) - structures.budget.remove) <= CHANNEL_COST / 2
    mlps = [WEIGHTS[name] * levels[name] for name in NAMES if "mlp" in name]
    assert max(mlps) - min(mlps) < 0.25 * max(mlps)


def test_it_is_refused_where_layers_are_streamed(build_from):
    with pytest.raises(
        ConfigError, match=r"^model\.stream=True: search=evolutionary measures the loss of many structures"
    ):
        build_from("recipe=best", "model.stream=true", "evaluator=[perplexity]")


def test_other_searches_do_not_ask_for_the_oracle():
    assert not getattr(Global, "probes", False) and Evolutionary.probes

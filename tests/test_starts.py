"""Searches that start from several criteria, and judge on windows held out."""

from __future__ import annotations

import pytest
import torch

from pruneexp.cache import NoCache
from pruneexp.calibrate import Meter, Probe
from pruneexp.compensator import NoCompensation
from pruneexp.criterion import Flap, Obs, WandaSp
from pruneexp.criterion.together import Together
from pruneexp.evidence import Gram
from pruneexp.evidence.solve import refitted_
from pruneexp.model import divergences
from pruneexp.model.sites import site_parts
from pruneexp.pruning.ask import parted
from pruneexp.pruning.dense_evidence import Results
from pruneexp.pruning.method import Method
from pruneexp.pruning.notes import Notes
from pruneexp.pruning.record import Record
from pruneexp.pruning.steps import prune_
from pruneexp.search import AlAm, Evolutionary, reordered
from pruneexp.search.choice import least
from pruneexp.search.levels import Structures
from pruneexp.sparsity import OneShot
from pruneexp.types import Budget, ConfigError, Cost, Plan, Site, SitePlan, own_scores, start_name, unit_scores
from tests.cases import UNTIMED
from tests.masking import masked
from tests.test_probe import candidate

OBS = Obs(0.3, 1, 4, "none", False, 8.0, "site")


def started(build_from, *overrides: str):
    return build_from("recipe=best", *overrides)


def scores_of(model, tokens_NT, criterion, meter=None):
    results = Results(NoCache(), {})
    return results.of(model, tokens_NT, criterion, None, (), meter or Meter(), Notes(None))[0]


def test_scores_of_several_criteria_are_those_of_each_alone_and_cost_one_pass(tiny, tokens_NT):
    model, meter = tiny("llama"), Meter()
    starts = {"flap": Flap("WIFV", False), "wanda_sp": WandaSp("sum", False)}
    together = scores_of(model, tokens_NT, Together(OBS, starts), meter)
    assert meter.forward == 1
    for name, alone in own_scores(together).items():
        assert torch.equal(unit_scores(alone), unit_scores(scores_of(model, tokens_NT, OBS)[name]))
    for start, criterion in starts.items():
        for name, alone in scores_of(model, tokens_NT, criterion).items():
            assert torch.equal(unit_scores(together[start_name(start, name)]), unit_scores(alone))
    assert len(together) == 3 * len(model.sites())


def test_windows_are_scored_on_or_judged_by_but_not_both():
    tokens_NT = torch.arange(20)[:, None]
    scored, judging = parted(tokens_NT, 0.3, seed=5)
    assert len(judging) == 6
    assert sorted([*scored.flatten().tolist(), *judging.flatten().tolist()]) == list(range(20))
    assert not torch.equal(judging, parted(tokens_NT, 0.3, seed=6)[1])
    assert parted(tokens_NT, 0.0, seed=5) == (tokens_NT, tokens_NT)


def test_another_order_has_its_own_units_and_fits(tiny, tokens_NT):
    model = tiny("llama")
    scores, sites = scores_of(model, tokens_NT, OBS), model.sites()
    whole = Structures(scores, sites, sites, Budget(0.3, sum(s.units * s.cost.params for s in sites)), 1)
    site = next(site for site in sites if site.kind == "mlp")
    order_U = scores[site.name].order_U.flip(0)
    other = whole.ordered({site.name: order_U.argsort().double()})  # the first of the order has the lowest score
    levels = {each.name: 0 for each in sites} | {site.name: 5}
    assert set(range(site.units)) - set(other.plan(levels).sites[site.name].kept) == set(order_U[:5].tolist())
    assert whole.plan(levels).sites[site.name] != other.plan(levels).sites[site.name]
    out_projection, _ = other.candidate(levels).out_projections[site.name]
    gram = Gram.empty(site)
    seen = _inputs(model, tokens_NT, site)
    gram = gram.update_(seen)
    weights = model.block(site.layer).weights[site.name]
    keep_C = site.keep_C(sorted(order_U[5:].tolist()))
    own = weights.out_projection, weights.out_projection_bias
    expected, _ = refitted_(*own, gram.covariance_CC, gram.mean_C, keep_C, 0.3, "site")
    assert torch.allclose(out_projection, expected, rtol=1e-4, atol=1e-6)


def _inputs(model, tokens_NT, site):
    seen = []
    module = model.layers[site.layer].get_submodule(site_parts(model.family, site)[1])
    hook = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        for batch in tokens_NT.split(model.batch_size):
            model.token_losses(batch, model.batch_size)
    finally:
        hook.remove()
    return torch.cat(seen)


def test_divergence_is_from_the_dense_models_predictions(tiny, tokens_NT):
    model = tiny("llama")
    probe = Probe(model, tokens_NT, Meter(), objective="kl", windows=2 * len(tokens_NT))
    whole, less = candidate(model, {}), candidate(model, {5: 7})
    losses = probe.losses([whole, less])
    assert losses[0] == pytest.approx(0, abs=1e-12) and losses[1] > 1e-6
    with torch.no_grad():
        dense = model.module(tokens_NT).logits
        with masked(model, less.plan):
            pruned = model.module(tokens_NT).logits
    p, q = dense.double().log_softmax(-1), pruned.double().log_softmax(-1)
    assert losses[1] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    # a pass of the dense model, one of the first candidate, and of the other the last layer
    assert probe.passes == pytest.approx((2 + 1 / len(model.layers)) / 2)
    assert float(divergences(dense[0], dense[0]).abs().max()) == 0


def test_a_lead_within_the_noise_is_none():
    noisy = torch.tensor([[1.0, 0.0, 3.0], [1.0, 2.1, 3.0], [1.0, 0.6, 3.0]], dtype=torch.float64)
    assert noisy.mean(0).argmin() == 1 and least(noisy) == 0
    clear = torch.tensor([[1.0, 0.9], [2.0, 1.9], [3.0, 2.8]], dtype=torch.float64)
    assert least(clear) == 1
    assert least(torch.tensor([[2.0, 1.0]])) == 1 and least(torch.tensor([[1.0, float("inf")]])) == 0


def test_what_left_stays_gone_when_the_budget_moves(tiny, tokens_NT, build_from):
    model = tiny("llama")
    search = started(build_from, "search.effort=1").search
    scores, sites = scores_of(model, tokens_NT, OBS), model.sites()
    total = sum(s.units * s.cost.params for s in sites)
    lowest = {s.name: torch.arange(s.units) >= (s.units // 4 if s.kind == "mlp" else 0) for s in sites}
    plan = Plan.from_masks(sites, lowest)  # no criterion's order
    gone = sum(plan.removed(s) * s.cost.params for s in sites)
    after = search.rebalanced(plan, scores, sites, Budget((gone + 300) / total, total))
    for site in sites:
        assert set(after.sites[site.name].kept) <= set(plan.sites[site.name].kept)
    assert sum(after.removed(s) * s.cost.params for s in sites) > gone


def test_starts_are_criteria_by_name(build_from):
    experiment = started(build_from, "search.starts=[flap,magnitude_coupled]")
    assert isinstance(experiment.criterion, Together)
    assert list(experiment.search.starts) == ["flap", "magnitude_coupled"]
    assert not isinstance(started(build_from, "search.starts=[]").criterion, Together)
    assert started(build_from, "search.starts=[mini_llm]", "seed=3").search.starts["mini_llm"].seed == 3


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("search.starts=[flapp]", r"^search\.starts=\['flapp'\]: 'flapp' is no criterion.*flap"),
        ("search.starts=[flap,flap]", r"^search\.starts=.*'flap' is there twice"),
        ("search.starts=[block_influence]", r"^search\.starts=\['block_influence'\]: .*expected criteria of heads"),
        ("search.starts=flap", r"^search\.starts='flap': expected a list"),
        ("search.held_out=1.0", r"^search\.held_out=1\.0: expected a number in \[0, 1\)"),
        ("search.objective=loss", r"^search\.objective='loss': expected"),
    ],
)
def test_mistakes_are_told_by_key(build_from, typed, said):
    with pytest.raises(ConfigError, match=said):
        started(build_from, typed)


def test_with_too_little_effort_the_first_start_stands_unprobed(tiny, tokens_NT, build_from):
    model = tiny("llama")
    search = started(build_from, "search.effort=0.01", "search.starts=[wanda_sp,flap]").search
    scores, sites = scores_of(model, tokens_NT, Together(OBS, search.starts)), model.sites()
    budget = Budget(0.3, sum(s.units * s.cost.params for s in sites))
    probe = Probe(model, tokens_NT, Meter(), objective="kl")
    plan = search(scores, sites, budget, probe, torch.Generator().manual_seed(0))
    own = {site.name: scores[start_name("wanda_sp", site.name)] for site in sites}
    expected = AlAm()(own, sites, budget, None, torch.Generator())
    assert probe.passes == 0 and abs(plan.budget["removed_params"] - budget.remove) < sites[0].cost.params
    for site in sites:  # the same units first, as many but for what meets the budget exactly
        gone, wanted = (set(range(site.units)) - set(each.sites[site.name].kept) for each in (plan, expected))
        assert gone <= wanted or wanted <= gone


def test_the_units_are_those_of_the_chosen_order_by_scores_of_all_windows():
    sites = [Site(name, "mlp", layer, 6, 1, Cost(1, 1, 0)) for layer, name in enumerate("abcd")]
    half = {"a": torch.tensor([5.0, 4, 3, 2, 1, 0]), "s:a": torch.arange(6.0)}
    full = {"a": torch.tensor([0.0, 4, 3, 2, 1, 5]), "s:a": torch.tensor([9.0, 1, 2, 3, 4, 5])}
    scores, of_all = ({f"{at}{name}": own[f"{at}a"] for name in "abcd" for at in ("", "s:")} for own in (half, full))
    kept = {"a": (0, 1, 2, 3), "b": (2, 3, 4, 5), "c": (0, 2, 4), "d": tuple(range(6))}
    plan = Plan({name: SitePlan("mlp", 6, units) for name, units in kept.items()})
    site_plans = reordered(plan, scores, of_all, ["s"], sites).sites
    assert site_plans["a"].kept == (1, 2, 3, 5), "the criterion's own two weakest"
    assert site_plans["b"].kept == (0, 3, 4, 5), "the start's"
    assert (site_plans["c"].kept, site_plans["d"].kept) == (kept["c"], kept["d"]), "of no order, or untouched"


def test_scores_of_a_run_that_holds_out_are_of_all_windows(tiny, tokens_NT):
    plain = {"min_units": 1, "granularity": ("heads", "channels"), "tokens": 0.5, "rounds": 1, "distance": 0.3}
    plain |= {"effort": 4.0, "held_out": 0.5, "objective": "kl", "starts": {}, "offspring": 4, "steps": 1}
    search = Evolutionary(**plain, multiple=1)
    method = Method(WandaSp("sum", False), OneShot(0.3, "decoder", 0, *UNTIMED), search, NoCompensation(False))
    pruned = prune_(tiny("llama"), tokens_NT, method, 0.3, Record())
    expected = scores_of(tiny("llama"), tokens_NT, method.criterion)
    for site in pruned.sites:
        scores_U, count = unit_scores(expected[site.name]), pruned.plan.removed(site)
        assert torch.equal(unit_scores(pruned.scores[site.name]), scores_U)
        gone = set(range(site.units)) - set(pruned.plan.sites[site.name].kept)
        assert gone == set(scores_U.sort(stable=True).indices[:count].tolist())

"""Layers that lose shares of their own: CFSP's and SlimLLM's rules, and what carries them out."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pruneexp.criterion import BlockInfluence, LossDrop
from pruneexp.search import LayerShares, Turns
from pruneexp.search.common import by_layer
from pruneexp.search.layer_shares import losing_shares
from pruneexp.search.query_heads import in_turns
from pruneexp.types import Budget, ConfigError, Cost, Plan, RunError, Site
from tests.cases import each
from tests.toy_sites import CHANNEL_COST, HEAD_COST, model_sites, params

RNG = torch.Generator()
SITES = model_sites(6, heads=4, channels=60)
FFN = SITES[1::2]
IMPORTANCE = torch.tensor([0.5, 0.1, 0.2, 0.3, 0.15, 0.4], dtype=torch.float64)
BY = {"influence": BlockInfluence("cosine")}


def search(**settings: Any) -> LayerShares:
    chosen = {"min_units": 1, "granularity": ["channels"], "importance": BY, "rule": "sigmoid", "intensity": 2.0}
    return LayerShares(**{**chosen, "pruned": 1.0, "multiple": 1, "remainder": "nearest", **settings})


def scores_of(sites: list[Site]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    own = {site.name: torch.rand(site.units, generator=draw, dtype=torch.float64) for site in sites}
    return own | {f"influence:{site.name}": IMPORTANCE[site.layer].expand(site.units) for site in sites}


def lost(plan: Plan) -> list[float]:
    return [plan.removed(site) / site.units for site in FFN]


def test_what_a_layer_keeps_is_a_sigmoid_of_its_importance() -> None:
    kept = [1 / (1 + math.exp(-2.0 * (i - IMPORTANCE.mean().item()))) for i in IMPORTANCE.tolist()]
    expected = [1 - k / (sum(kept) / 6) * 0.6 for k in kept]
    assert losing_shares(IMPORTANCE, 0.4, "sigmoid", 2.0).tolist() == pytest.approx(expected)
    plan = search()(
        scores_of(SITES), SITES, Budget(0.4 * 60 * 6 * CHANNEL_COST / params(SITES), params(SITES)), None, RNG
    )
    assert lost(plan) == pytest.approx(expected, abs=1 / 60)
    assert sum(lost(plan)) / 6 == pytest.approx(0.4, abs=1 / 720)


def test_query_heads_in_turns_make_a_layer_no_more_important() -> None:
    head = Cost(HEAD_COST // 2, HEAD_COST // 2, 0)
    sites = [replace(site, group=2, head_cost=head) if site.kind == "attention" else site for site in SITES]
    scores = scores_of(sites)
    of_heads = {f"{name}.query_heads": score.repeat_interleave(2) for name, score in scores.items() if "attn" in name}
    turns = Turns(sites, {**scores, **of_heads})
    layers = by_layer([in_turns(site) or site for site in sites])
    torch.testing.assert_close(search()._importance_L(turns.scored(), layers), IMPORTANCE)
    torch.testing.assert_close(search()._importance_L(scores, by_layer(sites)), IMPORTANCE)


def test_layers_that_would_keep_more_than_all_come_nearer_to_the_others() -> None:
    shares = losing_shares(IMPORTANCE, 0.1, "sigmoid", 5.0)
    assert shares.mean().item() == pytest.approx(0.1) and shares.argmin() == 0
    assert shares.min().item() == pytest.approx(1 - (0.9 + 0.1 / 1.05))


def test_what_a_layer_loses_is_a_softmax_over_the_least_important() -> None:
    raised = [math.exp(-3.0 * i) for i in IMPORTANCE.tolist()]
    raised[0] = raised[5] = 0.0  # the most important third stays whole
    expected = [0.2 * 6 * each / sum(raised) for each in raised]
    ratio = 0.2 * 60 * 6 * CHANNEL_COST / params(SITES)
    layer_shares = search(rule="softmax", intensity=3.0, pruned=0.67)
    plan = layer_shares(scores_of(SITES), SITES, Budget(ratio, params(SITES)), None, RNG)
    assert lost(plan) == pytest.approx(expected, abs=1 / 60) and lost(plan)[0] == lost(plan)[5] == 0


@each("rule, granularity", itertools.product(["sigmoid", "softmax"], [["channels"], ["heads", "channels"]]))
def test_the_budget_is_met_and_the_lowest_scores_leave(rule: str, granularity: list[str]) -> None:
    scores = scores_of(SITES)
    for ratio in (0.0, 0.05, 0.3, 0.5):
        method = search(rule=rule, granularity=granularity, intensity=20.0)
        plan = method(scores, SITES, Budget(ratio, params(SITES)), None, RNG)
        assert abs(plan.budget["removed_params"] - ratio * params(SITES)) <= CHANNEL_COST / 2 + 1e-6
        for site in SITES:
            lowest = scores[site.name].argsort()[: plan.removed(site)].tolist()
            assert set(range(site.units)) - set(plan.sites[site.name].kept) == set(lowest)
            assert plan.sites[site.name].kept


def test_too_coarse_a_unit_is_said() -> None:
    """Three heads in each of 12 layers, of which 10 lose anything: 0.72 of a head from each comes to one."""
    sites = model_sites(12, heads=3, channels=60)
    budget, both = Budget(0.2, params(sites)), {"granularity": ["heads", "channels"]}
    line = search(rule="softmax", intensity=10.0, pruned=0.8125, **both).warning(sites, budget)
    assert line == (
        "search.remainder=nearest: 27.8% of the heads would leave if all layers were worth the same, for a share of "
        "20.0%, of which a layer has 3; search.remainder=down leaves the rest to other units"
    )
    assert (search(**both, remainder="down").warning(sites, budget) or "").endswith("; other units make up for it")
    assert search().warning(sites, budget) is None, "channels alone"
    finer = model_sites(12, heads=30, channels=60)
    assert search(**both).warning(finer, Budget(0.2, params(finer))) is None


def test_what_cannot_be_is_refused() -> None:
    for settings, message in (
        ({"importance": {}}, r"^importance=\[\]: expected one criterion"),
        ({"intensity": -1.0}, r"^intensity=-1.0: expected a number >= 0"),
        ({"pruned": 0.0}, r"^pruned=0.0: expected a share of the layers"),
        ({"granularity": ["ffn"]}, r"^granularity=\['ffn'\]: expected heads, channels"),
    ):
        with pytest.raises(ConfigError, match=message):
            search(**settings)
    with pytest.raises(ConfigError, match=r"^sparsity.ratio=0.9: expected at most 0\.\d+"):
        search().check(SITES, Budget(0.9, params(SITES)))
    own = {name: score for name, score in scores_of(SITES).items() if ":" not in name}
    with pytest.raises(RunError, match="layer 0: the criterion influence gave no scores"):
        search()(own, SITES, Budget(0.2, params(SITES)), None, RNG)


def test_an_importance_that_the_walk_does_not_give_is_refused_before_it_starts() -> None:
    by_losses = search(importance={"loss_drop": LossDrop()})
    with pytest.raises(ConfigError, match=r"^search\.importance=\['loss_drop'\]: .*block_influence"):
        by_losses.check(SITES, Budget(0.2, 1000))

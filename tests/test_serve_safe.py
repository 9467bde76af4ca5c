"""As many heads in every layer, FFN widths free: what every server takes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pruneexp.search import Global, ServeSafe
from pruneexp.types import Budget, ConfigError, RunError, Site
from tests.cases import each
from tests.toy_sites import CHANNEL_COST, HEAD_COST, layer_sites, model_sites, params

BOTH = ["heads", "channels"]
RNG = torch.Generator()


def draws(sites: list[Site]) -> dict[str, Tensor]:
    """Random scores, a later layer's channels worth more (in no z-score, but in plain numbers)."""
    generator = torch.Generator().manual_seed(0)
    return {s.name: torch.rand(s.units, generator=generator, dtype=torch.float64) * (1 + s.layer) for s in sites}


@each("multiple, ratio", itertools.product([1, 8], [0.0, 0.05, 0.2, 0.35, 0.5, 0.7]))
def test_heads_alike_channels_free_and_the_budget_met(ratio: float, multiple: int) -> None:
    sites, steps = model_sites(4, heads=6, channels=64), CHANNEL_COST * multiple
    scores, budget = draws(sites), Budget(ratio, params(sites))
    plan = ServeSafe(1, BOTH, "none", multiple, "nearest")(scores, sites, budget, None, RNG)
    heads = {len(plan.sites[s.name].kept) for s in sites if s.kind == "attention"}
    assert len(heads) == 1
    nearest = round(ratio * 6)  # heads hold the same share of every layer as the ratio asks for
    assert heads == {6 - nearest}
    assert abs(plan.budget["removed_params"] - budget.remove) <= steps / 2 + 1
    widths = [len(plan.sites[s.name].kept) for s in sites if s.kind == "mlp"]
    assert all(width % multiple == 0 for width in widths)
    if ratio in (0.2, 0.35, 0.5):
        assert len(set(widths)) > 1 and widths == sorted(widths)
    for site in sites:
        if site.kind == "attention":
            best = scores[site.name].topk(6 - nearest).indices.sort().values.tolist()
            assert list(plan.sites[site.name].kept) == best


@each("ratio, leave", [(0.0, 0), (0.05, 0), (0.2, 1), (0.3, 1), (1 / 3, 2), (0.49, 2), (0.5, 3), (0.7, 4)])
def test_heads_are_rounded_down_and_channels_make_up_for_it(ratio: float, leave: int) -> None:
    sites = model_sites(4, heads=6, channels=64)
    budget = Budget(ratio, params(sites))
    plan = ServeSafe(1, BOTH, "none", 1, "down")(draws(sites), sites, budget, None, RNG)
    assert {len(plan.sites[s.name].kept) for s in sites if s.kind == "attention"} == {6 - leave}
    assert abs(plan.budget["removed_params"] - budget.remove) <= CHANNEL_COST / 2 + 1


def test_heads_are_rounded_up_where_channels_cannot_make_up_for_it() -> None:
    sites = model_sites(3, heads=8, channels=8)
    most = params(sites) - 3 * (HEAD_COST + CHANNEL_COST)
    budget = Budget((most - HEAD_COST) / params(sites), params(sites))
    plan = ServeSafe(1, BOTH, "zscore", 1, "down")(draws(sites), sites, budget, None, RNG)
    assert {len(plan.sites[s.name].kept) for s in sites if s.kind == "attention"} == {1}


def test_channels_are_ranked_as_global_ranks_them() -> None:
    sites = model_sites(3, heads=4, channels=40)
    scores, budget = draws(sites), Budget(0.3, params(sites))
    plan = ServeSafe(1, BOTH, "zscore", 4, "nearest")(scores, sites, budget, None, RNG)
    left = budget.remove - sum(plan.removed(s) * HEAD_COST for s in sites if s.kind == "attention")
    channels = [s for s in sites if s.kind == "mlp"]
    alone = Global(1, ["channels"], "zscore", 4)(scores, channels, Budget(left / 10**9, 10**9), None, RNG)
    assert all(plan.sites[s.name] == alone.sites[s.name] for s in channels)


def test_where_ffns_cannot_make_up_for_it_more_heads_leave() -> None:
    sites = model_sites(3, heads=8, channels=8)
    most = params(sites) - 3 * (HEAD_COST + CHANNEL_COST)
    plan = ServeSafe(1, BOTH, "zscore", 1, "nearest")(
        draws(sites), sites, Budget(most / params(sites), params(sites)), None, RNG
    )
    assert all(len(own.kept) == 1 for own in plan.sites.values())
    with pytest.raises(ConfigError, match=r"^sparsity.ratio=0.99: expected at most 0.\d+"):
        ServeSafe(1, BOTH, "zscore", 1, "nearest").check(sites, Budget(0.99, params(sites)))


def test_layers_that_lost_heads_before_are_made_alike() -> None:
    sites = [*layer_sites(0, heads=6), *layer_sites(1, heads=3), *layer_sites(2, heads=5)]
    plan = ServeSafe(1, BOTH, "zscore", 1, "nearest")(draws(sites), sites, Budget(0.35, params(sites)), None, RNG)
    kept = [len(plan.sites[s.name].kept) for s in sites if s.kind == "attention"]
    assert kept == [3, 3, 3]


def test_scores_of_heads_that_are_no_numbers_name_the_site() -> None:
    sites = model_sites(2)
    scores = draws(sites)
    scores[sites[2].name][1] = math.nan
    for granularity in (BOTH, ["heads"]):
        with pytest.raises(RunError, match=r"^model\.layers\.1\.self_attn: scores hold NaN or Inf"):
            ServeSafe(1, granularity, "zscore", 1, "nearest")(scores, sites, Budget(0.1, params(sites)), None, RNG)


def test_one_kind_alone() -> None:
    sites = model_sites(3, heads=6, channels=64)
    budget = Budget(0.2, params(sites))
    plan = ServeSafe(1, ["channels"], "zscore", 1, "nearest")(draws(sites), sites, budget, None, RNG)
    assert all(plan.removed(s) == 0 for s in sites if s.kind == "attention")
    assert abs(plan.budget["removed_params"] - budget.remove) <= CHANNEL_COST / 2 + 1
    cache = Budget(0.5, sum(s.units * s.cost.kv for s in sites), counts="kv_cache")  # which channels do not fill
    plan = ServeSafe(1, BOTH, "zscore", 1, "nearest")(draws(sites), sites, cache, None, RNG)
    assert [plan.removed(s) for s in sites] == [3, 0] * 3


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"^granularity=\['ffn'\]: expected heads or query_heads, channels or both"):
        ServeSafe(1, ["ffn"], "none", 1, "nearest")
    with pytest.raises(ConfigError, match=r"^search.multiple=256: expected at most 40"):
        ServeSafe(1, BOTH, "none", 256, "nearest").check(model_sites(2), Budget(0.2, 1000))

"""One ranking inside each layer: `Global` layer by layer, on budget as a whole."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pruneexp.cli.compose import compose
from pruneexp.search import Global, Layerwise
from pruneexp.types import Budget, ConfigError, Site
from tests.cases import each
from tests.toy_sites import CHANNEL_COST, layer_sites, model_sites, params

BOTH = ["heads", "channels"]
NORMALISES = ["none", "zscore", "mean", "per_parameter"]
RNG = torch.Generator()


def draws(sites: list[Site], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {site.name: torch.rand(site.units, generator=generator, dtype=torch.float64) for site in sites}


@each("normalise", NORMALISES)
def test_a_single_layer_is_a_global_ranking(normalise: str) -> None:
    sites = model_sites(1)
    for ratio in (0.1, 0.35, 0.8):
        budget = Budget(ratio, params(sites))
        plan = Layerwise(1, BOTH, normalise)(draws(sites), sites, budget, None, RNG)
        assert plan == Global(1, BOTH, normalise, 1)(draws(sites), sites, budget, None, RNG)


@each("normalise, ratio", itertools.product(NORMALISES, [0.0, 0.03, 0.2, 0.5, 0.77]))
def test_every_layer_loses_the_same_share_and_the_whole_meets_the_budget(ratio: float, normalise: str) -> None:
    sites = [*layer_sites(0, 4, 40), *layer_sites(1, 8, 33), *layer_sites(4, 5, 91)]
    scores, budget = draws(sites), Budget(ratio, params(sites) + 999)
    plan = Layerwise(1, BOTH, normalise)(scores, sites, budget, None, RNG)
    assert abs(plan.budget["removed_params"] - budget.remove) <= CHANNEL_COST / 2 + 1
    for layer in (0, 1, 4):
        own = [site for site in sites if site.layer == layer]
        lost = sum(plan.removed(site) * site.cost.params for site in own)
        assert abs(lost - budget.remove * params(own) / params(sites)) <= CHANNEL_COST + 1
        assert all(plan.sites[site.name].kept for site in own)


def test_heads_and_channels_are_in_one_list_but_layers_are_not() -> None:
    sites = model_sites(2)
    scores = draws(sites)
    scores[sites[0].name] += 10  # the first layer's heads are worth more than its channels, the second's less
    scores[sites[2].name] -= 10
    scores = {name: score + (100 if "layers.1" in name else 0) for name, score in scores.items()}
    plan = Layerwise(0, BOTH, "none")(scores, sites, Budget(0.3, params(sites)), None, RNG)
    assert plan.removed(sites[0]) == 0 and plan.removed(sites[1]) > 0
    assert plan.removed(sites[2]) > plan.removed(sites[0]), "whatever a layer as a whole is worth"
    lost = [sum(plan.removed(s) * s.cost.params for s in sites if s.layer == layer) for layer in (0, 1)]
    assert abs(lost[0] - lost[1]) <= 2 * CHANNEL_COST


def test_up_to_the_last_unit_that_may_leave_and_no_further() -> None:
    sites = [*layer_sites(0, 3, 11), *layer_sites(1, 7, 50)]
    with pytest.raises(ConfigError, match=r"^sparsity.ratio=0.99: expected at most 0.\d+"):
        Layerwise(1, BOTH, "none")(draws(sites), sites, Budget(0.99, params(sites)), None, RNG)
    even = model_sites(3)
    most = sum((site.units - 1) * site.cost.params for site in even)
    plan = Layerwise(1, BOTH, "none")(draws(even), even, Budget(most / params(even), params(even)), None, RNG)
    assert all(len(site.kept) == 1 for site in plan.sites.values())


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"^granularity=\['blocks'\]: expected heads, channels or both"):
        Layerwise(1, ["blocks"], "none")
    with pytest.raises(ConfigError, match=r"^min_units=-1: expected an integer >= 0"):
        Layerwise(-1, BOTH, "none")


def test_llm_bip_takes_it() -> None:
    chosen = compose(["recipe=llm_bip", "search=layerwise"]).job["choices"]
    assert (chosen["criterion"], chosen["search"]) == ("llm_bip", "layerwise")

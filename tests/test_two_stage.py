"""2SSP's search: how much each stage removes, and what."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pruneexp.search import TwoStage
from pruneexp.types import Budget, Candidate, ConfigError, RunError, Site
from tests.cases import each
from tests.toy_sites import CHANNEL_COST, HEAD_COST, model_sites, params

RNG = torch.Generator()
LAYERS, HEADS, CHANNELS = 10, 4, 40
SITES = model_sites(LAYERS, HEADS, CHANNELS)
ATTENTION, FFN = SITES[::2], SITES[1::2]


class ByLayer:
    """An oracle: attention is worth more the deeper it lies, unless the one in front of it has left. It wants to be
    asked of structures whose channels have left."""

    passes = 0.0
    batches = 1

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def losses(self, candidates: Sequence[Candidate], batch: int | None = None) -> Tensor:
        return torch.tensor([self._loss(each) for each in candidates], dtype=torch.float64)

    def _loss(self, candidate: Candidate) -> float:
        sites = candidate.plan.sites
        left = sum(len(sites[site.name].kept) for site in FFN if site.name in sites)
        assert abs(left - self.channels) <= 1
        gone = [not sites[site.name].kept for site in ATTENTION]
        return (
            sum((layer if layer == 0 or not gone[layer - 1] else 100) for layer, out in enumerate(gone) if out)
            + 0.5 * gone[0]
        )


def scores_of(sites: Sequence[Site]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    scores = {site.name: torch.rand(site.units, generator=draw, dtype=torch.float64) for site in sites}
    return scores | {ATTENTION[7].name: torch.full((HEADS,), 9.0, dtype=torch.float64)}  # the best one always stays


@each("ratio", [0.05, 0.2, 0.375, 0.5])
def test_the_formula_says_how_many_attention_sublayers_leave_and_channels_make_up_for_the_rest(ratio: float) -> None:
    scores, total = scores_of(SITES), params(SITES)
    expected = round(LAYERS * ratio ** (CHANNELS * CHANNEL_COST / (HEADS * HEAD_COST) / 1.5))
    channels = LAYERS * CHANNELS - round((ratio * total - expected * HEADS * HEAD_COST) / CHANNEL_COST)
    plan = TwoStage(1, 1.5, 1)(scores, SITES, Budget(ratio, total), ByLayer(channels), RNG)
    gone = [layer for layer, site in enumerate(ATTENTION) if not plan.sites[site.name].kept]
    assert gone == sorted([0, 2, 4, 6, 8, 9][:expected]) and all(
        len(plan.sites[site.name].kept) in (0, HEADS) for site in ATTENTION
    )
    assert abs(plan.budget["removed_params"] - ratio * total) <= CHANNEL_COST / 2
    widths = [len(plan.sites[site.name].kept) for site in FFN]
    assert max(widths) - min(widths) <= 1, "as many in every layer"
    for site in FFN:
        lowest = scores[site.name].argsort()[: plan.removed(site)].tolist()
        assert set(range(CHANNELS)) - set(plan.sites[site.name].kept) == set(lowest)


def test_at_another_budget_the_ffns_make_up_for_the_difference() -> None:
    scores, total, search = scores_of(SITES), params(SITES), TwoStage(1, 1.5, 1)
    expected = round(LAYERS * 0.375 ** (CHANNELS * CHANNEL_COST / (HEADS * HEAD_COST) / 1.5))
    channels = LAYERS * CHANNELS - round((0.375 * total - expected * HEADS * HEAD_COST) / CHANNEL_COST)
    plan = search(scores, SITES, Budget(0.375, total), ByLayer(channels), RNG)
    more = search.rebalanced(plan, scores, SITES, Budget(0.375, total, added=30 * CHANNEL_COST))
    assert [more.sites[site.name] for site in ATTENTION] == [plan.sites[site.name] for site in ATTENTION]
    assert sum(map(more.removed, FFN)) == sum(map(plan.removed, FFN)) + 30
    assert search.rebalanced(plan, scores, SITES, Budget(0.375, total, added=0.6 * total)) == plan, "out of reach"


def test_attention_makes_up_for_channels_that_have_run_out() -> None:
    total = params(SITES)
    most = LAYERS * 30 * CHANNEL_COST  # of channels, ten of which stay in every FFN
    ratio = (most + 3 * HEADS * HEAD_COST) / total  # the formula alone would have some of them, not all of these
    few = TwoStage(10, 0.2, 1)
    plan = few(scores_of(SITES), SITES, Budget(ratio, total), ByLayer(LAYERS * 10), RNG)
    assert sum(not plan.sites[site.name].kept for site in ATTENTION) == 3
    largest = (most + (LAYERS - 1) * HEADS * HEAD_COST) / total
    few.check(SITES, Budget(largest - 1e-6, total))
    with pytest.raises(ConfigError, match=r"^sparsity.ratio=0.99: expected at most 0\.\d+, all that search may remove"):
        few.check(SITES, Budget(0.99, total))


@each("ratio, leave", [(0.1, 1), (0.14, 1), (0.15, 2), (0.26, 3)])
def test_where_ffns_count_nothing_attention_meets_the_budget_to_the_nearest_sublayer(ratio: float, leave: int) -> None:
    cache = sum(site.units * site.cost.kv for site in SITES)
    budget = Budget(ratio, cache, counts="kv_cache")
    plan = TwoStage(1, 1.5, 1)(scores_of(SITES), SITES, budget, ByLayer(0), RNG)
    assert sum(not plan.sites[site.name].kept for site in ATTENTION) == leave


def test_nothing_leaves_for_nothing_and_losses_are_needed() -> None:
    budget = Budget(0.0, params(SITES))
    plan = TwoStage(1, 1.5, 1)(scores_of(SITES), SITES, budget, ByLayer(LAYERS * CHANNELS), RNG)
    assert all(plan.removed(site) == 0 for site in SITES)
    with pytest.raises(RunError, match="two-stage search measures losses"):
        TwoStage(1, 1.5, 1)(scores_of(SITES), SITES, budget, None, RNG)
    with pytest.raises(ConfigError, match=r"^alpha=0: expected a number > 0"):
        TwoStage(1, 0, 1)

"""FLAP's four structures (An et al., AAAI 2024), with the rounding of the released code (commit 3bb57db).

Two letters each for layers and modules: Uniform or Adaptive over Layers; over Modules (attention against FFN) Uniform,
Manual (the heads are given) or Adaptive. Sizes are the sites' own, so that with grouped queries a "head" is a KV group.
Thresholds as that code has them: counts are floored, UL keeps what equals the threshold, AL removes it. No site keeps a
minimum: a sublayer may lose all its units. A ratio of 0 keeps everything (there, AL removes the lowest).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruneexp.search.common import by_layer, in_order, planned, prunable, raw, require, standardised
from pruneexp.types import Budget, ConfigError, Oracle, Plan, Scores, Site, require_least


@dataclass(frozen=True)
class UlUm:
    """UL-UM: every site loses its int(ratio * U) lowest units, whatever they cost and the sparsity counts."""

    local: ClassVar[bool] = True

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        values = raw(scores, sites)
        keep = {site.name: _at_least(values[site.name], int(budget.ratio * site.units)) for site in sites}
        return planned(keep, sites, budget)


@dataclass(frozen=True)
class UlMm:
    """UL-MM: each of L layers loses `heads` // L heads, and FFN channels for the rest of its share.

    Channels per layer: int((ratio * P / L - heads // L * head cost) / channel cost), P the budget's total.
    """

    local: ClassVar[bool] = True

    heads: int

    def __post_init__(self) -> None:
        require_least(self, 0, "heads", besides=", the heads (KV groups) to remove over all layers")

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        values, keep = raw(scores, sites), {}
        for own, heads, channels in self._counts(sites, budget):
            for group, n in ((_attention(own), heads), (_ffn(own), channels)):  # several FFNs: a mixture's experts
                kept = _at_least(torch.cat([values[site.name] for site in group]), n)
                sizes = [site.units for site in group]
                keep.update(zip((site.name for site in group), kept.split(sizes), strict=True))
        return planned(keep, sites, budget)

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        self._counts(sites, budget)

    def _counts(self, sites: Sequence[Site], budget: Budget) -> list[tuple[list[Site], int, int]]:
        """Each layer's sites, and how many heads and channels leave it."""
        layers = by_layer(sites)
        total = budget.layers or len(layers)
        heads = self.heads // total if budget.ratio > 0 else 0
        wanted = budget.ratio * (budget.total / len(layers))
        return [(own, heads, _channels(wanted, heads, own, budget, self.heads, total)) for own in layers.values()]


@dataclass(frozen=True)
class AlMm:
    """AL-MM: of all layers together the lowest `heads` heads, and FFN channels for the rest, by standardised score.

    Channels in all: int((L * ratio * P / L - heads * head cost) / channel cost). heads=0 keeps every head (the
    released code then removes every one: its sorted[-0] is the maximum).
    """

    heads: int

    def __post_init__(self) -> None:
        require_least(self, 0, "heads", besides=", the heads (KV groups) to remove over all layers")

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        heads, channels = self._counts(sites, budget)
        z, keep = standardised(scores, sites), {}
        for group, n in ((_attention(sites), heads), (_ffn(sites), channels)):
            threshold = _nth_lowest([z[site.name] for site in group], n)
            keep.update({site.name: z[site.name] > threshold for site in group})
        return planned(keep, sites, budget)

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        self._counts(sites, budget)

    def _counts(self, sites: Sequence[Site], budget: Budget) -> tuple[int, int]:
        """Heads and channels that leave, over all layers."""
        layers = len(by_layer(sites))
        heads = self.heads if budget.ratio > 0 else 0
        # L times the ratio first: the order in which that code multiplies decides what the floor sees
        wanted = layers * budget.ratio * (budget.total / layers)
        return heads, _channels(wanted, heads, sites, budget, self.heads, 1)


@dataclass(frozen=True)
class AlAm:
    """AL-AM, FLAP's own: heads and channels of all layers in one ranking of standardised scores.

    Going down it, the parameters kept add up; the threshold is the score at which they come closest to what should
    stay (all units' parameters - the budget's), and units above it are kept. Costs are in what the budget counts.
    """

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        self.check(sites, budget)
        costs = {site.name: budget.price(site) for site in sites}
        stay = torch.tensor(prunable(sites, budget) - budget.remove, dtype=torch.float64)
        return planned(_above_closest(scores, sites, costs, stay, budget), sites, budget)

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        require(budget, prunable(sites, budget) - sum(site.least * budget.price(site) for site in sites))


@dataclass(frozen=True)
class AlAmQueryHeads:
    """AL-AM with query heads in the place of heads: one of every KV group of a layer at a time, one of which stays."""

    granularity: ClassVar[tuple[str, ...]] = ("query_heads", "channels")

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        return AlAm()(scores, sites, budget, oracle, rng)

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        AlAm().check(sites, budget)


@dataclass(frozen=True)
class AlAmOfficial:
    """AL-AM as released: costs in channels, a head's cut to a whole number (512/3 = 170.67 to 170, LLaMA-7B).

    The target is (1 - ratio) of all units' costs: the sparsity's `of` has no say, nor have biases that are added.
    """

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        channel = min(site.cost.params for site in sites)
        costs = {site.name: site.cost.params // channel for site in sites}
        whole = sum(costs[site.name] * site.units for site in sites)
        # a whole number times a float is float32 there
        stay = torch.tensor(whole) * (1 - budget.ratio)
        return planned(_above_closest(scores, sites, costs, stay, budget), sites, budget)


def _at_least(score_U: Tensor, n: int) -> Tensor:
    """Mask of all but the n lowest, and of those that equal the lowest that stays."""
    if n >= len(score_U):
        return torch.zeros(len(score_U), dtype=torch.bool)
    return score_U >= score_U.sort().values[n]


def _nth_lowest(scores: list[Tensor], n: int) -> float:
    """The n-th lowest of all scores; -inf for n = 0."""
    return torch.cat(scores).sort().values[n - 1].item() if n > 0 else -torch.inf


def _above_closest(
    scores: Scores, sites: Sequence[Site], costs: Mapping[str, int], stay: Tensor, budget: Budget
) -> dict[str, Tensor]:
    if budget.ratio == 0:
        return {}
    ordered = in_order([site for site in sites if costs[site.name]])
    z = standardised(scores, sites)
    for site in ordered:
        if site.least:
            z[site.name] = z[site.name].index_fill(0, z[site.name].argsort()[-site.least :], torch.inf)
    ranked = torch.cat([z[site.name] for site in ordered]).sort(descending=True, stable=True)
    cost = torch.cat([torch.full((site.units,), costs[site.name]) for site in ordered])
    threshold = ranked.values[(cost[ranked.indices].cumsum(0) - stay).abs().argmin()]
    return {site.name: z[site.name] > threshold for site in ordered}


def _attention(sites: Sequence[Site]) -> list[Site]:
    return [site for site in sites if site.kind == "attention"]


def _ffn(sites: Sequence[Site]) -> list[Site]:
    return [site for site in sites if site.kind == "mlp"]


def _channels(wanted: float, heads: int, sites: Sequence[Site], budget: Budget, typed: int, per: int) -> int:
    """FFN channels that leave the sites together for `wanted` (as the budget counts) to go with them and `heads` heads.

    Raises ConfigError, naming the heads `typed` (`heads` times `per` layers), where there are fewer heads, where
    they alone are more than wanted, or where all channels cannot make up for what they leave.
    """
    attention, ffn = _attention(sites), _ffn(sites)
    if wanted == 0:
        return 0
    if not ffn or not attention:
        raise ConfigError(f"search.heads={typed}: expected a model with attention and FFN sites, both are cut")
    head, channel = budget.price(attention[0]), budget.price(ffn[0])
    if not channel:
        raise ConfigError(
            f"sparsity.of={budget.counts!r}: expected decoder, prunable, macs or bytes; FFN channels, of which none of "
            "it is, make up for the heads of search.heads"
        )
    channels = int((wanted - heads * head) / channel)
    there, all_channels = sum(site.units for site in attention), sum(site.units for site in ffn)
    most = min(there, math.floor(wanted / head)) if head else there
    least = math.ceil((wanted - all_channels * channel) / head) if head else 0
    if heads > most:
        why = "all heads (KV groups)" if most == there else "what the sparsity.ratio pays for"
        raise ConfigError(f"search.heads={typed}: expected at most {most * per}, {why}")
    if channels > all_channels:
        fits = f"at least {least * per}" if least <= there else "a lower sparsity.ratio"
        raise ConfigError(f"search.heads={typed}: expected {fits}, all FFN channels together are too few for the rest")
    return channels

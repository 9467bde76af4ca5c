"""Layers that lose shares of their own, by what the layers are worth: CFSP's and SlimLLM's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pruneexp.search.budgeted import removable
from pruneexp.search.common import by_layer, completed, nearest, prunable, removed, require
from pruneexp.search.granularity import Granularity, check_multiple, chosen_sites
from pruneexp.search.uniform import Uniform
from pruneexp.types import (
    QUERY_HEADS,
    Budget,
    ConfigError,
    Criterion,
    Oracle,
    Plan,
    RunError,
    Scores,
    Site,
    collected_by,
    evidence_kinds,
    require_within,
    start_name,
    unit_scores,
)

_SPREAD = 1.05  # by how much the layer that keeps most stays below all of it, where shares would pass that


@dataclass(frozen=True)
class LayerShares:
    """Each layer loses a share by its importance, inside it every sublayer the same share, lowest scores first.

    `importance` is one criterion, evaluated in the same pass; a layer's importance I_l is the mean over its units. Only
    the `pruned` least important share of the layers loses anything. With a = `intensity` and p the share that all of
    them lose of what `granularity` names:

    rule=sigmoid (CFSP, Wang et al., COLING 2025; released code): layer l keeps (1 - p) k_l / mean(k),
        k_l = sigmoid(a (I_l - mean(I))). Where that is 1 or more for one layer, all k come nearer to their mean, by
        (1 / (1 - p) - 1) mean(k) / (max(k) - mean(k)) / 1.05.
    rule=softmax (SlimLLM, Guo et al., ICML 2025; released code): layer l loses a share in proportion to exp(-a I_l).

    Layers of different sizes lose in proportion to what they hold, and no layer more than leaves `min_units`: the
    others make up for it. A layer's share is removed as by `Uniform`, `remainder` and `multiple` being its settings.
    SlimLLM's code rounds heads to the nearest; where there are few KV groups, `remainder=down` leaves better models.
    What rounding leaves over goes into the next layer's. The whole is so met to half the cost of the cheapest unit.
    Departs: scores and importances are of the dense model, where SlimLLM's code scores a layer behind the pruned ones.
    With `criterion.sequential=always` they are of each layer behind masked ones, which lose one share alike.
    """

    min_units: int
    granularity: Granularity
    importance: Mapping[str, Criterion]
    rule: Literal["sigmoid", "softmax"]
    intensity: float
    pruned: float
    multiple: int
    remainder: Literal["nearest", "down"]

    def __post_init__(self) -> None:
        _ = self._inside  # raises ConfigError for settings that cannot be
        if len(self.importance) != 1:
            raise ConfigError(f"importance={list(self.importance)!r}: expected one criterion")
        require_within(self, "[0, inf)", "intensity")
        require_within(self, "(0, 1]", "pruned", what="a share of the layers,")

    @property
    def starts(self) -> Mapping[str, Criterion]:
        """The criterion whose scores come beside the run's."""
        return self.importance

    @property
    def _inside(self) -> Uniform:
        return Uniform(self.min_units, self.granularity, 0.0, 0.0, self.multiple, False, self.remainder)

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        self.check(sites, budget)
        layers = by_layer(chosen_sites(sites, self.granularity, budget))
        return completed(self._plan(scores, layers, self._importance_L(scores, layers), budget), sites, budget)

    def _plan(self, scores: Scores, layers: Mapping[int, list[Site]], importance_L: Tensor, budget: Budget) -> Plan:
        """The plan of the layers that lose anything."""
        plan, over = Plan({}), 0.0
        for layer, wanted in self._wanted(layers, importance_L, budget).items():
            own = layers[layer]
            held = prunable(own, budget)
            share = replace(budget, ratio=wanted / held, total=held, added=over, layers=budget.layers or len(layers))
            part = self._inside(scores, own, share, None, torch.Generator())
            over = share.remove - removed(part, own, budget)
            plan = plan.merged(part)
        return plan

    def warning(self, sites: Sequence[Site], budget: Budget) -> str | None:
        """As `Uniform.warning`. What layers are worth is not known yet: as if all of them were worth the same."""
        layers = by_layer(chosen_sites(sites, self.granularity, budget))
        able = [site for own in layers.values() for site in own]
        scores = {site.name: torch.zeros(site.units) for site in able}
        plan = self._plan(scores, layers, torch.zeros(len(layers)).double(), budget)
        counts = {site.name: plan.removed(site) for site in able}
        return self._inside.too_coarse(counts, able, budget, "would leave if all layers were worth the same,")

    def _importance_L(self, scores: Scores, layers: Mapping[int, Sequence[Site]]) -> Tensor:
        """Mean over the units of each layer: float64 [L]. Query heads in turns count as their KV groups: a turn's score
        is a sum."""
        importances, turns = [], f".{QUERY_HEADS}"
        (start,) = self.importance
        for layer, own in layers.items():
            front = tuple(start_name(start, site.name.removesuffix(turns)) for site in own)
            values = [
                unit_scores(score).double().mean()
                for name, score in scores.items()
                if name in front
                or (name.startswith(tuple(f"{each}." for each in front)) and not name.endswith(turns))  # experts
            ]
            if not values:
                raise RunError(f"layer {layer}: the criterion {start} gave no scores")
            importances.append(torch.stack(values).mean())
        return torch.stack(importances)

    def _wanted(self, layers: Mapping[int, list[Site]], importance_L: Tensor, budget: Budget) -> dict[int, float]:
        """What each layer that loses anything is to lose, as the budget counts."""
        if budget.remove <= 0:
            return {}
        order = importance_L.sort(stable=True).indices[: self._count(len(layers))].sort().values
        names = [list(layers)[place] for place in order]
        held_L = torch.tensor([prunable(layers[name], budget) for name in names]).double()
        most = [removable(layers[name], self.min_units, budget, multiple=self.multiple) for name in names]
        share = min(1.0, budget.remove / held_L.sum().item())
        weight_L = held_L * losing_shares(importance_L[order], share, self.rule, self.intensity)
        return dict(zip(names, _within(weight_L, torch.tensor(most).double(), budget.remove).tolist(), strict=True))

    def _count(self, layers: int) -> int:
        return max(1, nearest(self.pruned * layers))

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        for name, criterion in self.importance.items():
            kinds = evidence_kinds(criterion.evidence)
            if len(collected_by("walk", kinds)) < len(kinds):
                raise ConfigError(
                    f"search.importance={[name]!r}: {name} looks at the whole model at once; expected a criterion that "
                    "goes by what a walk collects, such as block_influence"
                )
        check_multiple(sites, self.granularity, self.multiple)
        layers = by_layer(chosen_sites(sites, self.granularity, budget))
        most = sorted(removable(own, self.min_units, budget, multiple=self.multiple) for own in layers.values())
        require(budget, sum(most[: self._count(len(layers))]))


def losing_shares(importance_L: Tensor, share: float, rule: Literal["sigmoid", "softmax"], intensity: float) -> Tensor:
    """Shares that layers lose, of mean `share`: [L]."""
    if rule == "softmax":
        return share * len(importance_L) * (-intensity * importance_L).softmax(0)
    kept_L = (intensity * (importance_L - importance_L.mean())).sigmoid()
    mean, greatest = kept_L.mean(), kept_L.max()
    if share > 0 and greatest / mean * (1 - share) >= 1:
        room = mean * (1 / (1 - share) - 1) if share < 1 else torch.zeros(())
        kept_L = mean + (kept_L - mean) * (room / (greatest - mean).clamp_min(1e-300) / _SPREAD)
    return 1 - kept_L / mean * (1 - share)


def _within(weight_L: Tensor, most_L: Tensor, total: float) -> Tensor:
    """Amounts of sum `total` in proportion to the weights, none above `most_L`."""
    found_L, free_L = torch.zeros_like(weight_L), torch.ones_like(weight_L, dtype=torch.bool)
    while free_L.any():
        left = total - found_L[~free_L].sum()
        found_L[free_L] = left * weight_L[free_L] / weight_L[free_L].sum().clamp_min(1e-300)
        beyond_L = free_L & (found_L > most_L)
        if not beyond_L.any():
            break
        found_L[beyond_L] = most_L[beyond_L]
        free_L &= ~beyond_L
    return found_L

"""What searches share: checked scores, standardised scores, budgets of single layers, the plan's figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from pruneexp.types import Budget, ColumnScores, ConfigError, Plan, RunError, Score, Scores, Site, unit_scores

# Numbers that differ by rounding alone (0.3 * 10 against 3) must not end on different sides of a tie.
UNITS_EPSILON = 1e-9
PARAMS_EPSILON = 1e-3


def nearest(x: float) -> int:
    """Nearest whole number, halves up."""
    return math.floor(x + 0.5 + UNITS_EPSILON)


def in_order(sites: Sequence[Site]) -> list[Site]:
    """By layer, then by name: every tie is broken in this order, however the sites arrive."""
    return sorted(sites, key=lambda site: (site.layer, site.name))


def by_layer(sites: Sequence[Site]) -> dict[int, list[Site]]:
    return {layer: list(group) for layer, group in groupby(in_order(sites), key=lambda site: site.layer)}


def checked(scores: Scores, sites: Sequence[Site]) -> dict[str, Score]:
    """The sites' scores. Raises RunError as `checked_score` does."""
    return {site.name: checked_score(scores, site) for site in sites}


def checked_score(scores: Scores, site: Site, or_one: bool = False) -> Score:
    """The site's scores, one for each unit; with `or_one`, a single one for all of them will do. Raises RunError,
    naming the site, where they are missing, of another length or not finite."""
    if site.name not in scores:
        raise RunError(f"{site.name}: the criterion gave no scores")
    values_U = unit_scores(scores[site.name])
    if values_U.shape != (site.units,) and not (or_one and values_U.shape == (1,)):
        raise RunError(f"{site.name}: {list(values_U.shape)} scores, expected one for each of its {site.units} units")
    if not torch.isfinite(values_U).all():
        raise RunError(f"{site.name}: scores hold NaN or Inf")
    return scores[site.name]


def raw(scores: Scores, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Unit scores on the CPU, as they are."""
    return {name: unit_scores(score).detach().cpu() for name, score in checked(scores, sites).items()}


def standardised(scores: Scores, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Scores that can be compared between sites: z-scores within each site, [U] each.

    `ColumnScores`: each channel's z-score over all channels of the site (mean 0, unbiased standard deviation 1), a
    unit's being the mean of its channels', as in FLAP (An et al., AAAI 2024; operations in the order of the released
    code). Other scores: over the site's units; sites of a single unit (a whole sublayer, a whole layer) are
    standardised together, by kind. Scores without any spread become 0 (NaN in the released code).
    """
    known = checked(scores, sites)
    z = {site.name: _site_z(site, known[site.name]) for site in sites if site.units > 1}
    for kind in {site.kind for site in sites if site.units == 1}:
        single = in_order([site for site in sites if site.units == 1 and site.kind == kind])
        together = z_scores(torch.cat([unit_scores(known[site.name]).detach().cpu().double() for site in single]))
        z.update({site.name: together[i : i + 1] for i, site in enumerate(single)})
    return z


def _site_z(site: Site, score: Score) -> Tensor:
    if isinstance(score, ColumnScores):
        return z_scores(score.columns_C.detach().cpu()).reshape(site.units, site.width).mean(1)
    return z_scores(unit_scores(score).detach().cpu())


def z_scores(x: Tensor) -> Tensor:
    """Mean 0, unbiased standard deviation 1; all 0 where there is no spread."""
    spread = x.std() if len(x) > 1 else torch.zeros((), dtype=x.dtype)
    return (x - x.mean()) / spread if spread > 0 else torch.zeros_like(x)


def prunable(sites: Sequence[Site], budget: Budget) -> int:
    """What the sites' units hold, in what the budget counts."""
    return sum(budget.taken(site, site.units) for site in sites)


def removed(plan: Plan, sites: Sequence[Site], budget: Budget) -> int:
    """What leaves with a plan, in what the budget counts."""
    return sum(budget.taken(site, plan.removed(site)) for site in sites)


def layer_budgets(budget: Budget, sites: Sequence[Site]) -> dict[int, Budget]:
    """The share of each layer, in proportion to what its units hold; in whole numbers that add up to the budget's.

    A caller that decides layer by layer adds what a layer's plan misses of its target (or removes too much, below 0) to
    `added` of the next layer's budget. All layers together then meet the whole budget.
    """
    layers, whole = by_layer(sites), max(1, prunable(sites, budget))
    shares, before = {}, 0
    for layer, own in layers.items():
        after = before + prunable(own, budget)
        total = budget.total * after // whole - budget.total * before // whole
        added = budget.added * (after - before) / whole
        shares[layer] = replace(budget, total=total, added=added, layers=budget.layers or len(layers))
        before = after
    return shares


def planned(keep: Mapping[str, Tensor], sites: Sequence[Site], budget: Budget) -> Plan:
    """The plan of boolean masks [U] (True = kept), completed."""
    return completed(Plan.from_masks([site for site in sites if site.name in keep], keep), sites, budget)


def completed(plan: Plan, sites: Sequence[Site], budget: Budget) -> Plan:
    """The plan of all sites in order, those that it does not name whole, with the budget and what leaves."""
    there = in_order(sites)
    site_plans = Plan.keep_all([site for site in there if site.name not in plan.sites]).merged(plan).sites
    plan = Plan({**{site.name: site_plans[site.name] for site in there}, **site_plans})
    figures = {
        "ratio": budget.ratio,
        f"target_{budget.counts}": budget.remove,
        f"removed_{budget.counts}": removed(plan, sites, budget),
    }
    return Plan(plan.sites, figures)


def require(budget: Budget, most: float) -> None:
    """Raises ConfigError, naming the largest ratio, where more is to leave than `most`."""
    if budget.remove > most + PARAMS_EPSILON:
        largest = max(0.0, (most - budget.added) / budget.total)
        by = " by the table of times" if budget.counts == "latency" else ""
        raise ConfigError(
            f"sparsity.ratio={budget.ratio!r}: expected at most {int(largest * 1e4) / 1e4}, all that search may "
            f"remove{by}"
        )

"""Structures that a search may start from: how many units leave each site, by closed rules."""

from __future__ import annotations

import torch

from pruneexp.search.budgeted import Global
from pruneexp.search.common import prunable
from pruneexp.search.flap import AlAm
from pruneexp.search.granularity import Amounts
from pruneexp.search.levels import Levels, Structures
from pruneexp.types import Plan, RemovalPath, Scores

HEAD_SHARES = (0.0, 0.5, 1.5, 1.0)  # of the uniform share: heads that leave
AL_AM = "al_am of "  # in front of a criterion's name
RAMPS = (-0.5, 0.5)  # by how much the share rises from the middle layer to the last, of itself


def begun_with(plan: Plan, start: str) -> Plan:
    """The plan with the name of the start, where it has one, noted in its budget."""
    return Plan(plan.sites, {**plan.budget, "start": start}) if start else plan


def same_share(structures: Structures, head_share: float, ramp: float = 0.0) -> Levels:
    """The same share of every cheap site, of the dearer ones `head_share` times the overall share; with `ramp`, of
    layer l of L the share times 1 + ramp (2 l / (L - 1) - 1)."""
    share = structures.budget.remove / prunable(structures.chosen, structures.budget)
    last = max(1, max(site.layer for site in structures.chosen))
    levels = {}
    for site in structures.chosen:
        tilt = 1 + ramp * (2 * site.layer / last - 1)
        wanted = share * tilt * (head_share if site in structures.dear else 1.0)
        meets_budget = site in structures.cheap and not ramp  # the cheap sites make up for the rest evenly
        levels[site.name] = 0 if meets_budget else round(min(1.0, wanted) * structures.size[site.name])
    return structures.balanced(levels)


def by_score_over_cost(structures: Structures, method: Amounts) -> Levels:
    """What `Global` removes by score over cost, whole sublayers among the units."""
    search = Global(method.min_units, method.granularity, "per_parameter", method.multiple)
    plan = search(structures.scores, structures.sites, structures.budget, None, torch.Generator())
    return structures.balanced(structures.levels(plan))


def standardised_share(structures: Structures, scores: Scores) -> Levels:
    """What FLAP's AL-AM removes: the lowest standardised scores of all sites."""
    plan = AlAm()(scores, structures.chosen, structures.budget, None, torch.Generator())
    return structures.balanced(structures.levels(plan))


def cheapest(structures: Structures) -> Levels:
    """Least sum of removal costs. All scores are removal paths."""
    curves = {}
    for site in structures.chosen:
        path = structures.scores[site.name]
        assert isinstance(path, RemovalPath)
        costs, steps = [0.0, *path.cost_U.tolist()], structures.steps[site.name]
        curves[site.name] = (range(len(steps)), [costs[units] for units in steps].__getitem__)
    return structures.allotted(curves)

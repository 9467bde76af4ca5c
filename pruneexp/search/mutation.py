"""A structure that differs a little from another."""

from __future__ import annotations

import torch

from pruneexp.search.levels import Levels, Structures


def mutated(structures: Structures, levels: Levels, distance: float, rng: torch.Generator) -> Levels:
    """Parameters moved between one, two or three pairs of sites; the amount is drawn on a logarithmic scale, `distance`
    times a site's units at most. Where whole sublayers may leave, one time in two one of them does, or comes back."""

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=rng))

    sites, child = structures.chosen, dict(levels)
    if structures.wholes and draw(2):
        name = structures.wholes[draw(len(structures.wholes))].name
        child[name] = 0 if child[name] == structures.most[name] else structures.most[name]
        return structures.balanced(child)
    for _ in range(1 + draw(3)):
        loses, gains = sites[draw(len(sites))], sites[draw(len(sites))]
        largest = distance * max(site.units * structures.budget.price(site) for site in (loses, gains))
        amount = largest * 2.0 ** -draw(5)
        for site, sign in ((loses, 1), (gains, -1)):
            units = max(1, round(amount / structures.cost[site.name])) * sign
            child[site.name] = min(max(child[site.name] + units, 0), structures.most[site.name])
    return structures.balanced(child)

"""The same structure, its units chosen by scores of more windows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from pruneexp.search.levels import Structures
from pruneexp.search.removable import unit_order
from pruneexp.types import Plan, Scores, Site, start_name


def reordered(plan: Plan, before: Scores, after: Scores, starts: Iterable[str], sites: Sequence[Site]) -> Plan:
    """As many units leave every site, by the scores `after` of the criterion (or start) whose order the plan follows by
    the scores `before`. Sites whose units left in no such order, or query head by query head, stay as planned."""
    chosen = dict(plan.sites)
    for name, own in orders_followed(plan, before, ("", *starts), sites).items():
        site = plan.sites[name]
        kept_U = unit_order(after[own], site.units)[site.units - len(site.kept) :].sort().values
        chosen[name] = replace(site, kept=tuple(kept_U.tolist()))
    return Plan(chosen, plan.budget)


def orders_followed(plan: Plan, scores: Scores, starts: Sequence[str], sites: Sequence[Site]) -> dict[str, str]:
    """By site that has lost some of its units: the name of the scores, of the first of `starts` ("": the criterion),
    which are lowest for those units. Without the sites that no scores explain."""
    orders = {}
    for site in sites:
        own, count = plan.sites.get(site.name), plan.removed(site)
        if own is None or own.kept_query_heads is not None or not 0 < count < site.units:
            continue
        gone = set(range(site.units)) - set(own.kept)
        for name in (start_name(start, site.name) if start else site.name for start in starts):
            if name in scores and set(unit_order(scores[name], site.units)[:count].tolist()) == gone:
                orders[site.name] = name
                break
    return orders


def followed(structures: Structures, plan: Plan, scores: Scores, orders: Mapping[str, str]) -> Structures:
    """Structures whose units leave in the plan's order of each site: by the scores that `orders` names; elsewhere what
    has left stays gone."""
    structures = structures.ordered({site: scores[name] for site, name in orders.items()})
    gone_U = {
        name: torch.isin(torch.arange(len(place)), torch.tensor(plan.sites[name].kept).long(), invert=True)
        for name, place in structures.place.items()
        if name not in orders
    }
    return structures.ordered({n: structures.place[n].double() - 2.0 * len(gone) * gone for n, gone in gone_U.items()})

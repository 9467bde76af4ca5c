"""The same structure, its units chosen by scores of more windows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from pruneexp.search.removable import unit_order
from pruneexp.types import Plan, Scores, Site, start_name


def reordered(plan: Plan, before: Scores, after: Scores, starts: Iterable[str], sites: Sequence[Site]) -> Plan:
    """As many units leave every site, by the scores `after` of the criterion (or start) whose order the plan follows by
    the scores `before`. Sites whose units left in no such order, or query head by query head, stay as planned."""
    chosen = dict(plan.sites)
    for site in sites:
        own, count = plan.sites.get(site.name), plan.removed(site)
        if own is None or own.kept_query_heads is not None or not 0 < count < site.units:
            continue
        gone = set(range(site.units)) - set(own.kept)
        for name in (site.name, *(start_name(start, site.name) for start in starts)):
            if name in before and set(unit_order(before[name], site.units)[:count].tolist()) == gone:
                kept_U = unit_order(after[name], site.units)[count:].sort().values
                chosen[site.name] = replace(own, kept=tuple(kept_U.tolist()))
                break
    return Plan(chosen, plan.budget)

"""What `granularity` names, and by how much at a time it leaves: FFN widths in multiples.

The units are heads and channels. In the place of heads (KV groups), query heads: one of every group of a layer at a
time, a unit being such a turn. Or, of a mixture's FFN, whole experts in the place of their channels, a layer keeping
as many as a token is routed to.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, Protocol

from pruneexp.search.common import by_layer, in_order
from pruneexp.types import QUERY_HEADS, Budget, ConfigError, Site, require_least

Granularity = list[Literal["heads", "channels", "blocks", "attention", "ffn", "experts", "query_heads"]]
KIND = {
    "heads": "attention",
    "channels": "mlp",
    "blocks": "block",
    "attention": "attention",
    "ffn": "mlp",
    "experts": "experts",
    "query_heads": QUERY_HEADS,
}
UNITS = {
    "attention": "heads",
    "mlp": "channels",
    "experts": "experts",
    QUERY_HEADS: "query_heads",
}  # kind -> what its units are called
WHOLE = {"attention": "attention", "mlp": "ffn", "block": "blocks"}  # kind -> what the whole of it is called
_AS_WHOLE = {"attention": "sublayer", "ffn": "sublayer", "blocks": "block"}  # what a criterion `judges` then
_FROM_UNITS = {
    **{name: {kind} for name, kind in KIND.items()},
    "experts": {"mlp"},
    "query_heads": {"attention"},
    "blocks": {"attention", "mlp"},
}


class Amounts(Protocol):
    """The settings of a search that say what may leave, and by how much at a time."""

    @property
    def min_units(self) -> int: ...

    @property
    def granularity(self) -> Granularity: ...

    @property
    def multiple(self) -> int: ...


def check_settings(method: Amounts) -> None:
    granularity = method.granularity
    require_least(method, 0, "min_units")
    require_least(method, 1, "multiple", besides=", of which FFN widths are multiples")
    if not granularity or len(set(granularity)) < len(granularity):
        raise ConfigError(f"granularity={granularity!r}: expected one or more of {', '.join(KIND)}, each once")
    if {"channels", "experts"} <= set(granularity):
        raise ConfigError(f"granularity={granularity!r}: expected channels or experts, which hold them")
    if "query_heads" in granularity and {"heads", "attention"} & set(granularity):
        raise ConfigError(
            f"granularity={granularity!r}: expected query_heads, or heads (KV groups) or attention, which hold them"
        )


def check_units_alone(granularity: Granularity, why: str) -> None:
    """Raises ConfigError, saying why, where whole sublayers or layers may leave."""
    if not set(granularity) <= set(UNITS.values()):
        raise ConfigError(
            f"granularity={granularity!r}: expected heads, channels or both (or query_heads, experts); {why}"
        )


def is_plain(granularity: Granularity, multiple: int) -> bool:
    """Units one by one, nothing that holds others: heads, channels or both; or layers alone."""
    if set(granularity) <= set(UNITS.values()):
        return multiple == 1 or "channels" not in granularity
    return granularity == ["blocks"]


def is_nested(granularity: Granularity) -> bool:
    """Whether something that may leave holds other things that may."""
    named = set(granularity)
    return {"heads", "attention"} <= named or {"channels", "ffn"} <= named or ("blocks" in named and len(named) > 1)


def scored_as(granularity: Sequence[str], judges: Collection[str]) -> Literal["wholes", "units"] | None:
    """How a criterion can score what a search may remove: as whole sublayers and layers, or by units, whose scores add
    up to those of wholes; None where it can do neither."""
    if all(_AS_WHOLE.get(name) in judges for name in granularity):
        return "wholes"
    return "units" if all(_FROM_UNITS[name] <= set(judges) for name in granularity) else None


def chosen_sites(sites: Sequence[Site], granularity: Granularity, budget: Budget) -> list[Site]:
    """The sites that may lose units. Raises ConfigError where there are none (one layer of several may have none)."""
    # What holds nothing of what is counted stays: FFN channels fill no KV cache.
    priced = [site for site in in_order(sites) if budget.taken(site, site.units)]
    chosen = [site for site in priced if site.kind in {KIND[name] for name in granularity}]
    if not chosen and complete(sites, budget):
        there = [name for name, kind in KIND.items() if any(site.kind == kind for site in priced)]
        if not there:  # times of which none falls, or a KV cache that heads share
            raise ConfigError(f"sparsity.of={budget.counts!r}: expected another quantity, fewer units take no less")
        raise ConfigError(f"search.granularity={list(granularity)!r}: expected some of {', '.join(there)}")
    return chosen


def complete(sites: Sequence[Site], budget: Budget) -> bool:
    """Whether these are all layers, not one of several."""
    return budget.layers is None or budget.layers == len(by_layer(sites))


def least_units(site: Site, min_units: int) -> int:
    """Units that a site keeps: `min_units`, of experts as many as a token needs, of a layer none (one layer of all
    stays)."""
    return 0 if site.kind == "block" else max(min_units, site.least)


def removal_steps(site: Site, min_units: int, multiple: int, units: bool = True, whole: bool = False) -> list[int]:
    """The numbers of units that may have left, ascending from 0. An FFN keeps a multiple of `multiple`, every site at
    least `min_units`. `units`: single units may leave. `whole`: all of them together may."""
    multiple = multiple if site.kind == "mlp" else 1
    steps = [0]
    if units:
        least = -(-least_units(site, min_units) // multiple)
        steps += [site.units - n * multiple for n in range((site.units - 1) // multiple, least - 1, -1)]
    if whole and steps[-1] < site.units:
        steps.append(site.units)
    return steps


def step_units(site: Site, multiple: int, units: bool = True) -> int:
    """Units that leave in one step (the first one of a width that is no multiple, and a jump to nothing, aside)."""
    if not units:
        return site.units
    return min(multiple, max(1, site.units)) if site.kind == "mlp" else 1


def check_multiple(sites: Sequence[Site], granularity: Granularity, multiple: int) -> None:
    """Raises ConfigError where no FFN is as wide as `multiple`."""
    widest = max((site.units for site in sites if site.kind == "mlp"), default=multiple)
    if "channels" in granularity and multiple > widest:
        raise ConfigError(f"search.multiple={multiple!r}: expected at most {widest}, the FFN width")

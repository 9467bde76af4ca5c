"""What a criterion is shown of query heads: they stand as a site of their own beside the KV groups that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from pruneexp.model import Model
from pruneexp.types import (
    QUERY_HEADS,
    Block,
    ConfigError,
    Criterion,
    Search,
    Site,
    SiteWeights,
    evidence_kinds,
)


def with_query_heads(block: Block, evidence: Mapping[str, Any]) -> tuple[Block, dict[str, Any]]:
    """The layer with a site of H query heads behind each attention site of G groups: with their rows of the queries and
    their columns of the out-projection; and what is known of these."""
    sites: list[Site] = []
    weights, norms, known = dict(block.weights), dict(block.norms), dict(evidence)
    for site in block.sites:
        sites.append(site)
        if site.head_cost is None:
            continue
        heads, size = site.units * site.group, site.width // site.group
        own = replace(
            site,
            name=f"{site.name}.{QUERY_HEADS}",
            units=heads,
            width=size,
            cost=site.head_cost,
            group=1,
            head_cost=None,
        )
        sites.append(own)
        weights[own.name] = _by_head(block.weights[site.name], site.group)
        if site.name in evidence:
            known[own.name] = _of_heads(evidence[site.name], site.group)
        if site.name in norms:
            norms[own.name] = norms[site.name]
    return replace(block, sites=tuple(sites), weights=weights, norms=norms), known


def _of_heads(evidence: Any, group: int) -> Any:
    """Evidence of channels as it is; of weights, that of the query heads'."""
    if isinstance(evidence, tuple):
        return tuple(_of_heads(each, group) for each in evidence)
    if not is_dataclass(evidence) or isinstance(evidence, type):
        return evidence
    parts = {each.name: getattr(evidence, each.name) for each in fields(evidence)}
    weights = {name: _by_head(own, group) for name, own in parts.items() if isinstance(own, SiteWeights)}
    return replace(evidence, **weights) if weights else evidence


def _by_head(weights: SiteWeights, group: int) -> SiteWeights:
    """Views of the rows of the queries, head by head: keys and values stay with their groups."""

    def of_queries(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"query": rows["query"].unflatten(1, (group, -1)).flatten(0, 1)} if "query" in rows else {}

    return replace(
        weights,
        in_projections=of_queries(weights.in_projections),
        in_projection_biases=of_queries(weights.in_projection_biases),
    )


def check_query_heads(model: Model, criterion: Criterion, search: Search, chosen: Mapping[str, str]) -> None:
    """Raises ConfigError where query heads are to leave a model whose KV groups hold a single one, or by a criterion
    that cannot tell them apart. Needs the model's structure, no weights. `chosen`: as for `check_mixture`."""
    granularity = list(search.granularity)
    if QUERY_HEADS not in granularity:
        return
    attention = [site for site in model.sites() if site.kind == "attention"]
    if not any(site.head_cost for site in attention):
        if hasattr(type(search), "granularity"):  # it has no such setting
            raise ConfigError(
                f"search={chosen['search']}: expected one of heads in the place of query heads, such as search=al_am; "
                f"{_why(model)}"
            )
        raise ConfigError(
            f"search.granularity={granularity!r}: expected heads in the place of query_heads; {_why(model)}"
        )
    if any(kind.by_unit for kind in evidence_kinds(criterion.evidence)):
        raise ConfigError(
            f"criterion={chosen['criterion']}: expected another with query_heads in search.granularity; it measures "
            "what whole KV groups do"
        )


def _why(model: Model) -> str:
    if model.family.shared_roles:
        return f"the query heads of {model.name} share one key/value head, and leave one by one as heads"
    return f"every query head of {model.name} has a key/value head of its own, and leaves with it"

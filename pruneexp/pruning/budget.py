"""What a ratio is a share of: the sparsity's quantity, counted on a model; and whether so much of it can leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pruneexp.calibrate import require_sums
from pruneexp.model import Model, layer_structure
from pruneexp.model.modeling_pruned import LayerStructure
from pruneexp.pruning.method import walks_by_sites
from pruneexp.search import UNITS, WHOLE, in_turns
from pruneexp.types import (
    QUERY_HEADS,
    Budget,
    Compensator,
    ConfigError,
    Criterion,
    Plan,
    Search,
    Site,
    SitePlan,
    Sparsity,
    evidence_kinds,
)

COUNTS: dict[str, Any] = {"decoder": "params", "prunable": "params"}  # the others are called what they count


def budget_of(model: Model, sparsity: Sparsity, ratio: float, sites: Sequence[Site], layers: Sequence[int]) -> Budget:
    """A share of what these layers hold, counted as the sparsity says; `sites`: all of theirs that may lose units."""
    counts = COUNTS.get(sparsity.of, sparsity.of)
    budget = Budget(ratio, 0, 0, None, counts, sparsity.context, model.dtype.itemsize)
    if counts == "latency" and model.times is not None:
        total = sum(model.times.total(model.origin[index], model.layer_sites(index)) for index in layers)
        return replace(budget, total=total, times=model.times, origin=tuple(model.origin))
    total = sum(budget.taken(site, site.units) for site in sites)
    if sparsity.of in ("decoder", "bytes"):  # norms and out-projections' biases too
        params = sum(p.numel() for index in layers for p in model.layers[index].parameters())
        by_params = replace(budget, counts="params")
        total += budget.added_params(params - sum(by_params.taken(site, site.units) for site in sites))
    return replace(budget, total=total)


def whole_budget(model: Model, search: Search, sparsity: Sparsity, ratio: float) -> Budget:
    """The budget over all layers, of the sites that the search may remove. Raises ConfigError where these hold
    nothing of what is counted."""
    sites = [] if blocks_alone(search) else as_planned(model, search, model.sites())  # what layers hold is counted once
    held = sites or searched_sites(model, search)
    budget = budget_of(model, sparsity, ratio, held, range(len(model.layers)))
    if ratio > 0 and not budget.total:
        raise ConfigError(f"sparsity.of={sparsity.of!r}: expected another quantity, this model has none of it")
    return budget


def searched_sites(model: Model, search: Search) -> list[Site]:
    """What a search may choose from: the sublayers, and whole layers where these may leave; or layers alone."""
    granularity = search.granularity
    sites = [] if blocks_alone(search) else as_searched(model, search, model.sites())
    layers = range(len(model.layers)) if "blocks" in granularity else ()
    return sites + [site for index in layers for site in model.whole_block(index).sites]


def as_searched(model: Model, search: Search, sites: Sequence[Site]) -> list[Site]:
    """The sites of some layers, as a search chooses from them. Where query heads may leave, their turns stand in the
    place of attention."""
    sites = as_planned(model, search, sites)
    if QUERY_HEADS not in search.granularity:
        return sites
    return [in_turns(site) or site for site in sites]


def as_planned(model: Model, search: Search, sites: Sequence[Site]) -> list[Site]:
    """The sites of some layers, priced by the latency table where there is one. Where whole experts may leave, one site
    of these stands in the place of a layer's experts."""
    times, granularity = model.times, search.granularity
    if WHOLE["attention"] in granularity:
        sites = [replace(site, beside=site.shared) for site in sites]
    if times is not None:
        ways = [(site, loses_units(search, site), WHOLE.get(site.kind) in granularity) for site in sites]
        sites = [times.priced(model.origin[site.layer], site, units, whole) for site, units, whole in ways]
    if "experts" not in granularity:
        return list(sites)
    whole = [site for layer in sorted({site.layer for site in sites}) for site in model.whole_experts(layer)]
    return [site for site in sites if site.expert is None] + whole


def loses_units(search: Search, site: Site) -> bool:
    """Whether a search may take some of the site's units, and not only all of them."""
    units = {UNITS.get(site.kind), QUERY_HEADS if site.kind == "attention" else None}
    return bool(units & set(search.granularity))


def blocks_alone(search: Search) -> bool:
    """Whether whole layers leave and nothing else, so that there is no out-projection to compensate."""
    return set(search.granularity) == {"blocks"}


def biases_added(model: Model, sparsity: Sparsity, compensator: Compensator, sites: Sequence[Site]) -> int:
    """Parameters of the biases that compensation gives to out-projections without one, were all `sites` to lose units.
    What counts only units (of=prunable) does not count them."""
    return 0 if not compensator.adds_bias or sparsity.of == "prunable" else new_biases(model, sites)


def new_biases(model: Model, sites: Sequence[Site]) -> int:
    """Parameters of a bias for every out-projection of `sites` that has none."""
    sites = [site for site in sites if site.kind in ("attention", QUERY_HEADS, "mlp")]
    layers = {site.layer for site in sites}
    structures = {index: layer_structure(model.layers[index], model.family, model.config) for index in layers}
    return sum(not _has_bias(structures[site.layer], site) for site in sites) * model.config.hidden_size


def _has_bias(structure: LayerStructure, site: Site) -> bool:
    """Whether the site's out-projection owns one."""
    if site.kind in ("attention", QUERY_HEADS):
        return structure.attention_output_bias
    return structure.mlp_output_bias if site.expert is None else (structure.expert_output_biases or ())[site.expert]


def refusal(search: Search, sites: Sequence[Site], budget: Budget) -> ConfigError | None:
    """Why the search cannot remove so much, where it can tell."""
    try:
        search.check(sites, budget)
    except ConfigError as error:
        return error
    return None


def check_mixture(
    model: Model, criterion: Criterion, search: Search, compensator: Compensator, chosen: Mapping[str, str]
) -> None:
    """Raises ConfigError for what a mixture of experts does not allow, and for whole experts of a model that is none.
    Needs the model's structure, no weights. `chosen`: what the methods are called, by group."""
    granularity = list(search.granularity)
    if not model.mixture:
        if "experts" in granularity:
            raise ConfigError(f"search.granularity={granularity!r}: expected no experts, {model.name} has none")
        return
    if "ffn" in granularity:
        raise ConfigError(
            f"search.granularity={granularity!r}: expected experts in the place of ffn for a mixture of experts"
        )
    for group, kinds in (("criterion", criterion.evidence), ("compensator", compensator.evidence)):
        if any(kind.by_window for kind in evidence_kinds(kinds)):
            raise ConfigError(
                f"{group}={chosen[group]}: expected another for a mixture of experts; it goes window by window, "
                "of which an expert sees only some tokens"
            )


def check_precision(dtype: str, criterion: Criterion, chosen: Mapping[str, str]) -> None:
    """Raises ConfigError where the rounding of `dtype`, the model's, hides what is measured. `chosen`: as for
    `check_mixture`."""
    half = dtype in ("float16", "bfloat16")
    if half and any(kind.wide for kind in evidence_kinds(criterion.evidence)):
        raise ConfigError(
            f"model.dtype={dtype!r}: its rounding hides the finite differences of criterion={chosen['criterion']}; "
            "expected float32 or float64, or criterion.hessian=exact"
        )


def check_pruning(model: Model, search: Search, sparsity: Sparsity, compensator: Compensator) -> Budget:
    """The whole run's budget, where it is within reach. Needs the model's structure, no weights.

    Raises:
        ConfigError: the search cannot remove so much, even if compensation added no bias (the largest ratio it names
            leaves room for all of them); or the compensator cannot walk through such a model.
    """
    if not blocks_alone(search) and walks_by_sites(compensator):
        require_sums(model)
    budget, sites = whole_budget(model, search, sparsity, sparsity.ratio), searched_sites(model, search)
    budget = replace(budget, added=_all_cost_too_much(search, sites, budget))
    biases = budget.added_params(biases_added(model, sparsity, compensator, sites))
    error = refusal(search, sites, replace(budget, added=budget.added + biases))
    if error is not None and refusal(search, sites, budget) is not None:
        raise error
    return replace(budget, added=0)


def _all_cost_too_much(search: Search, sites: Sequence[Site], budget: Budget) -> float:
    """What the prices of all units say too much, by a table of times, where the search may take them all (below 0: the
    last units of a sublayer take along what it takes beside them)."""
    if budget.counts != "latency":
        return 0
    prices = sum(budget.taken(site, site.units) for site in sites)
    all_but_rounding = prices * (1 - 1e-9)
    if refusal(search, sites, replace(budget, added=all_but_rounding - budget.ratio * budget.total)) is not None:
        return 0
    nothing = Plan({site.name: SitePlan(site.kind, site.units, ()) for site in sites})
    return prices - sum(budget.freed(nothing, site) for site in sites)

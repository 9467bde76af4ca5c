"""What a criterion, a search and a compensator answer, as they were asked: somebody's own may give anything."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pruneexp.types import (
    Block,
    ColumnScores,
    Compensator,
    Criterion,
    Plan,
    RemovalPath,
    RunError,
    Score,
    Site,
    SitePlan,
    SiteWeights,
    unit_scores,
)

Compensated = tuple[Tensor, Tensor | None, Mapping[str, float] | None]


def scores_of(criterion: Criterion, block: Block, evidence: Mapping[str, Any]) -> dict[str, Score]:
    """A criterion's answer, checked. Raises RunError where it wrote into what it was given."""
    given = (block.weights, block.norms, evidence)
    return checked_scores(_call_read_only("criterion", given, lambda: criterion(block, evidence)), block)


def compensation_of(
    compensator: Compensator, site: Site, weights: SiteWeights, evidence: Any, keep_C: Tensor
) -> Compensated:
    """A compensator's answer, checked. Raises RunError where it wrote into the weights that it was given."""
    weight, bias = weights.out_projection, weights.out_projection_bias
    answer = _call_read_only(
        "compensator", {site.name: (weight, bias)}, lambda: compensator(weight, bias, evidence, keep_C)
    )
    return checked_compensation(answer, site, len(weight), len(keep_C))


def _call_read_only(by: str, given: Any, answer: Callable[[], Any]) -> Any:
    """The answer. Raises RunError where a tensor of what was given was written to meanwhile: another method may read it
    after this one, or the model itself, and nobody would know."""
    before = [(name, tensor, tensor._version) for name, tensor in _tensors("", given)]
    returned = answer()
    for name, tensor, version in before:
        if tensor._version != version:
            raise RunError(f"{name}: the {by} wrote into what it was given, expected it to work on a copy")
    return returned


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Those in a value that count how often they are written to, by the nearest key they stand under."""
    if isinstance(value, Tensor):
        if not value.is_inference():
            yield name, value
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from _tensors(name, getattr(value, each.name, None))
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors(name or str(key), each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(name, each)


def checked_scores(scores: Any, block: Block) -> dict[str, Score]:
    """A criterion's answer, on the CPU, where searches work; out-projections of removal paths stay. Raises RunError
    where it is none, or its scores are no numbers."""
    if not isinstance(scores, Mapping):
        raise RunError(f"the criterion gave {type(scores).__name__}, expected scores by site name")
    known = {site.name: site for site in block.sites}
    checked = {}
    for name, score in scores.items():
        site = known.get(str(name).rpartition(":")[2])  # a start's name may stand in front
        if site is None:
            raise RunError(
                f"{name}: the criterion's scores are of no site of {block.name}, expected {', '.join(known)}"
            )
        if isinstance(score, RemovalPath):
            given = _path(score, site)
        else:
            given = score if isinstance(score, Tensor) else getattr(score, "scores_U", None)
        if not (isinstance(given, Tensor) and given.is_floating_point() and given.layout == torch.strided):
            kind = score.dtype if isinstance(score, Tensor) else type(score).__name__
            layout = "" if not isinstance(given, Tensor) or given.layout == torch.strided else f" ({given.layout})"
            raise RunError(f"{name}: the criterion's scores are {kind}{layout}, expected a floating-point tensor")
        checked[name] = _on_cpu(score)
        if isinstance(score, ColumnScores):
            _check_columns(score, site)
        if not torch.isfinite(unit_scores(checked[name])).all():
            raise RunError(f"{name}: scores hold NaN or Inf")
    return checked


def _path(path: RemovalPath, site: Site) -> Tensor:
    """Its costs. Raises RunError where its order is none."""
    order, costs = path.order_U, path.cost_U
    whole = isinstance(order, Tensor) and order.dtype == torch.int64
    if not whole or sorted(order.cpu().tolist()) != list(range(site.units)):
        raise RunError(f"{site.name}: the removal path's order_U is no order of its {site.units} units, int64")
    if not isinstance(costs, Tensor) or costs.shape != order.shape:
        raise RunError(f"{site.name}: the removal path's cost_U has not one cost for each of its {site.units} units")
    if not _are_numbers(path.chosen):
        raise RunError(f"{site.name}: the criterion chose {_short(path.chosen)}, expected numbers by name")
    return costs


def _check_columns(score: ColumnScores, site: Site) -> None:
    columns = score.columns_C
    if not isinstance(columns, Tensor) or columns.shape != (site.channels,):
        shape = list(columns.shape) if isinstance(columns, Tensor) else type(columns).__name__
        raise RunError(f"{site.name}: {shape} scores of columns, expected one for each of its {site.channels}")
    if not torch.isfinite(columns.cpu()).all():
        raise RunError(f"{site.name}: scores of columns hold NaN or Inf")


def _on_cpu(score: Score) -> Score:
    if isinstance(score, Tensor):
        return score.cpu()
    names = ("order_U", "cost_U") if isinstance(score, RemovalPath) else ("scores_U", "columns_C")
    return replace(score, **{name: getattr(score, name).cpu() for name in names})


def checked_plan(plan: Any, sites: Sequence[Site], by: str = "the search", by_query_head: bool = False) -> Plan:
    """A search's answer, or that of the method of its `by`. Raises RunError where it is no plan of the sites that it
    was given; `by_query_head`: of which attention may lose single query heads."""
    if not isinstance(plan, Plan):
        raise RunError(f"{by} gave {type(plan).__name__}, expected a Plan")
    if not isinstance(plan.sites, Mapping) or not isinstance(plan.budget, Mapping):
        what = ", ".join(type(part).__name__ for part in (plan.sites, plan.budget))
        raise RunError(f"{by} gave a Plan of {what}, expected mappings of sites and of figures")
    known = {site.name: site for site in sites}
    return replace(plan, sites={name: _site_plan(name, own, known, by_query_head) for name, own in plan.sites.items()})


def _site_plan(name: str, own: Any, known: Mapping[str, Site], by_query_head: bool) -> SitePlan:
    site = known.get(name)
    if site is None:
        raise RunError(f"{name}: is in the search's plan, expected only sites that the search was given")
    if not isinstance(own, SitePlan):
        raise RunError(f"{name}: is {type(own).__name__} in the search's plan, expected a SitePlan")
    if (own.kind, own.units) != (site.kind, site.units):
        has, fits = f"{own.kind} of {own.units} units", f"{site.kind} of {site.units}"
        raise RunError(f"{name}: is {has} in the search's plan, expected {fits}")
    kept = _indices(own.kept)
    if kept is None:
        raise RunError(f"{name}: keeps {_short(own.kept)} in the search's plan, expected indices of units")
    if own.kept_query_heads is None:
        return replace(own, kept=kept)
    if not by_query_head:
        raise RunError(f"{name}: has kept_query_heads in the search's plan, expected turns, as it was given them")
    heads = _indices(own.kept_query_heads)
    if heads is None or own.query_heads != site.units * site.group:
        has = f"{_short(own.kept_query_heads)} of {own.query_heads} query heads"
        raise RunError(f"{name}: keeps {has} in the search's plan, expected indices of {site.units * site.group}")
    return replace(own, kept=kept, kept_query_heads=heads)


def _indices(kept: Any) -> tuple[int, ...] | None:
    """As a tuple of integers, None where they are none: of a mask, say."""
    try:
        units = tuple(kept)
        return None if any(isinstance(unit, bool) for unit in units) else tuple(map(operator.index, units))
    except TypeError:
        return None


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def checked_compensation(answer: Any, site: Site, outputs: int, kept: int) -> Compensated:
    """A compensator's answer: weight, bias, and what it chose. Raises RunError where it is none."""
    if not isinstance(answer, (tuple, list)) or len(answer) not in (2, 3):
        what = f"{len(answer)} values" if isinstance(answer, (tuple, list)) else type(answer).__name__
        raise RunError(
            f"{site.name}: the compensator gave {what}, expected weight and bias, or these and what it chose"
        )
    weight, bias, *more = answer
    for name, tensor, fits in (("weights", weight, (outputs, kept)), ("a bias", bias, (outputs,))):
        if tensor is None and name == "a bias":
            continue
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != fits:
            has = tuple(tensor.shape) if isinstance(tensor, Tensor) else f"as {type(tensor).__name__}"
            of = "the kept channels" if name == "weights" else "the outputs, or None"
            raise RunError(f"{site.name}: the compensator gave {name} {has}, expected {fits}, {of}")
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            raise RunError(f"{site.name}: the compensator gave {name} that are no dense floating-point numbers")
    chosen = more[0] if more else None
    if chosen is not None and not _are_numbers(chosen):
        raise RunError(f"{site.name}: the compensator chose {_short(chosen)}, expected numbers by name")
    return weight, bias, chosen


def _are_numbers(chosen: Any) -> bool:
    """Finite ones, by name."""
    if not isinstance(chosen, Mapping):
        return False
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in chosen.values())

"""How many plain passes over the calibration windows a combination of methods takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pruneexp.calibrate import KEPT_BYTES, passes_of_layer
from pruneexp.experiment.forecast.shape import Shape, Windows
from pruneexp.model import Model
from pruneexp.pruning import Method, by_site, goes_layer_by_layer, scores_behind_masks, shown_to
from pruneexp.pruning.budget import blocks_alone, searched_sites
from pruneexp.pruning.dense_evidence import distinct
from pruneexp.types import Budget, Recovery, Site, collected_by, evidence_kinds


@dataclass(frozen=True)
class Passes:
    """Plain passes of all decoder layers over the calibration windows, as a run counts them in `passes/forward` and
    `passes/backward`. A search is taken to spend all that it may."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward)


def passes_of(method: Method, recovery: Recovery, model: Model, shape: Shape, budget: Budget, seen: Windows) -> Passes:
    """The passes of pruning, in all rounds, and of training after it. Layers and sites that keep all units are taken to
    be as much work as others."""
    one = _layer_by_layer(method, shape, seen) if goes_layer_by_layer(method) else _at_once(method, model, shape, seen)
    spends = method.search.spends
    if spends is not None and budget.ratio > 0:
        one += Passes(spends(searched_sites(model, method.search), budget, seen.batches))
    return sum([one] * len(method.sparsity.shares()), _trained(recovery, seen.count))


def _trained(recovery: Recovery, windows: int) -> Passes:
    if not recovery.trains or recovery.seen is None:
        return Passes()
    seen = recovery.seen(windows) / windows
    return Passes(seen + recovery.looks(windows) / windows, seen)


def dense_kinds(method: Method) -> tuple[Any, ...]:
    """Evidence of all layers that is held from the first walk until compensation."""
    compensator = method.compensator
    return () if compensator.sequential or blocks_alone(method.search) else evidence_kinds(compensator.evidence)


def _at_once(method: Method, model: Model, shape: Shape, seen: Windows) -> Passes:
    compensator, shown = method.compensator, shown_to(method)
    masks = scores_behind_masks(method)
    kinds = distinct(method.criterion.evidence, None if masks else dense_kinds(method) or None)
    layers = range(len(shape.layers)) if shown else ()
    judged = [site for index in layers for site in model.whole_block(index, shown).sites] or shape.sites
    scored = 1 - method.search.held_out  # of the windows, where nothing else is collected
    walked = _walk(kinds, shape, shrinks=masks) + _ahead(kinds, seen, judged)
    passes = Passes(scored * walked.forward, scored * walked.backward)
    if scored < 1 or masks:
        passes += _walk(dense_kinds(method), shape, shrinks=False)
    if blocks_alone(method.search):
        return passes
    if scored < 1:  # units are chosen by all windows in the end
        passes += walked
    if by_site(compensator):
        return passes + _walk_sites((), shape, seen)
    return passes + _walk(distinct(compensator.evidence if compensator.sequential else None), shape, shrinks=True)


def _layer_by_layer(method: Method, shape: Shape, seen: Windows) -> Passes:
    compensator, own = method.compensator, evidence_kinds(method.criterion.evidence)
    passes = _ahead(own, seen, shape.sites)
    if compensator.evidence is not None and not compensator.sequential:
        passes += _walk((compensator.evidence,), shape, shrinks=False)
    if by_site(compensator):
        return passes + _walk_sites(own, shape, seen)
    return passes + _walk(distinct(own, compensator.evidence if compensator.sequential else None), shape, shrinks=True)


def _ahead(kinds: Sequence[Any], seen: Windows, sites: Sequence[Site]) -> Passes:
    """Whole passes before the walk."""
    return sum((Passes(*kind.passes(seen.count, sites)) for kind in kinds), Passes())


def _walk(kinds: Sequence[Any], shape: Shape, shrinks: bool) -> Passes:
    """`calibrate.walk`: a pass where anything is collected, and another of all layers but the last once they shrink."""
    if not collected_by("walk", kinds):
        return Passes()
    return Passes(1 + ((len(shape.layers) - 1) / len(shape.layers) if shrinks else 0.0))


def _walk_sites(kinds: Sequence[Any], shape: Shape, seen: Windows) -> Passes:
    """`calibrate.walk_sites`, and a pass more where the criterion sees what the pruned layers before give."""
    total = len(shape.layers)

    def kept(site: Site) -> float:
        return min(1.0, KEPT_BYTES / max(1, site.channels * seen.tokens * shape.itemsize))

    runs = sum(
        passes_of_layer(
            cost, shape.of_layer(index), shape.hidden, seen.length, kept, first=index == 0, last=index + 1 == total
        )
        for index, cost in enumerate(shape.layers)
    )
    return Passes(runs / total + bool(kinds))

"""A round's scores and evidence of the dense model: on all windows, or on those that a search does not judge by; and
scores behind masked layers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from pruneexp.calibrate import Bookmark, Meter, walk
from pruneexp.pruning.answers import checked_plan, scores_of
from pruneexp.pruning.ask import parted
from pruneexp.pruning.budget import blocks_alone, whole_budget
from pruneexp.pruning.dense_evidence import distinct, without_out_projections
from pruneexp.pruning.method import Method, Pruning
from pruneexp.pruning.notes import Notes
from pruneexp.search import KIND, UlUm, expert_scores
from pruneexp.surgery import masked_layer
from pruneexp.types import QUERY_HEADS, Budget, Criterion, Plan, Score, Site, own_scores


def dense_results(
    work: Pruning, criterion: Criterion | None, kind: Any, shown: tuple[str, ...]
) -> tuple[dict[str, Score], dict[str, Any]]:
    """Scores by site name, and evidence of type `kind` by site name, both of the dense model; see `Results.of`."""
    if criterion is None and kind is None:
        return {}, {}
    record = work.record
    return record.results.of(work.model, work.tokens_NT, criterion, kind, shown, record.meter, record.notes)


def dense_kind(method: Method) -> Any:
    """The compensator's kind of statistics where it goes by those of the dense model, else None."""
    unused = method.compensator.sequential or blocks_alone(method.search)
    return None if unused else method.compensator.evidence


def masked_scores(work: Pruning) -> dict[str, Score]:
    """Scores of each layer behind the layers before it, of each of whose sites the int(ratio * U) lowest units are
    masked: as UL-UM would prune them one by one. The model is left as it was."""
    criterion, search = work.method.criterion, work.method.search
    kinds, scores, masks = {KIND[name] for name in search.granularity}, {}, ExitStack()
    note = work.record.notes.bookmark("masked_scores", Bookmark(work.record.meter, "calibrate"), lambda: scores)
    scores.update(note.state or {})
    with masks:
        for visit in walk(work.model, work.tokens_NT, distinct(criterion.evidence), note):
            masks.close()  # of the layer before
            block_scores = scores_of(criterion, visit.block, visit.of(criterion.evidence))
            scores.update(without_out_projections(block_scores) if work.model.streamed else block_scores)
            sites = [site for site in visit.block.sites if site.kind in kinds]
            plan = UlUm()(own_scores(block_scores), sites, Budget(work.ratio, 1), None, work.record.rng)
            masks.enter_context(masked_layer(work.model, visit.index, plan))
            del visit
    return scores


def scores_of_part(work: Pruning, criterion: Criterion, shown: tuple[str, ...]) -> dict[str, Score]:
    """Scores on the windows that the search does not judge structures by."""
    assert work.tokens_NT is not None
    seed, results, spent = work.record.rng.initial_seed(), work.record.results, Meter()
    scored_on, _ = parted(work.tokens_NT, work.method.search.held_out, seed)
    part = {"held_out": work.method.search.held_out, "drawn": seed}
    results = replace(results, basis={**results.basis, **part})
    scores, _ = results.of(work.model, scored_on, criterion, None, shown, spent, work.record.notes)
    share = len(scored_on) / len(work.tokens_NT)
    work.record.meter.forward += share * spent.forward
    work.record.meter.backward += share * spent.backward
    return scores


def by_all_windows(work: Pruning, plan: Plan, sites: Sequence[Site], shown: tuple[str, ...]) -> Plan:
    """The plan's units by scores of all windows, which become the run's."""
    record, before = work.record, work.scores
    scores, _ = record.results.of(
        work.model, work.tokens_NT, work.method.criterion, None, shown, record.meter, Notes(None)
    )
    scores = without_out_projections(scores)
    work.scores = {**scores, **expert_scores(scores, sites, work.method.search.starts)}
    budget = whole_budget(work.model, work.method.search, work.method.sparsity, work.ratio)
    rescored = work.method.search.rescored
    if rescored is None:
        return plan
    whole = {f"{site.name}.{QUERY_HEADS}": site for site in work.model.sites()}
    there = [whole.get(site.name, site) for site in sites]  # what turns stand for, as the plan has it
    answer = rescored(plan, before, work.scores, sites, budget)
    return checked_plan(answer, there, "the search's rescored", by_query_head=there != list(sites))

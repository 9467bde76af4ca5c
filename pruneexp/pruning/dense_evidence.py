"""Scores of the dense model, and the evidence on it that compensation asks for: from one walk, or from the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pruneexp.cache import Cache, NoCache
from pruneexp.cache.packing import bytes_of
from pruneexp.calibrate import Bookmark, DenseStates, Meter, walk
from pruneexp.criterion.together import each_of
from pruneexp.fingerprint import code_version, version_of
from pruneexp.model import Model
from pruneexp.pruning.answers import scores_of
from pruneexp.pruning.notes import Notes
from pruneexp.pruning.query_heads import with_query_heads
from pruneexp.types import (
    QUERY_HEADS,
    Criterion,
    RemovalPath,
    Score,
    Site,
    collected_by,
    evidence_kinds,
)

SMALL = 64  # bytes a channel


@dataclass(frozen=True)
class Results:
    """What is known of a dense model and calibration windows, and where it is kept. `basis`: what identifies both,
    and how the model is run, as JSON. `shared`: hidden states that a sweep's jobs share while it runs."""

    cache: Cache | NoCache
    basis: Mapping[str, Any]
    shared: DenseStates | None = None

    def of(
        self,
        model: Model,
        tokens_NT: Tensor | None,
        criterion: Criterion | None,
        kind: Any,
        shown: tuple[str, ...],
        meter: Meter,
        notes: Notes,
    ) -> tuple[dict[str, Score], dict[str, Any]]:
        """Scores by site name (of the kinds of sites in `shown` as wholes, or of query heads besides; none without a
        criterion), and the evidence of type `kind` by site name.

        What is missing is collected in one walk, which begins where `notes` say that it stopped. Evidence of the
        criterion's that is small is kept as well: a compensator may ask for it. The meter is charged as if all had been
        collected now: what a method costs does not depend on what ran before.

        Raises:
            RunError: scores hold NaN or Inf.
        """
        score_key = self._key("scores", None if criterion is None else _version(criterion), _kinds(criterion), shown)
        small = [each for each in distinct(_kinds(criterion)) if each is not kind and _is_small(each, model)]
        keys = {each: self._key("evidence", None, (each,), ()) for each in (kind, *small) if each is not None}
        with self.cache.held([*([] if criterion is None else [score_key]), *keys.values()]) as entries:
            scored = ({}, 0.0, 0.0) if criterion is None else entries.get(score_key, model.devices)
            evidence = {} if kind is None else entries.get(keys[kind], model.devices)
            if scored is None or evidence is None:
                kinds = [*([kind] if evidence is None else []), *(small if scored is None else [])]
                collected, seen, spent = _collected(
                    model,
                    tokens_NT,
                    criterion if scored is None else None,
                    kinds,
                    shown,
                    notes,
                    self.dense_states(model),
                )
                if scored is None:
                    scored = (collected, spent.forward, spent.backward)
                    entries.put(score_key, scored)
                for each, own in zip(kinds, seen, strict=True):
                    entries.put(keys[each], own)
                    evidence = own if each is kind else evidence
        assert evidence is not None
        scores, forward, backward = scored
        walked = tokens_NT is not None and bool(collected_by("walk", distinct(_kinds(criterion), kind)))
        meter.forward += forward + walked
        meter.backward += backward
        return scores, evidence

    def dense_states(self, model: Model) -> DenseStates | None:
        """Of a model from which nothing but whole layers has left."""
        return None if self.shared is None else self.shared.of((self.basis, tuple(model.origin)))

    def _key(self, what: str, criterion: str | None, kinds: tuple[Any, ...], whole: tuple[str, ...]) -> dict[str, Any]:
        evidence = [version_of(kind) for kind in kinds if kind]
        own = {"what": what, "criterion": criterion, "evidence": evidence, "whole": list(whole)}
        return {**self.basis, **own, "code": code_version()}


def _collected(
    model: Model,
    tokens_NT: Tensor | None,
    criterion: Criterion | None,
    kept: Sequence[Any],
    shown: tuple[str, ...],
    notes: Notes,
    states: DenseStates | None,
) -> tuple[dict[str, Score], list[dict[str, Any]], Meter]:
    """Scores, and evidence of the types `kept`, from one walk over the dense model, whose hidden states stay in
    `states`; the meter has what it spent besides the walk itself."""
    scores: dict[str, Score] = {}
    evidence: list[dict[str, Any]] = [{} for _ in kept]
    meter = Meter()
    wanted = None if criterion is None else criterion.evidence
    kinds = distinct(wanted, *kept)
    name = "_".join(["dense", *(["scores"] if criterion else []), *(["evidence"] if kept else [])])
    note = notes.bookmark(name, Bookmark(meter, "calibrate"), lambda: (scores, evidence))
    if note.state is not None:
        scores, evidence = note.state
    by_head = QUERY_HEADS in shown
    walked = walk(model, tokens_NT, kinds, note, read_only=True, whole=() if by_head else shown, dense_states=states)
    for visit in walked:
        if criterion is not None:
            block, seen = visit.whole or visit.block, visit.of(wanted)
            block, seen = with_query_heads(block, seen) if by_head else (block, seen)
            block_scores = scores_of(criterion, block, seen)
            scores.update(without_out_projections(block_scores) if model.streamed else block_scores)
        for kind, own in zip(kept, evidence, strict=True):
            own.update(visit.of(kind))
        del visit  # holds the layer's weights: before the next ones come
    if tokens_NT is not None and collected_by("walk", kinds):
        meter.forward = max(0.0, round(meter.forward - 1, 9))
    return scores, evidence, meter


def _version(criterion: Criterion) -> str:
    """Of several together, each one's: one may be somebody's own."""
    return " ".join(map(version_of, each_of(criterion)))


def _kinds(criterion: Criterion | None) -> tuple[Any, ...]:
    return () if criterion is None else evidence_kinds(criterion.evidence)


def _is_small(kind: Any, model: Model) -> bool:
    """Whether evidence of out-projections takes a few numbers a channel: no second moments of channels with each
    other."""
    site = next(iter(model.sites()), None)
    if kind.source != "reader" or site is None:
        return False
    try:
        return empty_bytes(kind, site) <= SMALL * site.channels
    except Exception:  # somebody else's evidence, that wants real tensors
        return False


@cache
def empty_bytes(kind: Any, site: Site) -> int:
    """Bytes of the evidence of one site before any token. Raises what `kind.empty` does where it wants real tensors."""
    with torch.device("meta"):
        return bytes_of(kind.empty(site))


def distinct(*wanted: Any) -> tuple[Any, ...]:
    """Types of evidence, each once."""
    return tuple(dict.fromkeys(kind for each in wanted for kind in evidence_kinds(each)))


def without_out_projections(scores: Mapping[str, Score]) -> dict[str, Score]:
    """Removal paths without what only probes need: weights and covariances of whole layers."""
    return {
        n: replace(score, out_projections={}) if isinstance(score, RemovalPath) else score
        for n, score in scores.items()
    }

"""What a run holds in memory at its stages, by what it is: bytes beside those of Python and PyTorch themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pruneexp.calibrate import KEPT_BYTES
from pruneexp.compensator import LeastSquares
from pruneexp.criterion import Obs
from pruneexp.evidence import Gram, WantedOutput
from pruneexp.experiment.forecast.shape import Shape
from pruneexp.experiment.forecast.work import WALKED, Calibration, blocks_alone, distinct
from pruneexp.pruning import Method, by_site, goes_layer_by_layer
from pruneexp.pruning.dense_evidence import empty_bytes
from pruneexp.search import Evolutionary
from pruneexp.surgery import STREAMED_SHARD_BYTES
from pruneexp.types import Site, evidence_kinds, updates_in_place

PARTS = ("weights", "hidden states", "activations", "statistics", "refits", "gradients", "copies")


@dataclass(frozen=True)
class Stage:
    """One stage of a run and the bytes of each of PARTS that it holds at most. `files`: bytes of what does not fit into
    `criterion.memory`, which lie in files meanwhile."""

    name: str
    parts: Mapping[str, int]
    files: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def with_hidden_states(self, more: int) -> Stage:
        return replace(self, parts={**self.parts, "hidden states": self.parts.get("hidden states", 0) + more})


def stages(
    method: Method,
    shape: Shape,
    seen: Calibration,
    measured: Sequence[Calibration],
    *,
    left: int,
    stream: bool,
    trains: int,
    prove: str,
) -> list[Stage]:
    """A run's stages. `measured`: the windows of each evaluator that has some. `left`: parameters of the pruned model;
    `trains`: windows in a batch of training after pruning, 0 for none; `prove`: as `run.prove`, "" where no checkpoint
    is written. Streamed: two decoder layers, what is outside them, and what waits to be written."""
    if stream:
        weights = 2 * shape.block_bytes + shape.outside * shape.itemsize
        copies = STREAMED_SHARD_BYTES + 2 * shape.block_bytes
    else:
        weights, copies = shape.bytes, shape.block_bytes  # a layer beside what it becomes
    found = []
    for windows in measured:
        held = windows.tokens if stream else 0  # a streamed model runs all windows layer by layer
        found.append(_stage("evaluate", weights, shape, windows, hidden=held, loss=True))
    if goes_layer_by_layer(method):
        found.append(_calibrating(method, shape, seen, weights, copies))
    else:
        found.append(_calibrating(method, shape, seen, weights, 0))
        found += _searching(method, shape, seen, weights)
        found.append(_shrinking(method, shape, seen, weights, copies))
    if trains:
        batch = Calibration(trains, seen.length, trains)
        kept = _saved(shape, batch)
        found.append(_stage("recover", weights, shape, batch, loss=True, gradients=kept))
    if prove in ("process", "in_place") and not stream:
        found.append(Stage("prove", {"weights": left * shape.itemsize, "copies": shape.bytes}))  # the source comes, too
    return found


def _stage(
    name: str,
    weights: int,
    shape: Shape,
    seen: Calibration,
    *,
    hidden: int = 0,
    loss: bool = False,
    statistics: int = 0,
    gradients: int = 0,
    copies: int = 0,
) -> Stage:
    """`hidden`: tokens whose hidden states are held; `loss`: the batch goes through the head."""
    return Stage(
        name,
        {
            "weights": weights,
            "hidden states": hidden * shape.hidden * shape.itemsize,
            "activations": activations(shape, seen, loss),
            "statistics": statistics,
            "gradients": gradients,
            "copies": copies,
        },
    )


def activations(shape: Shape, seen: Calibration, loss: bool = False) -> int:
    """Of a batch in flight: the most that one sublayer holds at a time, or the logits and their losses.

    Attention: queries, keys and values, before and after their rotation, what heads give, three hidden states; T x T
    scores and their softmax where they are written out. FFN: its C channels once for every writer and once for what
    the reader gets, and as many hidden states. Logits: as they come, once more in float32 (float64
    for such a model), and their log-softmax."""
    batch = min(seen.batch_size, seen.windows)
    tokens, e, wide = batch * seen.length, shape.itemsize, max(4, shape.itemsize)
    peak = 0
    for site in shape.sites:
        if site.kind == "attention":
            rows = 3 * site.channels + 2 * site.units * site.cost.kv
            scores = 2 * batch * shape.scores * seen.length**2
            peak = max(peak, ((rows + 3 * shape.hidden) * tokens + scores) * e)
        else:
            writers = site.cost.macs // shape.hidden - 1
            peak = max(peak, ((writers + 1) * site.channels + 3 * shape.hidden) * tokens * e)
    if loss:
        peak = max(peak, tokens * shape.vocabulary * (e + 2 * wide))
    return peak


def _saved(shape: Shape, batch: Calibration) -> int:
    """Activations of all layers that wait for the backward pass."""
    return len(shape.layers) * activations(shape, batch)


def _calibrating(method: Method, shape: Shape, seen: Calibration, weights: int, copies: int) -> Stage:
    """The first walk, or the only one. `copies`: of layers that are cut, and wait to be written."""
    criterion, compensator = method.criterion, method.compensator
    dense = () if compensator.sequential or blocks_alone(method) else evidence_kinds(compensator.evidence)
    kinds, times, statistics = distinct(criterion.evidence), 1, 0
    if goes_layer_by_layer(method):
        times = 2
        if by_site(compensator):
            times, statistics = 3, 2 * _of_widest((compensator.evidence,), shape) + _inputs(shape, seen)
        elif compensator.sequential:
            kinds = distinct(criterion.evidence, compensator.evidence)
        statistics += _scratch(shape) if isinstance(compensator, LeastSquares) else 0
    files = 0
    if isinstance(criterion, Obs):
        paths = 0 if goes_layer_by_layer(method) else _paths(method, shape)
        held = min(paths, _limit(criterion))
        statistics, files = statistics + _scratch(shape) + held, paths - held
    walked = any(kind.source in WALKED for kind in (*kinds, *dense))
    statistics += sum(statistics_bytes(kind, shape.sites, shape) for kind in dense) + _of_any_layer(kinds, shape)
    gradients, ahead = _derivatives(kinds, shape, seen)
    stage = _stage(
        "calibrate",
        weights,
        shape,
        seen,
        hidden=times * seen.tokens if walked else 0,
        loss=ahead,
        statistics=statistics,
        gradients=gradients,
        copies=copies,
    )
    return replace(stage, files=files)


def _searching(method: Method, shape: Shape, seen: Calibration, weights: int) -> list[Stage]:
    """Probes of masked structures, or of structures whose readers are fitted anew."""
    if not method.search.probes:
        return []
    compensator = method.compensator
    dense = () if compensator.sequential or blocks_alone(method) else evidence_kinds(compensator.evidence)
    statistics = sum(statistics_bytes(kind, shape.sites, shape) for kind in dense)
    stage = _stage("search", weights, shape, seen, loss=True, statistics=statistics)
    criterion = method.criterion
    if isinstance(criterion, Obs):
        paths, readers, scratch = _paths(method, shape), 0, 0
        if isinstance(method.search, Evolutionary):
            # readers are kept at as many levels as were asked for: seldom more than one a pass, at least those that
            # are judged together
            together = max(criterion.levels, method.search.offspring + 1)
            levels = min(together, math.ceil(method.search.effort or 0))
            # a refit works on a copy of the covariance, and on what the solved columns would give
            scratch = max((8 * site.channels * (site.channels + shape.hidden) for site in shape.sites), default=0)
            wide = sum(min(levels, site.units) * site.channels for site in shape.sites)
            readers = wide * shape.hidden * shape.itemsize
        held = min(paths, _limit(criterion))
        refits = min(readers, _limit(criterion) - held)
        more = {"statistics": statistics + held + scratch, "refits": refits}
        stage = Stage("search", {**stage.parts, **more}, files=paths + readers - held - refits)
    return [stage]


def _shrinking(method: Method, shape: Shape, seen: Calibration, weights: int, copies: int) -> Stage:
    """The second walk. `copies`: of layers that are cut, and wait to be written."""
    compensator = method.compensator
    kinds, times = evidence_kinds(compensator.evidence), 0
    if blocks_alone(method):
        return Stage("shrink", {"weights": weights, "copies": copies})
    statistics = 0
    if by_site(compensator):
        times, statistics = 3, _of_widest(kinds, shape) + _inputs(shape, seen)
        widest = max((site.channels for site in shape.sites), default=0)
        copies -= shape.block_bytes - widest * shape.hidden * shape.itemsize  # the writers have been let go by then
    elif compensator.sequential and kinds:
        times, statistics = 2, statistics + _of_any_layer(kinds, shape)
    else:
        statistics += sum(statistics_bytes(kind, shape.sites, shape) for kind in kinds)
    if isinstance(compensator, LeastSquares) and Gram in kinds:  # what the solved columns would give
        statistics += 8 * shape.hidden * max((site.channels for site in shape.sites), default=0)
    hidden = times * seen.tokens
    stage = _stage("shrink", weights, shape, seen, hidden=hidden, statistics=statistics, copies=copies)
    return stage if hidden else Stage("shrink", {**stage.parts, "activations": 0})


def _inputs(shape: Shape, seen: Calibration) -> int:
    """Of readers that are fitted anew, held until the layer runs on."""
    widest = max((site.channels for site in shape.sites), default=0)
    return min(KEPT_BYTES, widest * seen.tokens * shape.itemsize)


def statistics_bytes(kind: Any, sites: Sequence[Site], shape: Shape) -> int:
    """Of one kind of evidence for these sites, as its own `empty` lays it out (0 where that needs real tensors); beside
    wanted outputs, 8 C O."""
    if kind.source not in (*WALKED, "wanted"):
        return 0
    outputs = shape.hidden if kind is WantedOutput else 0
    try:
        return sum(empty_bytes(kind, replace(site, name="", layer=0)) + 8 * site.channels * outputs for site in sites)
    except Exception:  # evidence of somebody else's: a forecast must not stop a run
        return 0


def _of_any_layer(kinds: Sequence[Any], shape: Shape) -> int:
    """Evidence of the layer that has most, and the new value of the largest site's beside the old one, where it does
    not grow in place."""
    by_layer: dict[int, list[Site]] = {}
    for site in shape.sites:
        by_layer.setdefault(site.layer, []).append(site)
    sums = (sum(statistics_bytes(kind, sites, shape) for kind in kinds) for sites in by_layer.values())
    return max(sums, default=0) + _of_widest([kind for kind in kinds if not updates_in_place(kind)], shape)


def _of_widest(kinds: Sequence[Any], shape: Shape) -> int:
    return max((statistics_bytes(kind, [site], shape) for kind in kinds for site in shape.sites), default=0)


def _scratch(shape: Shape) -> int:
    """What a solve works on: covariance, factor and what it is made of, 8 C^2 each, of the widest site."""
    return 3 * _of_widest((Gram,), shape)


def _limit(criterion: Obs) -> int:
    """Bytes of covariances and fitted readers in memory."""
    return int(criterion.memory * 2**30)


def _paths(method: Method, shape: Shape) -> int:
    """Covariances that removal paths keep while a search may ask for refitted readers."""
    return statistics_bytes(Gram, shape.sites, shape) if isinstance(method.criterion, Obs) else 0


def _derivatives(kinds: Sequence[Any], shape: Shape, seen: Calibration) -> tuple[int, bool]:
    """Gradients of all sites' weights, those of a batch and their sums, and what waits for backward passes; and whether
    whole passes to the loss are made."""
    params = sum(site.units * site.cost.params for site in shape.sites)
    wide, found, ahead = max(4, shape.itemsize), 0, False
    for kind in kinds:
        if kind.source == "gradient":
            batch = Calibration(1, seen.length, 1) if kind.per_sample else seen
            sums = 2 if kind.per_sample else 1
            found = max(found, params * (shape.itemsize + sums * wide) + _saved(shape, batch))
        elif kind.source == "influence":
            times = 7 if kind.inverse == "conjugate_gradient" else 5
            found = max(found, times * params * wide + _saved(shape, seen))
        ahead = ahead or kind.source in ("gradient", "influence", "zeroth_order", "probe")
    return found, ahead

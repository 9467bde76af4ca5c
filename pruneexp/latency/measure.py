"""Measuring: the table of a model's sublayers, and the pruned layers against what they were."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pruneexp.latency.table import Conditions, Table
from pruneexp.latency.workload import (
    POOL_BYTES,
    Pool,
    Prepared,
    Workload,
    alike,
    bytes_of,
    filled_,
    resized,
    skeleton,
    widths,
)
from pruneexp.model import Model
from pruneexp.progress import progress
from pruneexp.types import Curve, LayerTimes, Times

FFN_POINTS, HEAD_POINTS = 13, 9  # of a curve, at most
WARM_UP, LEAST, MOST = 2, 5, 101  # rounds over all points
SECONDS = 20.0  # of all rounds, about
AT_ONCE = 2e-3  # seconds that are timed at once, at least, of a few layers in a row
REPEATS = 5  # of the whole stack
STACK_SECONDS = 0.3  # of one of them, at least

Widths = tuple[int, int, int]  # KV groups, query heads of each, FFN channels


@dataclass(frozen=True)
class Compared:
    """Milliseconds of all decoder layers, before and after pruning: those of each repeat, taken in turns."""

    dense: tuple[float, ...]
    pruned: tuple[float, ...]


def measure_table(work: Workload, conditions: Conditions, multiple: int) -> Table:
    """Medians and interquartile ranges of every sublayer's times. `multiple`: of which FFN widths will be.

    A layer is run without its FFN, for attention, and without attention, for the FFN; what a layer without both takes
    is a half of each, so that the two add up to the layer. All points take turns, in another order each round, so that
    what slows the machine down for a while falls on none of them. Weights are random and lie apart, so that they come
    from memory, as in a whole model."""
    model = work.model
    pool = Pool(min(POOL_BYTES, bytes_of(model.layers)), model.dtype, model.device)
    kinds = list(alike(model).values())
    points = {(n, w): None for n, own in enumerate(kinds) for w in grid(widths(model.layer_sites(own[0])), multiple)}
    layers = {point: resized(model.layers[kinds[point[0]][0]], model, *point[1]) for point in points}
    copies = max(1, -(-len(pool.numbers) * model.dtype.itemsize // max(1, bytes_of(list(layers.values())))))
    runs = {point: _in_a_row(work, layer, kinds[point[0]][0], pool, copies) for point, layer in layers.items()}
    spent = _rounds(work, runs)
    measured = {point: _summary([s / len(runs[point]) for s in seconds]) for point, seconds in spent.items()}
    del pool, runs, layers
    gc.collect()
    times = []
    for n, own in enumerate(kinds):
        by_widths = {w: measured[m, w] for m, w in points if m == n}
        times.append(_layer_times(tuple(own), by_widths, widths(model.layer_sites(own[0]))))
    return Table(conditions, Times(tuple(times)))


def grid(whole: Widths, multiple: int) -> list[Widths]:
    """Widths to measure: of attention without an FFN, and the other way round."""
    groups, heads, channels = whole
    points = [(0, 0, 0)]
    points += [(n, heads, 0) for n in spaced(groups, HEAD_POINTS, 1)]
    points += [(groups, n, 0) for n in spaced(heads, HEAD_POINTS, 1)]
    points += [(0, 0, n) for n in spaced(channels, FFN_POINTS, multiple)]
    return list(dict.fromkeys(points))


def spaced(most: int, points: int, multiple: int) -> list[int]:
    """Counts to measure, multiples, from the fewest that may stay to all. Where any count may stay, those between are
    odd: kernels are often faster, or slower, at round widths, which few plans leave. The fewest is always among them:
    counts below the next would otherwise lie on a line to none at all, which takes far less time than any width."""
    if most <= points:
        return list(range(1, most + 1))
    inner = [most * n / points for n in range(1, points)]
    if multiple > 1:
        counts = [max(1, round(n / multiple)) * multiple for n in inner]
    else:
        counts = [round(n / 2) * 2 - 1 for n in inner] + [most - 1 - most % 2]
    return sorted({n for n in counts if 0 < n < most} | {min(multiple, most), most})


def _in_a_row(work: Workload, layer: Any, origin: int, pool: Pool, copies: int) -> list[Prepared]:
    """As many copies of a layer as are timed together."""

    def one() -> Prepared:
        return work.prepared(filled_(skeleton(layer), pool), origin, pool)

    first = [one()]
    for _ in range(WARM_UP):
        work.run(first)
    each = max(1e-7, time_pass(work, first))
    return first + [one() for _ in range(min(copies, int(AT_ONCE / each)))]


def time_pass(work: Workload, layers: Sequence[Prepared]) -> float:
    """Seconds that the layers take."""
    device = work.model.device
    start = _computed(device)
    work.run(layers)
    return _computed(device) - start


def _computed(device: torch.device) -> float:
    """As `now`. Where a single thread computes, the seconds in which it does: what other programs take of its processor
    does not count."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time() if alone else now(device)


def now(device: torch.device) -> float:
    """Seconds, once the device has finished what was queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _rounds(work: Workload, runs: Mapping[Any, Sequence[Prepared]]) -> dict[Any, list[float]]:
    """Seconds of every point, of each round."""
    points, order = list(runs), random.Random(0)
    spent: dict[Any, list[float]] = {point: [] for point in points}
    start = time.perf_counter()
    for layers in runs.values():
        work.run(layers)
    rounds = min(MOST, max(LEAST, int(SECONDS / max(1e-6, time.perf_counter() - start))))
    turns = [point for _ in range(rounds) for point in order.sample(points, len(points))]
    for point in progress(turns, "latency table", len(turns), "times"):
        spent[point].append(time_pass(work, runs[point]))
    return spent


def _summary(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range, in milliseconds."""
    milliseconds = torch.tensor(seconds, dtype=torch.float64) * 1e3
    low, median, high = torch.quantile(milliseconds, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return median, high - low


def _layer_times(layers: tuple[int, ...], by_widths: Mapping[Widths, tuple[float, float]], whole: Widths) -> LayerTimes:
    groups, heads, channels = whole
    beside, spread = by_widths[0, 0, 0]

    def curve(points: Callable[[int], Widths], most: int) -> Curve:
        of = {n: by_widths[points(n)] for n in range(1, most + 1) if points(n) in by_widths}
        bare = (0, beside / 2, spread / 2)
        return Curve((bare, *((n, max(0.0, ms - beside / 2), iqr) for n, (ms, iqr) in of.items())))

    query_heads = curve(lambda n: (groups, n, 0), heads) if heads > 1 else None
    return LayerTimes(layers, curve(lambda n: (n, heads, 0), groups), curve(lambda n: (0, 0, n), channels), query_heads)


def compare_times(work: Workload, pruned: Model) -> Compared:
    """Times all layers before pruning, with random weights, and the pruned model's own, one run of each in turn."""
    pool = Pool(min(POOL_BYTES, bytes_of(work.skeletons)), pruned.dtype, pruned.device)
    dense = [work.prepared(filled_(skeleton(layer), pool), n, pool) for n, layer in enumerate(work.skeletons)]
    left = [work.prepared(layer, origin, pool) for layer, origin in zip(pruned.layers, pruned.origin, strict=True)]
    for layers in (dense, left):
        work.run(layers)
    runs = max(1, min(50, int(STACK_SECONDS / max(1e-6, time_pass(work, dense)))))
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in progress(range(REPEATS), "latency: before and after", REPEATS, "times"):
        took = [0.0, 0.0]
        for _ in range(runs):
            for side, layers in enumerate((dense, left)):
                took[side] += time_pass(work, layers)
        for side, seconds in enumerate(took):
            spent[side].append(1e3 * seconds / runs)
    return Compared(tuple(spent[0]), tuple(spent[1]))

"""Runs as points: seeds taken together, and the figures that a report draws from them."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pruneexp.report.folders import SAME
from pruneexp.report.methods import Described
from pruneexp.report.statistics import Effect, balanced, interval, main_effects, pareto_front
from pruneexp.types import Plan

SHARE = "sparsity/decoder"
KINDS = ("attention", "mlp", "block")


@dataclass(frozen=True)
class Point:
    """A method at a ratio, its seeds taken together.

    `share`: mean real share removed of the decoder's parameters. `value`: the metric's mean over the `n` seeds, of
    perplexities exp of the mean logarithm; `low`, `high`: its 95 % t-interval, None for one seed. `seeds`: the value of
    each seed."""

    context: str
    method: str
    ratio: float
    metric: str
    share: float
    value: float
    low: float | None
    high: float | None
    seeds: tuple[float, ...]
    runs: tuple[Described, ...]

    @property
    def n(self) -> int:
        return len(self.seeds)


def metrics_of(runs: Sequence[Described], pattern: str) -> list[str]:
    """Names, without "dense/" or "pruned/", of what some run measured on the pruned model, and that match the pattern
    whole."""
    names = {key.removeprefix("pruned/") for one in runs for key in one.run.metrics if key.startswith("pruned/")}
    return sorted(name for name in names if re.fullmatch(pattern, name))


def perplexities(runs: Sequence[Described]) -> list[str]:
    return metrics_of(runs, "ppl/.*")


def accuracies(runs: Sequence[Described]) -> list[str]:
    """Means over tasks, then tasks."""
    found = metrics_of(runs, r"(?!ppl/)(?:.*/)?acc\w*(?:[@/\[].*)?")
    return sorted(found, key=lambda name: (not is_mean(name), name))


def is_mean(accuracy: str) -> bool:
    return re.search(r"/mean\d+(@|$)", accuracy) is not None


def points(runs: Sequence[Described], metric: str) -> list[Point]:
    """One a context, method and ratio, in that order; of the runs that measured the metric."""
    groups: dict[tuple[str, str, float], list[Described]] = {}
    for one in runs:
        if f"pruned/{metric}" in one.run.metrics and SHARE in one.run.metrics:
            groups.setdefault((one.context, one.method, one.ratio), []).append(one)
    return [_point(key, metric, members) for key, members in sorted(groups.items(), key=lambda item: item[0])]


def _point(key: tuple[str, str, float], metric: str, members: Sequence[Described]) -> Point:
    scale, back = (math.log, math.exp) if metric.startswith("ppl/") else (float, float)
    values = by_seed([scale(one.run.metrics[f"pruned/{metric}"]) for one in members], [one.seed for one in members])
    found = interval(values)
    share = fmean(one.run.metrics[SHARE] for one in members)
    low, high = (None if found.half is None else back(found.mean + sign * found.half) for sign in (-1, 1))
    return Point(*key, metric, share, back(found.mean), low, high, tuple(map(back, values)), tuple(members))


def by_seed(values: Sequence[float], seeds: Sequence[Hashable]) -> list[float]:
    """The mean of each seed's values: two runs that differ in their evaluators, say, are one draw and not two."""
    found: dict[Hashable, list[float]] = {}
    for value, seed in zip(values, seeds, strict=True):
        found.setdefault(seed, []).append(value)
    return [fmean(same) for same in found.values()]


def dense(runs: Sequence[Described], metric: str) -> list[float]:
    """The dense model's figures, as `distinct` gives them."""
    return distinct([one.run.metrics[f"dense/{metric}"] for one in runs if f"dense/{metric}" in one.run.metrics])


def distinct(values: Sequence[float]) -> list[float]:
    """Ascending, those that are the same up to rounding once."""
    found: list[float] = []
    for value in sorted(values):
        if not found or value > found[-1] * (1 + SAME):
            found.append(value)
    return found


def mean_of(point: Point, key: str) -> float | None:
    """Mean of a metric over the point's runs; None where one of them lacks it."""
    values = [one.run.metrics.get(key) for one in point.runs]
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


@dataclass(frozen=True)
class Cost:
    """What a front is drawn against: lower is better. `scale`: of the metric's value, or of its inverse."""

    metric: str
    label: str
    inverse: bool
    scale: float

    def of(self, value: float) -> float:
        return self.scale / value if self.inverse else self.scale * value


def costs(runs: Sequence[Described]) -> list[Cost]:
    """Measured latency and bytes, as far as the runs have them."""
    found = []
    for metric in metrics_of(runs, r"latency/\w+_tok_s@[^/]+"):
        stage, _, how = metric.removeprefix("latency/").partition("_tok_s@")
        found.append(Cost(metric, f"{stage}, ms per token ({how})", True, 1e3))
    if metrics_of(runs, "bytes"):
        found.append(Cost("bytes", "weights, MiB", False, 2**-20))
    return found


@dataclass(frozen=True)
class Priced:
    """A point of a front: `cost` and `ppl`, both lower = better; `on_front` where no other point beats it. The dense
    model is the method "dense", its ratio 0."""

    method: str
    ratio: float
    cost: float
    ppl: float
    on_front: bool


def priced(points: Sequence[Point], cost: Cost) -> list[Priced]:
    """The points whose runs all measured the cost, and the dense model as the first of them has it."""
    found: list[tuple[str, float, float, float]] = []
    for point in points:
        if measured := mean_of(point, f"pruned/{cost.metric}"):
            found.append((point.method, point.ratio, cost.of(measured), point.value))
    for point in points[:1]:
        measured, ppl = mean_of(point, f"dense/{cost.metric}"), mean_of(point, f"dense/{point.metric}")
        if measured and ppl:
            found.append(("dense", 0.0, cost.of(measured), ppl))
    front = pareto_front([(at, ppl) for _, _, at, ppl in found])
    return [Priced(*one, on_front=k in front) for k, one in enumerate(found)]


def machine(run: Mapping[str, Any]) -> str:
    """What a latency was measured on, from environment.json."""
    cpus = ", ".join(str(run[key]) for key in ("platform", "cpu") if run.get(key))
    where = ", ".join(run.get("gpus") or ()) or f"{cpus}, {run.get('cpus')} CPUs"
    threads = run.get("threads")
    return f"{where}, {threads} thread{'' if threads == 1 else 's'}"


@dataclass(frozen=True)
class Ablation:
    """Main effects on the rise in log perplexity, ln(pruned) - ln(dense)."""

    context: str
    metric: str
    effects: tuple[Effect, ...]
    balanced: bool
    cells: int  # combinations of levels that are there
    possible: int
    seeds: int


def ablation(runs: Sequence[Described], metric: str) -> Ablation | None:
    """Of runs of one context; None where nothing differs between them."""
    known = [one for one in runs if {f"dense/{metric}", f"pruned/{metric}"} <= set(one.run.metrics)]
    if not known:
        return None
    factors = aliases_joined({name: [one.factors[name] for one in known] for name in known[0].factors})
    if not factors:
        return None
    once: dict[tuple[tuple[str, ...], Hashable], list[float]] = {}  # runs that differ in neither are one draw
    for cell, one in zip(zip(*factors.values(), strict=True), known, strict=True):
        rise = math.log(one.run.metrics[f"pruned/{metric}"] / one.run.metrics[f"dense/{metric}"])
        once.setdefault((cell, one.seed), []).append(rise)
    rises = [fmean(same) for same in once.values()]
    cells, seeds = [cell for cell, _ in once], [seed for _, seed in once]
    factors = {name: [cell[k] for cell in cells] for k, name in enumerate(factors)}
    possible = math.prod(len(set(levels)) for levels in factors.values())
    return Ablation(
        known[0].context,
        metric,
        tuple(main_effects(factors, rises, seeds)),
        balanced(cells),
        len(set(cells)),
        possible,
        len(set(seeds)),
    )


def aliases_joined(factors: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Factors with one level left out, and those that always change together as one."""
    found: dict[tuple[int, ...], list[str]] = {}
    for name, levels in factors.items():
        order = list(dict.fromkeys(levels))
        if len(order) > 1:
            found.setdefault(tuple(order.index(level) for level in levels), []).append(name)
    return {
        ", ".join(names): [", ".join(row) for row in zip(*(factors[name] for name in names), strict=True)]
        for names in found.values()
    }


def kept_shares(plan: Plan) -> dict[str, dict[int, float]]:
    """Kind of site -> layer -> share of its units that stays, 0 in a layer that left whole.

    A site's layer is the first number in its name. A kind of which no site is named stays whole, and is left out."""
    kept: dict[str, dict[int, list[int]]] = {}
    gone: set[int] = set()
    for name, site in plan.sites.items():
        layer = next((int(part) for part in name.split(".") if part.isdecimal()), 0)
        counts = kept.setdefault(site.kind, {}).setdefault(layer, [0, 0])
        counts[0] += len(site.kept)
        counts[1] += site.units
        if site.kind == "block" and not site.kept:
            gone.add(layer)
    found = {
        kind: {layer: counts[0] / counts[1] for layer, counts in layers.items() if counts[1]}
        for kind, layers in kept.items()
    }
    inner = {kind: layers for kind, layers in found.items() if kind != "block"}
    for layers in inner.values():
        layers.update(dict.fromkeys(gone, 0.0))
    return inner or found

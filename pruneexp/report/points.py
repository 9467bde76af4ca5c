"""Runs as points: seeds taken together, and the figures that a report draws from them."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from pruneexp.fingerprint import GGUF, differing
from pruneexp.report.folders import SAME, Run
from pruneexp.report.methods import Described, Runs
from pruneexp.report.statistics import Effect, balanced, grouped, interval, main_effects, pareto_front
from pruneexp.report.tables import count
from pruneexp.types import QUERY_HEADS, Plan

SHARE = "sparsity/decoder"
ACCURACY = r"(?!ppl/)(?:.*/)?acc\w*(?:[@/\[].*)?"
PASSES = {"decode": "step of decoding"}  # that decoder layers are timed by
COUNTED_AT = {"macs": ("context",), "bytes": ("context",), "latency": ("context", "batch", "phase")}


@dataclass(frozen=True)
class Removed:
    """The quantity by which runs that stand together are compared: its share's metric, that in words, and why it is not
    the budget's."""

    metric: str
    name: str
    note: str = ""

    @property
    def axis(self) -> str:
        return "share of the decoder's parameters removed, %" if self.metric == SHARE else f"{self.name}, %"


def removed(runs: Runs) -> Removed:
    """The quantity of all the runs' budgets, else the decoder's parameters."""
    flat = [one.run.flat for one in runs]
    of = str(flat[0].get("sparsity.of")) if flat else "decoder"
    keys = ["sparsity.of", *(f"sparsity.{key}" for key in COUNTED_AT.get(of, ()))]
    if differ := [key for key in keys if key in differing(flat)]:
        note = f" The share is of the decoder's parameters, since the runs differ in {differ[0]}."
        return Removed(SHARE, f"share removed ({SHARE})", note)
    metric = f"sparsity/{of}"
    if metric == SHARE or not all(metric in one.run.metrics for one in runs):
        return Removed(SHARE, "share removed")
    return Removed(metric, f"share removed ({metric})")


@dataclass(frozen=True)
class Point:
    """A method at a ratio, its seeds taken together.

    `share`: mean real share removed. `value`: the metric's mean over the `n` seeds, of perplexities exp of the mean
    logarithm; `low`, `high`: its 95 % t-interval, None for one seed. `seeds`: the value of each seed."""

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


def metrics_of(runs: Runs, pattern: str) -> list[str]:
    """Names, without "dense/" or "pruned/", of what some run measured on the pruned model, where the pattern matches
    the whole name."""
    names = {key.removeprefix("pruned/") for one in runs for key in one.run.metrics if key.startswith("pruned/")}
    return sorted(name for name in names if re.fullmatch(pattern, name))


def perplexities(runs: Runs) -> list[str]:
    return metrics_of(runs, "ppl/.*")


def accuracies(runs: Runs) -> list[str]:
    """Means over tasks, then tasks."""
    names = metrics_of(runs, ACCURACY)
    return sorted(names, key=lambda name: (not is_mean(name), name))


def is_mean(accuracy: str) -> bool:
    return re.search(r"/mean\d+(@|$)", accuracy) is not None


def left_out(runs: Runs, what: str, pattern: str) -> list[str]:
    """A line that names the methods whose figures are left out, since they are those of a model that is not
    quantised."""
    measured = [one for one in runs if any(re.fullmatch(f"unquantised/(?:{pattern})", key) for key in one.run.metrics)]
    methods = ", ".join(dict.fromkeys(one.method for one in measured))
    why = "which is that of a model that is not quantised (unquantised/... in metrics.csv)"
    return [f"Left out: {what} of {methods} in transformers, {why}."] if measured else []


def points(runs: Runs, metric: str, share: str = SHARE) -> list[Point]:
    """One a context, method and ratio, in that order; of the runs that measured the metric."""
    measured = [one for one in runs if {f"pruned/{metric}", share} <= set(one.run.metrics)]
    groups = grouped(measured, lambda one: (one.context, one.method, one.ratio))
    scale, back = (math.log, math.exp) if metric.startswith("ppl/") else (float, float)
    drawn = []
    for key, members in sorted(groups.items(), key=lambda item: item[0]):
        values = by_seed([scale(one.run.metrics[f"pruned/{metric}"]) for one in members], [one.seed for one in members])
        mean = interval(values)
        gone = fmean(one.run.metrics[share] for one in members)
        low, high = (None if mean.half is None else back(mean.mean + sign * mean.half) for sign in (-1, 1))
        seeds = tuple(map(back, values))
        drawn.append(Point(*key, metric, gone, back(mean.mean), low, high, seeds, tuple(members)))
    return drawn


def by_seed(values: Sequence[float], seeds: Sequence[Hashable]) -> list[float]:
    """The mean of each seed's values: two runs that differ in their evaluators, say, are one draw and not two."""
    draws = grouped(zip(seeds, values, strict=True), lambda draw: draw[0])
    return [fmean(value for _, value in same) for same in draws.values()]


def dense_name(metric: str) -> str:
    return "dense, quantised" if GGUF in metric else "dense"


def dense(runs: Runs, metric: str) -> list[float]:
    """The dense model's figures, as `distinct` gives them."""
    return distinct([one.run.metrics[f"dense/{metric}"] for one in runs if f"dense/{metric}" in one.run.metrics])


def distinct(values: Sequence[float]) -> list[float]:
    """Ascending, those that are the same up to rounding once."""
    apart: list[float] = []
    for value in sorted(values):
        if not apart or value > apart[-1] * (1 + SAME):
            apart.append(value)
    return apart


def mean_of(point: Point, key: str) -> float | None:
    """Mean of a metric over the point's runs; None where one of them lacks it."""
    known = [one.run.metrics[key] for one in point.runs if key in one.run.metrics]
    return fmean(known) if known and len(known) == len(point.runs) else None


@dataclass(frozen=True)
class Cost:
    """What a front is drawn against: lower is better. `scale`: of the metric's value, or of its inverse."""

    metric: str
    label: str
    inverse: bool
    scale: float

    def of(self, value: float) -> float:
        return self.scale / value if self.inverse else self.scale * value

    @property
    def timed(self) -> bool:
        """Whether it is of the machine that measured it."""
        return self.metric.startswith("latency/")

    @property
    def spread(self) -> str:
        """The metric of its interquartile range over repetitions."""
        name, there, kind = self.metric.partition(GGUF)
        return f"{name}/iqr{there}{kind}"


def costs(runs: Runs, kind: str = "") -> list[Cost]:
    """Measured latency and bytes, as far as the runs have them; with `kind` ("/gguf-q8_0"), latency in llama.cpp."""
    measures = []
    for metric in metrics_of(runs, rf"latency/\w+_tok_s@[^/]+{re.escape(kind)}"):
        stage, _, how = metric.removeprefix("latency/").removesuffix(kind).partition("_tok_s@")
        measures.append(Cost(metric, f"{stage}, ms per token ({how})", True, 1e3))
    for metric in [] if kind else metrics_of(runs, r"latency/decoder_\w+_ms@[^/]+"):
        stage, _, how = metric.removeprefix("latency/decoder_").partition("_ms@")
        measures.append(Cost(metric, f"decoder layers, ms per {PASSES.get(stage, stage)} ({how})", False, 1.0))
    if not kind and metrics_of(runs, "bytes"):
        measures.append(Cost("bytes", "weights, MiB", False, 2**-20))
    return measures


@dataclass(frozen=True)
class Priced:
    """A point of a front: `cost` and `ppl`, both lower = better; `on_front` where no other point beats it. The dense
    model is a method of its own, its ratio 0."""

    method: str
    ratio: float
    cost: float
    ppl: float
    on_front: bool


def priced(points: Sequence[Point], cost: Cost) -> list[Priced]:
    """The points whose runs all measured the cost, and the dense model as the first of them has it."""
    sides = [(p.method, p.ratio, mean_of(p, f"pruned/{cost.metric}"), p.value) for p in points]
    for p in points[:1]:
        at, ppl = (mean_of(p, f"dense/{key}") for key in (cost.metric, p.metric))
        sides += [(dense_name(p.metric), 0.0, at, ppl)] if ppl else []
    known = [(method, ratio, cost.of(value), ppl) for method, ratio, value, ppl in sides if value]
    front = pareto_front([(at, ppl) for _, _, at, ppl in known])
    return [Priced(*one, on_front=k in front) for k, one in enumerate(known)]


def machine(run: Run) -> str:
    """What a run computed on, from environment.json: the machine's GPUs, where it used any."""
    environment = run.environment
    cpus = ", ".join(str(environment[key]) for key in ("platform", "cpu") if environment.get(key))
    gpus = () if str(run.config["model"].get("device")) == "cpu" else environment.get("gpus") or ()
    where = ", ".join(gpus) or f"{cpus}, {environment.get('cpus')} CPUs"
    return f"{where}, {count(environment.get('threads'), 'thread')}"


@dataclass(frozen=True)
class Ablation:
    """Main effects on the rise in log perplexity, ln(pruned) - ln(dense)."""

    metric: str
    effects: tuple[Effect, ...]
    balanced: bool
    cells: int  # combinations of levels that are there
    possible: int
    seeds: int


def ablation(runs: Runs, metric: str) -> Ablation | None:
    """The main effects in runs of one context; None where nothing differs between them."""
    known = [one for one in runs if {f"dense/{metric}", f"pruned/{metric}"} <= set(one.run.metrics)]
    if not known:
        return None
    factors = aliases_joined({name: [one.factors[name] for one in known] for name in known[0].factors})
    if not factors:
        return None
    rises = [math.log(one.run.metrics[f"pruned/{metric}"] / one.run.metrics[f"dense/{metric}"]) for one in known]
    levels = zip(*factors.values(), strict=True)
    draws = list(zip(levels, (one.seed for one in known), strict=True))  # runs that differ in neither are one
    cells, seeds = zip(*dict.fromkeys(draws), strict=True)
    factors = {name: [cell[k] for cell in cells] for k, name in enumerate(factors)}
    effects = main_effects(factors, by_seed(rises, draws), seeds)
    possible = math.prod(len(set(levels)) for levels in factors.values())
    return Ablation(metric, tuple(effects), balanced(cells), len(set(cells)), possible, len(set(seeds)))


def aliases_joined(factors: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Factors with one level left out, and those that always change together as one."""
    varied = [name for name, levels in factors.items() if len(set(levels)) > 1]
    return {
        ", ".join(names): [", ".join(row) for row in zip(*(factors[name] for name in names), strict=True)]
        for names in grouped(varied, lambda name: tuple(map(factors[name].index, factors[name]))).values()
    }


def kept_shares(plan: Plan) -> dict[str, dict[int, float]]:
    """Kind of site -> layer -> share of its units that stays, 0 in a layer that left whole.

    A site's layer is the first number in its name. A kind of which no site is named stays whole, and is left out."""
    layers = {name: next((int(part) for part in name.split(".") if part.isdecimal()), 0) for name in plan.sites}
    shares: dict[str, dict[int, float]] = {}
    fewer_heads = any(site.kept_query_heads is not None for site in plan.sites.values())
    for (kind, layer), names in grouped(layers, lambda name: (plan.sites[name].kind, layers[name])).items():
        sites = [plan.sites[name] for name in names]
        units = sum(site.units for site in sites)
        of_kind = shares.setdefault(kind, {})
        if units:
            of_kind[layer] = sum(len(site.kept) for site in sites) / units
        if fewer_heads and kind == "attention":
            kept = [len(site.kept_query_heads or ()) / (site.query_heads or 1) or of_kind[layer] for site in sites]
            shares.setdefault(QUERY_HEADS, {})[layer] = sum(kept) / len(kept)
    gone = {layers[name]: 0.0 for name, site in plan.sites.items() if site.kind == "block" and not site.kept}
    return {kind: share | gone for kind, share in shares.items() if kind != "block"} or shares

"""Pruned, quantised, or both: perplexity and accuracy against the bytes of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pruneexp.fingerprint import GGUF
from pruneexp.report import figures
from pruneexp.report.against_share import by_context, file_name, named
from pruneexp.report.figures import FAINT, WHOLE, Looks, Picture, Style
from pruneexp.report.methods import Runs
from pruneexp.report.page import Section
from pruneexp.report.points import accuracies, dense, is_mean, mean_of, metrics_of, perplexities, points
from pruneexp.report.statistics import grouped
from pruneexp.report.tables import Table, number, ratio, table


@dataclass(frozen=True)
class Sized:
    """A method at a ratio: MiB of its weights, bits a parameter where they are quantised, and what was measured."""

    method: str
    ratio: float
    size: float
    bits: float | None
    value: float


def bytes_section(runs: Runs, looks: Looks) -> Section | None:
    """The section of reports with quantised runs: a picture for every model, metric and engine, since figures of two
    engines do not compare."""
    if not metrics_of(runs, "bits/param(/.*)?"):
        return None
    tables, pictures = [], []
    for context, short, members in by_context(runs):
        accuracy = accuracies(members)
        metrics = perplexities(members) + ([one for one in accuracy if is_mean(one)] or accuracy)
        for (metric, engine), kinds in grouped(metrics, _protocol).items():
            shown = [one for kind in kinds for one in sized(members, kind)]
            if len(shown) < 2:
                continue
            name = file_name("bytes", metric, *([engine] if engine else []), *short)
            label = f"{metric} in {engine}" if engine else metric
            before = [] if engine else dense(members, metric)
            pictures.append(named(context, short, bytes_figure(name, label, shown, before, looks)))
            tables.append(_table(name, label, shown))
    line = (
        "Ratio 0 is what is quantised alone (filled marks). Sizes are of the weights as they would lie on a disk, "
        "scales included. Figures of two engines do not compare, and have a picture each."
    )
    return Section("bytes", "Prune or quantise", (line,), tables, pictures) if pictures else None


def _protocol(metric: str) -> tuple[str, str]:
    name, there, _ = metric.partition(GGUF)
    return name, "llama.cpp" if there else ""


def sized(runs: Runs, metric: str) -> list[Sized]:
    """The points that have a size for the metric."""
    _, there, kind = metric.partition(GGUF)
    suffix = there + kind
    marks = []
    for point in points(runs, metric):
        size, bits = (mean_of(point, f"pruned/{key}{suffix}") for key in ("bytes", "bits/param"))
        if size is not None:
            marks.append(Sized(point.method, point.ratio, size / 2**20, bits, point.value))
    return marks


def bytes_figure(name: str, metric: str, shown: Sequence[Sized], before: Sequence[float], looks: Looks) -> Picture:
    """A line a method, from the largest model to the smallest; filled where nothing is pruned."""
    methods = grouped(shown, lambda one: one.method)
    figure, axes = figures.new_figure(2.9, figures.legend_rows([*methods, *(["dense"] if before else [])]))
    for k, value in enumerate(before):
        axes.axhline(value, label=None if k else "dense", color=FAINT, linewidth=1, linestyle=(0, (3, 3)))
    for method, of_method in methods.items():
        line, style = sorted(of_method, key=lambda one: one.size), looks[method]
        plain: Style = style | {"marker": None, "linewidth": 1.2}
        axes.plot([one.size for one in line], [one.value for one in line], **plain)
        mark: Style = {**style, "linestyle": "none", "markersize": 7, "label": method}
        for whole, here in sorted(grouped(line, lambda one: not one.ratio).items()):
            face = style["color"] if whole else "none"
            axes.plot([one.size for one in here], [one.value for one in here], markerfacecolor=face, **mark, **WHOLE)
            mark["label"] = None
    if metric.startswith("ppl/"):
        figures.log_scale(axes, [*before, *(one.value for one in shown)])
    axes.set_xlim(left=0)
    figures.finish(figure, axes, "weights, MiB", metric)
    in_words = "; ".join(f"{one.method} {one.ratio:g} ({one.size:.4g} MiB, {one.value:.4g})" for one in shown)
    return Picture(name, f"{metric} against the size of the weights. Filled: nothing is pruned.", in_words, figure)


def _table(name: str, metric: str, shown: Sequence[Sized]) -> Table:
    columns: dict[str, Callable[[Sized], Any]] = {
        "method": lambda one: one.method,
        "ratio asked": lambda one: ratio(one.ratio),
        "weights, MiB": lambda one: one.size,
        "bits a parameter": lambda one: one.bits,
        metric: lambda one: number(one.value, "" if metric.startswith("ppl/") else "accuracy"),
    }
    return table(name, f"{metric} against size", sorted(shown, key=lambda one: -one.size), columns)

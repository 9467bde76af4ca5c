"""The figure of a perplexity or an accuracy against the share removed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pruneexp.report import figures
from pruneexp.report.comparison import Comparison
from pruneexp.report.figures import FAINT, INK, WHOLE, Looks, Picture, Style
from pruneexp.report.methods import Runs
from pruneexp.report.points import Point, Removed, dense_name
from pruneexp.report.statistics import grouped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENOUGH = 3  # seeds from which on an interval is drawn, and no longer each of them


def share_figure(
    name: str,
    metric: str,
    share: Removed,
    points: Sequence[Point],
    dense: Sequence[float],
    beside: tuple[Runs, Sequence[Comparison]],
    looks: Looks,
) -> Picture:
    """A perplexity or accuracy against the real share removed, a line a method, with its seeds or their 95 %
    t-interval. `beside`: runs of one config with different results, and published figures, are marks on their own."""
    conflicting, published = beside
    methods = grouped(points, lambda point: point.method)
    others = {
        "published, at its nominal ratio": published,
        dense_name(metric): dense,
        "same config, another result": conflicting,
    }
    figure, axes = figures.new_figure(
        2.9, figures.legend_rows([*methods, *(label for label, there in others.items() if there)])
    )
    for k, value in enumerate(dense):
        axes.axhline(value, label=None if k else dense_name(metric), color=FAINT, linewidth=1, linestyle=(0, (3, 3)))
    for method, line in methods.items():
        _line(axes, method, sorted(line, key=lambda point: point.share), looks[method])
    odd = [(100 * one.run.metrics[share.metric], one.run.metrics[f"pruned/{metric}"]) for one in conflicting]
    if odd:
        axes.plot(*zip(*odd, strict=True), "x", color=INK, markersize=7, label="same config, another result", **WHOLE)
    theirs = [one.published.value / (100 if one.published.unit == "percent" else 1) for one in published]
    for k, (one, value) in enumerate(zip(published, theirs, strict=True)):
        # Below our marks, which it mostly surrounds, and in their colour.
        look: Style = {"linestyle": "none", "marker": "*", "markersize": 13, "markerfacecolor": "none"} | WHOLE
        look |= {"color": looks[one.method]["color"] if one.method in looks else INK, "zorder": 2.9}
        label = None if k else "published, at its nominal ratio"
        axes.plot([100 * one.published.ratio], [value], label=label, **look)
    seeds = [value for point in points for value in _seeds(point)]
    marks = [*dense, *(point.value for point in points), *seeds, *(value for _, value in odd), *theirs]
    if metric.startswith("ppl/"):
        figures.log_scale(axes, marks)
    cut = _scaled_by(axes, marks, [bound for point in points for bound in _bar(point)])
    axes.set_xlim(left=0)
    figures.finish(figure, axes, share.axis, metric, grid="y")
    in_words = "; ".join(f"{p.method} {100 * p.share:.1f} %: {p.value:.4g}" for p in points)
    return Picture(
        name, f"{metric} against the {share.name}, {_caption(metric, points, cut)}.{share.note}", in_words, figure
    )


def _line(axes: Axes, label: str, line: Sequence[Point], look: Style) -> None:
    x, y = [100 * point.share for point in line], [point.value for point in line]
    axes.plot(x, y, label=label, markersize=6, linewidth=1.6, **look, **WHOLE)
    for point in line:
        x, seeds, bar = 100 * point.share, _seeds(point), _bar(point)
        small = {"color": look["color"], "marker": look["marker"], "markersize": 3, "alpha": 0.7} | WHOLE
        axes.plot([x] * len(seeds), seeds, linestyle="none", **small)
        axes.plot([x] * len(bar), bar, color=look["color"], marker="_", markersize=7, linewidth=1.2)


def _seeds(point: Point) -> Sequence[float]:
    """The seeds that are drawn as marks: only where they are few."""
    return point.seeds if 1 < point.n < ENOUGH else ()


def _bar(point: Point) -> Sequence[float]:
    """The ends of the interval, where it is drawn: of two seeds it would span whole decades and say nothing else."""
    return () if point.low is None or point.high is None or point.n < ENOUGH else (point.low, point.high)


def _scaled_by(axes: Axes, marks: Sequence[float], bars: Sequence[float]) -> bool:
    """Fits the axis to the marks. Bars may lengthen it by a quarter at each end; gives whether any is cut there."""
    scale, back = (math.log, math.exp) if axes.get_yscale() == "log" else (float, float)
    low, high = scale(min(marks)), scale(max(marks))
    room = (high - low) / 4
    if not room:
        return False
    ends = [scale(bar) for bar in bars]
    bottom, top = max(min([low, *ends]), low - room), min(max([high, *ends]), high + room)
    axes.set_ylim(back(bottom - room / 5), back(top + room / 5))
    return min([bottom, *ends]) < bottom or max([top, *ends]) > top


def _caption(metric: str, points: Sequence[Point], cut: bool) -> str:
    seeds = sorted({point.n for point in points})
    mean = "mean log perplexity" if metric.startswith("ppl/") else "mean"
    parts = [f"{' or '.join(map(str, seeds))} seed{'s' if seeds != [1] else ''} a point"] if seeds else []
    parts += ["small marks are the seeds"] if any(map(_seeds, points)) else []
    parts += [f"bars are 95 % t-intervals of the {mean}"] if any(map(_bar, points)) else []
    return "; ".join(parts + ["bars cut by the frame are longer"] * cut)

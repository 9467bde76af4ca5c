"""Perplexity and accuracy against the share removed: the sections of a report that come first."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from pruneexp.report.comparison import Comparison
from pruneexp.report.figures import Looks, Picture
from pruneexp.report.methods import Runs
from pruneexp.report.page import Section
from pruneexp.report.points import (
    ACCURACY,
    Point,
    Removed,
    accuracies,
    dense,
    is_mean,
    left_out,
    perplexities,
    points,
    removed,
)
from pruneexp.report.share_figure import share_figure
from pruneexp.report.statistics import grouped
from pruneexp.report.tables import Table, number, ratio, table

FEW = 3  # figures of a list that are written out


def file_name(*parts: str) -> str:
    """A file name and HTML identifier."""
    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(parts)).strip("-")


def by_context(runs: Runs) -> Iterator[tuple[str, tuple[str, ...], Runs]]:
    """Every context with its runs and, where there are several, a short name of it for files."""
    contexts = grouped(runs, lambda run: run.context)
    for k, (context, members) in enumerate(contexts.items(), 1):
        yield context, (f"model{k}",) if len(contexts) > 1 else (), members


def named(context: str, short: tuple[str, ...], picture: Picture) -> Picture:
    """The picture, its caption with the model where a report has several."""
    return replace(picture, caption=f"{context}: {picture.caption}") if short else picture


def perplexity_section(runs: Runs, conflicting: Runs, compared: Sequence[Comparison], looks: Looks) -> Section | None:
    section = _section("perplexity", perplexities([*runs, *conflicting]), runs, conflicting, compared, looks)
    lines = [*section.lines, *left_out(runs, "perplexity", "ppl/.*")]
    return replace(section, lines=lines) if section.pictures else None


def accuracy_section(runs: Runs, conflicting: Runs, compared: Sequence[Comparison], looks: Looks) -> Section | None:
    """Means over tasks are drawn (single tasks where there are none), and every task is in a table."""
    metrics = accuracies([*runs, *conflicting])
    if not metrics:
        return None
    means = [metric for metric in metrics if is_mean(metric)]
    section = _section("accuracy", means or metrics, runs, conflicting, compared, looks)
    tables = [*section.tables, _tasks_table(runs, metrics)] if means and runs else section.tables
    lines = [*section.lines, *_few_items(means or metrics), *left_out(runs, "accuracy", ACCURACY)]
    return replace(section, lines=lines, tables=tables)


def _few_items(metrics: Sequence[str]) -> list[str]:
    """Lines that say how far chance moves accuracies of few items, whose names say how many: by two standard errors,
    each at most 1 / (2 sqrt(n))."""
    sizes = {metric: int(match[1]) for metric in metrics if (match := re.search(r"\[(\d+)\]$", metric))}
    return [
        f"{', '.join(names)}: {items} items, whose draw alone moves an accuracy by up to "
        f"{1 / math.sqrt(items):.2f} (two standard errors)."
        for items, names in grouped(sizes, lambda metric: sizes[metric]).items()
    ]


def _tasks_table(runs: Runs, metrics: Sequence[str]) -> Table:
    """Every accuracy of every method at a ratio, and of the dense models."""
    values = {metric: {(p.context, p.method, p.ratio): p.value for p in points(runs, metric)} for metric in metrics}
    pruned = sorted({row for of_metric in values.values() for row in of_metric})
    unpruned: list[tuple[str, str, float]] = []
    for context, _, members in by_context(runs):
        unpruned.append((context, "dense", 0.0))
        for metric in metrics:
            if len(before := dense(members, metric)) == 1:
                values[metric][unpruned[-1]] = before[0]
    columns: dict[str, Callable[[tuple[str, str, float]], Any]] = {
        "model": lambda row: row[0],
        "method": lambda row: row[1],
        "ratio asked": lambda row: ratio(row[2]),
    }
    for metric in metrics:
        columns[metric] = lambda row, metric=metric: number(values[metric].get(row), "accuracy")
    rows = sorted([*unpruned, *pruned], key=lambda row: row[0])
    return table("accuracy_tasks", "Accuracy on every task, mean over seeds", rows, columns)


def _section(
    anchor: str, metrics: Sequence[str], runs: Runs, conflicting: Runs, compared: Sequence[Comparison], looks: Looks
) -> Section:
    """A figure for every metric and model, and a table for every metric; files are named after `anchor`."""
    lines, tables, pictures = [], [], []
    names = {f"pruned/{metric}" for metric in metrics}
    share = removed([one for one in (*runs, *conflicting) if names.intersection(one.run.metrics)])
    for metric in metrics:
        drawn = points(runs, metric, share.metric)
        measured = [one for one in conflicting if {f"pruned/{metric}", share.metric} <= set(one.run.metrics)]
        published = [one for one in compared if one.published.metric == metric and one.published.ratio]
        for context, short, members in by_context([*runs, *conflicting]):
            here = [point for point in drawn if point.context == context]
            odd = [one for one in measured if one.context == context]
            if not here and not odd:
                continue
            theirs = [one for one in published if one.runs[0].context == context]
            before = dense(members, metric)
            name = file_name(anchor, metric, *short)
            pictures.append(
                named(context, short, share_figure(name, metric, share, here, before, (odd, theirs), looks))
            )
            if len(before) > 1:
                values = ", ".join(f"{value:.6g}" for value in before[:FEW])
                more = f" and {len(before) - FEW} more" if len(before) > FEW else ""
                lines.append(
                    f"{context}: the dense model's {metric} is not one figure but {values}{more}: other texts, "
                    "numeric precision or machines are mixed here."
                )
        if drawn:
            tables.append(_points_table(file_name(anchor, metric), metric, share, drawn))
    return Section(anchor, f"{anchor.capitalize()} and share removed", lines, tables, pictures)


def _points_table(name: str, metric: str, share: Removed, drawn: Sequence[Point]) -> Table:
    mean, unit = ("exp of the mean log perplexity", "") if metric.startswith("ppl/") else ("mean accuracy", "accuracy")
    columns: dict[str, Callable[[Point], Any]] = {
        "model": lambda point: point.context,
        "method": lambda point: point.method,
        "ratio asked": lambda point: ratio(point.ratio),
        share.name: lambda point: number(point.share, "share"),
        metric: lambda point: number(point.value, unit),
    }
    title = f"{metric}: {mean} over seeds"
    if any(point.n > 1 for point in drawn):  # one seed has no interval
        columns |= {"95 % from": lambda point: number(point.low, unit), "to": lambda point: number(point.high, unit)}
        title += ", with its t-interval"
    return table(name, title, drawn, {**columns, "seeds": lambda point: point.n})

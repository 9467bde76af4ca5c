"""Perplexity and accuracy against the share removed: the sections of a report that come first."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pruneexp.report.comparison import Comparison
from pruneexp.report.figures import Picture, Style
from pruneexp.report.methods import Described
from pruneexp.report.page import Section
from pruneexp.report.points import SHARE, Point, accuracies, dense, is_mean, perplexities, points
from pruneexp.report.share_figure import share_figure
from pruneexp.report.tables import Table, number, ratio, table

FEW = 3  # figures of a list that are written out


def file_name(*parts: str) -> str:
    """A file name and HTML identifier."""
    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(parts)).strip("-")


def only_of(runs: Sequence[Described], context: str) -> tuple[str, ...]:
    """A short name for the context, where a report has several."""
    contexts = list(dict.fromkeys(one.context for one in runs))
    return (f"model{contexts.index(context) + 1}",) if len(contexts) > 1 else ()


def named(context: str, only: tuple[str, ...], picture: Picture) -> Picture:
    """The picture, its caption with the model where a report has several."""
    return replace(picture, caption=f"{context}: {picture.caption}") if only else picture


def perplexity_section(
    runs: Sequence[Described],
    conflicting: Sequence[Described],
    compared: Sequence[Comparison],
    looks: Mapping[str, Style],
) -> Section | None:
    drawn = _drawn("perplexity", perplexities([*runs, *conflicting]), runs, conflicting, compared, looks)
    return replace(drawn, title="Perplexity and share removed") if drawn.pictures else None


def accuracy_section(
    runs: Sequence[Described],
    conflicting: Sequence[Described],
    compared: Sequence[Comparison],
    looks: Mapping[str, Style],
) -> Section | None:
    """Means over tasks are drawn (single tasks where there are none), and every task is in a table."""
    everyone = [*runs, *conflicting]
    metrics = accuracies(everyone)
    if not metrics:
        return None
    means = [metric for metric in metrics if is_mean(metric)]
    drawn = _drawn("accuracy", means or metrics, runs, conflicting, compared, looks)
    lines = [*drawn.lines, *_few_items(means or metrics)]
    tables = [*drawn.tables, _tasks_table(runs, metrics)] if means and runs else drawn.tables
    return replace(drawn, title="Accuracy and share removed", lines=tuple(lines), tables=tuple(tables))


def _few_items(metrics: Sequence[str]) -> list[str]:
    """How far chance moves accuracies of so few items that their names say how many: two standard errors, each at most
    1 / (2 sqrt(n))."""
    by_items: dict[int, list[str]] = {}
    for metric in metrics:
        if match := re.search(r"\[(\d+)\]$", metric):
            by_items.setdefault(int(match[1]), []).append(metric)
    return [
        f"{', '.join(names)}: {items} items, whose draw alone moves an accuracy by up to "
        f"{1 / math.sqrt(items):.2f} (two standard errors)."
        for items, names in by_items.items()
    ]


def _tasks_table(runs: Sequence[Described], metrics: Sequence[str]) -> Table:
    """Every accuracy of every method at a ratio, and of the dense models."""
    found = {metric: {(p.context, p.method, p.ratio): p.value for p in points(runs, metric)} for metric in metrics}
    before: list[tuple[str, str, float]] = []
    for context in dict.fromkeys(one.context for one in runs):
        before.append((context, "dense", 0.0))
        for metric in metrics:
            values = dense([one for one in runs if one.context == context], metric)
            found[metric] |= {before[-1]: values[0]} if len(values) == 1 else {}
    after = sorted({key for values in found.values() for key in values} - set(before))
    columns: dict[str, Callable[[tuple[str, str, float]], Any]] = {
        "model": lambda key: key[0],
        "method": lambda key: key[1],
        "ratio asked": lambda key: ratio(key[2]),
    }
    for metric in metrics:
        columns[metric] = lambda key, metric=metric: number(found[metric].get(key), "accuracy")
    rows = sorted([*before, *after], key=lambda key: key[0])
    return table("accuracy_tasks", "Accuracy on every task, mean over seeds", rows, columns)


def _drawn(
    anchor: str,
    metrics: Sequence[str],
    runs: Sequence[Described],
    conflicting: Sequence[Described],
    compared: Sequence[Comparison],
    looks: Mapping[str, Style],
) -> Section:
    """A figure for every metric and model, and a table for every metric; files are named after `anchor`."""
    lines, tables, pictures = [], [], []
    everyone = [*runs, *conflicting]
    for metric in metrics:
        found = points(runs, metric)
        for context in dict.fromkeys(one.context for one in everyone):
            here = [point for point in found if point.context == context]
            members = [one for one in everyone if one.context == context]
            measured = [one for one in conflicting if {f"pruned/{metric}", SHARE} <= set(one.run.metrics)]
            odd = [one for one in measured if one.context == context]
            if not here and not odd:
                continue
            theirs = [
                one
                for one in compared
                if one.published.metric == metric and one.published.ratio and one.runs[0].context == context
            ]
            only = only_of(everyone, context)
            before = dense(members, metric)
            name = file_name(anchor, metric, *only)
            pictures.append(named(context, only, share_figure(name, metric, here, before, odd, theirs, looks)))
            if len(before) > 1:
                lines.append(
                    f"{context}: the dense model's {metric} is not one figure but {_list(before)}: other texts, "
                    "numeric precision or machines are mixed here."
                )
        if found:
            tables.append(_points_table(file_name(anchor, metric), metric, found))
    return Section(anchor, anchor, tuple(lines), tuple(tables), tuple(pictures))


def _list(values: Sequence[float]) -> str:
    shown = [f"{value:.6g}" for value in values[:FEW]]
    return ", ".join(shown) + (f" and {len(values) - FEW} more" if len(values) > FEW else "")


def _points_table(name: str, metric: str, found: Sequence[Point]) -> Table:
    mean, unit = ("exp of the mean log perplexity", "") if metric.startswith("ppl/") else ("mean accuracy", "accuracy")
    columns: dict[str, Callable[[Point], Any]] = {
        "model": lambda point: point.context,
        "method": lambda point: point.method,
        "ratio asked": lambda point: ratio(point.ratio),
        "share removed": lambda point: number(point.share, "share"),
        metric: lambda point: number(point.value, unit),
    }
    title = f"{metric}: {mean} over seeds"
    if any(point.n > 1 for point in found):  # one seed has no interval
        columns |= {"95 % from": lambda point: number(point.low, unit), "to": lambda point: number(point.high, unit)}
        title += ", with its t-interval"
    return table(name, title, found, {**columns, "seeds": lambda point: point.n})

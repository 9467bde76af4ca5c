"""The sections of a report that hold figures: what is drawn and tabled for each model and metric."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pruneexp.pages.comparison import NOT_STATED, Aspect, Comparison, unpublished
from pruneexp.pages.figures import (
    Picture,
    Style,
    effects_figure,
    pareto_figure,
    perplexity_figure,
    widths_figure,
)
from pruneexp.pages.methods import Described
from pruneexp.pages.page import Section
from pruneexp.pages.points import (
    SHARE,
    Ablation,
    Cost,
    Point,
    Priced,
    ablation,
    costs,
    dense,
    kept_shares,
    machine,
    perplexities,
    points,
    priced,
)
from pruneexp.pages.tables import Cell, Table, count, number, ratio
from pruneexp.published import Table as PublishedTable

FEW = 3  # figures of a list that are written out


def _name(*parts: str) -> str:
    """A file name and HTML identifier."""
    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(parts)).strip("-")


def _only(runs: Sequence[Described], context: str) -> tuple[str, ...]:
    """A short name for the context, where a report has several."""
    contexts = list(dict.fromkeys(one.context for one in runs))
    return (f"model{contexts.index(context) + 1}",) if len(contexts) > 1 else ()


def _of(context: str, only: tuple[str, ...], picture: Picture) -> Picture:
    """The picture, its caption with the model where a report has several."""
    return replace(picture, caption=f"{context}: {picture.caption}") if only else picture


def perplexity_section(
    runs: Sequence[Described],
    conflicting: Sequence[Described],
    compared: Sequence[Comparison],
    looks: Mapping[str, Style],
) -> Section:
    lines, tables, pictures = [], [], []
    everyone = [*runs, *conflicting]
    for metric in perplexities(everyone):
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
            only = _only(everyone, context)
            before = dense(members, metric)
            name = _name("perplexity", metric, *only)
            pictures.append(_of(context, only, perplexity_figure(name, metric, here, before, odd, theirs, looks)))
            if len(before) > 1:
                lines.append(
                    f"{context}: the dense model's {metric} is not one figure but {_list(before)}: other texts, "
                    "numeric precision or machines are mixed here."
                )
        if found:
            tables.append(_points_table(_name("perplexity", metric), found))
    if not pictures:
        lines.append("No run measured a perplexity.")
    return Section("perplexity", "Perplexity and share removed", tuple(lines), tuple(tables), tuple(pictures))


def _list(values: Sequence[float]) -> str:
    shown = [f"{value:.6g}" for value in values[:FEW]]
    return ", ".join(shown) + (f" and {len(values) - FEW} more" if len(values) > FEW else "")


def _points_table(name: str, found: Sequence[Point]) -> Table:
    head = ("model", "method", "ratio asked", "share removed", found[0].metric, "95 % from", "to", "seeds")
    rows = tuple(
        (
            Cell(point.context),
            Cell(point.method),
            ratio(point.ratio),
            number(point.share, "share"),
            number(point.ppl),
            number(point.low),
            number(point.high),
            number(point.n),
        )
        for point in found
    )
    title = f"{found[0].metric}: exp of the mean log perplexity over seeds, with its t-interval"
    return Table(name, title, head, rows)


def pareto_section(runs: Sequence[Described], looks: Mapping[str, Style]) -> Section | None:
    tables, pictures = [], []
    for context in dict.fromkeys(one.context for one in runs):
        only = _only(runs, context)
        members = [one for one in runs if one.context == context]
        places = list(dict.fromkeys(machine(one.run.environment) for one in members))
        for metric in perplexities(members):
            for cost in costs(members):
                # A latency is of its machine; bytes are the same everywhere.
                for k, place in enumerate(places if cost.inverse else [""]):
                    here = [one for one in members if not place or machine(one.run.environment) == place]
                    several = (f"machine{k + 1}",) if place and len(places) > 1 else ()
                    name = _name("pareto", metric, cost.metric, *only, *several)
                    found = priced(points(here, metric), cost)
                    if len(found) > 1:
                        where = ", ".join([*([context] if only else []), *([place] if several else [])])
                        pictures.append(_of(context, only, pareto_figure(name, metric, cost, found, looks)))
                        tables.append(_priced_table(name, metric, cost, found, where))
    if not pictures:
        return None
    return Section("pareto", "Perplexity against latency and bytes", (), tuple(tables), tuple(pictures))


def _priced_table(name: str, metric: str, cost: Cost, found: Sequence[Priced], where: str) -> Table:
    rows = tuple(
        (
            Cell(one.method),
            ratio(one.ratio),
            number(one.cost),
            number(one.ppl),
            Cell("yes" if one.on_front else ""),
        )
        for one in sorted(found, key=lambda one: one.cost)
    )
    title = f"{metric} against {cost.label}" + (f" ({where})" if where else "")
    return Table(name, title, ("method", "ratio asked", cost.label, metric, "on the front"), rows)


def widths_section(runs: Sequence[Described]) -> Section | None:
    pictures = []
    for context in dict.fromkeys(one.context for one in runs):
        rows: dict[str, list[Described]] = {}
        for one in runs:
            if one.context == context:
                rows.setdefault(f"{one.method}, {one.ratio:g}", []).append(one)
        kinds = sorted({kind for one in runs for kind in kept_shares(one.run.plan)})
        for kind in kinds:
            only = _only(runs, context)
            picture = widths_figure(_name("widths", kind, *only), kind, list(rows.items()))
            pictures += [_of(context, only, picture)] if picture is not None else []
    lines = ("Share of its units that each layer keeps, mean over seeds; a row is a method and the ratio asked.",)
    return Section("widths", "Kept widths", lines, (), tuple(pictures)) if pictures else None


def effects_section(runs: Sequence[Described]) -> Section | None:
    lines, tables, pictures = [], [], []
    for context in dict.fromkeys(one.context for one in runs):
        members = [one for one in runs if one.context == context]
        for metric in perplexities(members):
            found = ablation(members, metric)
            if found is not None:
                only = _only(runs, context)
                name = _name("effects", metric, *only)
                lines.append(_design(found))
                tables.append(_effects_table(name, found))
                pictures.append(_of(context, only, effects_figure(name, found)))
    if not pictures:
        return None
    return Section("effects", "Main effects", tuple(lines), tuple(tables), tuple(pictures))


def _design(found: Ablation) -> str:
    seeds = f", {count(found.seeds, 'seed')}"
    if found.balanced:
        return f"{found.context}, {found.metric}: balanced, all {found.possible} combinations of levels alike{seeds}."
    return (
        f"{found.context}, {found.metric}: unbalanced, {found.cells} of {found.possible} combinations of levels, not "
        f"all equally often{seeds}: a level's mean holds what the other factors happened to be there."
    )


def _effects_table(name: str, found: Ablation) -> Table:
    head = ("factor", "level", "runs", "mean rise", "standard deviation", "effect", "95 % over seeds, ±")
    rows = tuple(
        (
            Cell(effect.factor),
            Cell(effect.level),
            number(effect.n),
            number(effect.mean),
            number(effect.spread),
            number(effect.effect),
            number(effect.half),
        )
        for effect in found.effects
    )
    title = f"Rise in ln {found.metric} over the dense model by level; effect: its mean less that of all runs"
    return Table(name, title, head, rows)


def published_section(
    runs: Sequence[Described], compared: Sequence[Comparison], tables: Sequence[PublishedTable]
) -> Section:
    lines = list(unpublished(runs, tables))
    if not compared:
        lines.append("None of these runs has the model, method, ratio and metric of a published figure.")
        return Section("published", "Beside published figures", tuple(lines))
    lines.append(
        "Published figures (marked) are the papers' own; the tolerance is this project's. Where protocols differ, a "
        "figure within it proves less, and one outside it need not be a mistake."
    )
    rows = []
    for k, one in enumerate(compared):
        figure, distance = one.published, one.ours.mean - one.published.value
        rows.append(
            (
                number(k + 1),
                Cell(figure.model),
                Cell(figure.metric),
                ratio(figure.ratio),
                Cell(one.method),
                number(one.ours.mean),
                number(one.ours.half),
                number(one.ours.n),
                Cell(f"{figure.value:g}", figure.value, "published"),
                Cell(figure.method, mark="published"),
                number(distance),
                number(figure.tolerance),
                Cell("within" if one.within else "outside", mark="" if one.within else "flag"),
                number(one.share, "share"),
                Cell(f"arXiv {figure.source.arxiv}, {figure.source.table}", mark="published"),
            )
        )
    head = ("no.", "model", "metric", "ratio", "our method", "ours", "95 %, ±", "seeds", "published", "their method")
    head += ("difference", "tolerance", "verdict", "our share removed", "source")
    table = Table("published", "Ours and the published figure, in its unit", head, tuple(rows))
    # Papers share most of a protocol: each part of one is told once, with the rows above that have it.
    rows_of: dict[Aspect, list[str]] = {}
    for k, one in enumerate(compared):
        for aspect in one.aspects:
            rows_of.setdefault(aspect, []).append(str(k + 1))
    order = list(dict.fromkeys(aspect.what for aspect in rows_of))
    protocols = Table(
        "protocols",
        "Protocols, theirs and ours",
        ("what", "published", "ours", "alike", "of no."),
        tuple(
            (
                Cell(aspect.what),
                Cell(aspect.published, mark="" if aspect.published == NOT_STATED else "published"),
                Cell(aspect.ours),
                Cell({True: "differs", False: "yes", None: ""}[aspect.differs], mark="flag" if aspect.differs else ""),
                Cell(", ".join(numbers)),
            )
            for aspect, numbers in sorted(rows_of.items(), key=lambda item: order.index(item[0].what))
        ),
    )
    return Section("published", "Beside published figures", tuple(lines), (table, protocols))

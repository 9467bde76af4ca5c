"""The other sections of a report that hold figures: what is drawn and tabled for each model and metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pruneexp.report.against_share import file_name, named, only_of
from pruneexp.report.comparison import NOT_STATED, Aspect, Comparison
from pruneexp.report.figures import Style, effects_figure, pareto_figure, widths_figure
from pruneexp.report.methods import Described
from pruneexp.report.page import Section
from pruneexp.report.points import (
    SHARE,
    Ablation,
    Cost,
    Priced,
    ablation,
    costs,
    kept_shares,
    machine,
    perplexities,
    points,
    priced,
)
from pruneexp.report.published import Source
from pruneexp.report.statistics import Effect
from pruneexp.report.tables import Cell, Table, count, number, ratio, table

UNEQUAL = 0.01  # difference of shares removed at one ratio that is told


def pareto_section(runs: Sequence[Described], looks: Mapping[str, Style]) -> Section | None:
    lines, tables, pictures = [], [], []
    for context in dict.fromkeys(one.context for one in runs):
        only = only_of(runs, context)
        members = [one for one in runs if one.context == context]
        places = list(dict.fromkeys(machine(one.run.environment) for one in members))
        for metric in perplexities(members):
            for cost in costs(members):
                # A latency is of its machine; bytes are the same everywhere.
                for k, place in enumerate(places if cost.inverse else [""]):
                    here = [one for one in members if not place or machine(one.run.environment) == place]
                    several = (f"machine{k + 1}",) if place and len(places) > 1 else ()
                    name = file_name("pareto", metric, cost.metric, *only, *several)
                    found = priced(points(here, metric), cost)
                    if len(found) > 1:
                        where = ", ".join([*([context] if only else []), *([place] if several else [])])
                        pictures.append(named(context, only, pareto_figure(name, metric, cost, found, looks)))
                        tables.append(_priced_table(name, metric, cost, found, where))
        if perplexities(members):
            lines += _noise(context, members)
    if not pictures:
        return None
    return Section("pareto", "Perplexity against latency and bytes", tuple(lines), tuple(tables), tuple(pictures))


def _noise(context: str, runs: Sequence[Described]) -> list[str]:
    """How far apart the repetitions of a latency lie: what is nearer to each other is in no order."""
    found = []
    for cost in costs(runs):
        keys = [f"{side}/{cost.metric}" for side in ("dense", "pruned")]
        both = [(one.run.metrics.get(f"{key}/iqr"), one.run.metrics.get(key)) for one in runs for key in keys]
        ranges = [width / value for width, value in both if width is not None and value]
        found += [f"{100 * max(ranges):.0f} % of {cost.label}"] if ranges else []
    if not found:
        return []
    return [
        f"{context}: the interquartile range over repetitions is at most {', '.join(found)}; points that are nearer to "
        "each other than that are not in order."
    ]


def _priced_table(name: str, metric: str, cost: Cost, found: Sequence[Priced], where: str) -> Table:
    columns: dict[str, Callable[[Priced], Any]] = {
        "method": lambda one: one.method,
        "ratio asked": lambda one: ratio(one.ratio),
        cost.label: lambda one: one.cost,
        metric: lambda one: one.ppl,
        "on the front": lambda one: "yes" if one.on_front else "",
    }
    title = f"{metric} against {cost.label}" + (f" ({where})" if where else "")
    return table(name, title, sorted(found, key=lambda one: one.cost), columns)


def widths_section(runs: Sequence[Described]) -> Section | None:
    pictures = []
    for context in dict.fromkeys(one.context for one in runs):
        rows: dict[str, list[Described]] = {}
        for one in runs:
            if one.context == context:
                rows.setdefault(f"{one.method}, {one.ratio:g}", []).append(one)
        kinds = sorted({kind for one in runs for kind in kept_shares(one.run.plan)})
        for kind in kinds:
            only = only_of(runs, context)
            picture = widths_figure(file_name("widths", kind, *only), kind, list(rows.items()))
            pictures += [named(context, only, picture)] if picture is not None else []
    lines = ("Share of its units that each layer keeps, mean over seeds; a row is a method and the ratio asked.",)
    return Section("widths", "Kept widths", lines, (), tuple(pictures)) if pictures else None


def effects_section(runs: Sequence[Described]) -> Section | None:
    lines, tables, pictures = [], [], []
    for context in dict.fromkeys(one.context for one in runs):
        members = [one for one in runs if one.context == context]
        designs: dict[str, list[str]] = {}
        only = only_of(runs, context)
        for metric in perplexities(members):
            found = ablation(members, metric)
            if found is not None:
                name = file_name("effects", metric, *only)
                designs.setdefault(_design(found), []).append(metric)
                tables.append(_effects_table(name, found, context if only else ""))
                pictures.append(named(context, only, effects_figure(name, found)))
        lines += [f"{context}, {', '.join(metrics)}: {design}" for design, metrics in designs.items()]
        if designs:
            lines += _unequal_shares(context, members)
    if not pictures:
        return None
    return Section("effects", "Main effects", tuple(lines), tuple(tables), tuple(pictures))


def _design(found: Ablation) -> str:
    seeds = f", {count(found.seeds, 'seed')}"
    if found.balanced:
        return f"balanced, all {found.possible} combinations of levels alike{seeds}."
    return (
        f"unbalanced, {found.cells} of {found.possible} combinations of levels, not all equally often{seeds}: a "
        "level's mean holds what the other factors happened to be there."
    )


def _unequal_shares(context: str, runs: Sequence[Described]) -> list[str]:
    """That runs asked for one ratio removed different shares: what removes less looks better for that alone."""
    shares: dict[float, list[float]] = {}
    for one in runs:
        if SHARE in one.run.metrics:
            shares.setdefault(one.ratio, []).append(one.run.metrics[SHARE])
    apart = {ratio: found for ratio, found in sorted(shares.items()) if max(found) - min(found) > UNEQUAL}
    if not apart:
        return []
    told = ", ".join(
        f"{100 * min(found):.1f} to {100 * max(found):.1f} % at {ratio:g}" for ratio, found in apart.items()
    )
    return [
        f"{context}: the shares really removed differ at one ratio asked ({told}); part of an effect is that. The "
        "figures above, against the real share, do not have this flaw."
    ]


def _effects_table(name: str, found: Ablation, where: str) -> Table:
    columns: dict[str, Callable[[Effect], Any]] = {
        "factor": lambda effect: effect.factor,
        "level": lambda effect: effect.level,
        "runs": lambda effect: effect.n,
        "mean rise": lambda effect: effect.mean,
        "standard deviation": lambda effect: effect.spread,
        "effect": lambda effect: effect.effect,
    }
    if any(effect.half is not None for effect in found.effects):
        columns["95 % over seeds, ±"] = lambda effect: effect.half
    title = f"Rise in ln {found.metric} over the dense model by level; effect: its mean less that of all runs"
    return table(name, title + (f" ({where})" if where else ""), found.effects, columns)


def published_section(compared: Sequence[Comparison]) -> Section | None:
    if not compared:
        return None
    line = (
        "Published figures (marked) are the papers' own; the tolerance is this project's. Where protocols differ, a "
        "figure within it proves less, and one outside it need not be a mistake."
    )
    numbers = {id(one): number for number, one in enumerate(compared, 1)}
    columns: dict[str, Callable[[Comparison], Any]] = {
        "no.": lambda one: numbers[id(one)],
        "model": lambda one: one.published.model,
        "metric": lambda one: one.published.metric,
        "ratio": lambda one: ratio(one.published.ratio),
        "our method": lambda one: one.method,
        "ours": lambda one: one.ours.mean,
        "95 %, ±": lambda one: one.ours.half,
        "seeds": lambda one: one.ours.n,
        "published": lambda one: Cell(f"{one.published.value:g}", one.published.value, "published"),
        "their method": lambda one: Cell(one.published.method, mark="published"),
        "difference": lambda one: round(one.ours.mean - one.published.value, 9),  # no digits of rounding
        "tolerance": lambda one: one.published.tolerance,
        "verdict": lambda one: Cell("within") if one.within else Cell("outside", mark="flag"),
        "our ratio": lambda one: ratio(one.ratio),
        "our share removed": lambda one: number(one.share, "share"),
        "source": lambda one: Cell(_place(one.published.source), mark="published"),
    }
    shown = table("published", "Ours and the published figure, in its unit", compared, columns)
    return Section("published", "Beside published figures", (line,), (shown, _protocols_table(compared)))


def _place(source: Source) -> str:
    return f"arXiv {source.arxiv}, {source.table}"


def _protocols_table(compared: Sequence[Comparison]) -> Table:
    """Papers share most of a protocol: each part of one is told once, with the comparisons that have it."""
    numbers: dict[Aspect, list[str]] = {}
    for k, one in enumerate(compared):
        for aspect in one.aspects:
            numbers.setdefault(aspect, []).append(str(k + 1))
    order = list(dict.fromkeys(aspect.what for aspect in numbers))
    columns: dict[str, Callable[[Aspect], Any]] = {
        "what": lambda one: one.what,
        "published": lambda one: Cell(one.published, mark="" if one.published == NOT_STATED else "published"),
        "ours": lambda one: one.ours,
        "alike": lambda one: Cell("differs", mark="flag") if one.differs else "" if one.differs is None else "yes",
        "of no.": lambda one: ", ".join(numbers[one]),
    }
    return table(
        "protocols", "Protocols, theirs and ours", sorted(numbers, key=lambda one: order.index(one.what)), columns
    )

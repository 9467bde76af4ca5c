"""The other sections of a report that hold figures: what is drawn and tabled for each model and metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pruneexp.fingerprint import GGUF
from pruneexp.report.against_share import by_context, file_name, named
from pruneexp.report.comparison import NOT_STATED, Aspect, Comparison
from pruneexp.report.figures import Looks, effects_figure, pareto_figure, widths_figure
from pruneexp.report.methods import Runs
from pruneexp.report.page import Section
from pruneexp.report.points import (
    Ablation,
    Cost,
    Priced,
    ablation,
    costs,
    kept_shares,
    left_out,
    machine,
    perplexities,
    points,
    priced,
    removed,
)
from pruneexp.report.published import Published
from pruneexp.report.statistics import Effect, grouped
from pruneexp.report.tables import Cell, Table, count, number, ratio, table

UNEQUAL = 0.01  # difference of shares removed at one ratio that is told


def pareto_section(runs: Runs, looks: Looks) -> Section | None:
    lines, tables, pictures = [], [], []
    for context, short, members in by_context(runs):
        by_machine = grouped(members, lambda one: machine(one.run))
        for metric in perplexities(members):
            _, there, kind = metric.partition(GGUF)  # another engine has costs of its own
            for cost in costs(members, there + kind):
                # A latency is of its machine; bytes are the same everywhere.
                for k, (place, here) in enumerate(by_machine.items() if cost.timed else [("", members)], 1):
                    several = (f"machine{k}",) if place and len(by_machine) > 1 else ()
                    name = file_name("pareto", metric, cost.metric, *short, *several)
                    front = priced(points(here, metric), cost)
                    if len(front) > 1:
                        where = ", ".join([*([context] if short else []), *([place] if several else [])])
                        pictures.append(named(context, short, pareto_figure(name, metric, cost, front, looks)))
                        tables.append(_priced_table(name, metric, cost, front, where))
        if perplexities(members):
            lines += _noise(context, members)
    lines += left_out(runs, "perplexity", "ppl/.*") + left_out(runs, "speed", "latency/.*")
    return Section("pareto", "Perplexity against latency and bytes", lines, tables, pictures) if pictures else None


def _noise(context: str, runs: Runs) -> list[str]:
    """How far apart the repetitions of a latency lie: what is nearer to each other is in no order."""
    kinds = dict.fromkeys(there + kind for _, there, kind in (metric.partition(GGUF) for metric in perplexities(runs)))
    widest = []
    for cost in [cost for kind in kinds for cost in costs(runs, kind)]:
        names = [(f"{side}/{cost.spread}", f"{side}/{cost.metric}") for side in ("dense", "pruned")]
        both = [(one.run.metrics.get(spread), one.run.metrics.get(key)) for one in runs for spread, key in names]
        ranges = [width / value for width, value in both if width is not None and value]
        engine = " in llama.cpp" if GGUF in cost.metric else ""
        widest += [f"{100 * max(ranges):.0f} % of {cost.label}{engine}"] if ranges else []
    if not widest:
        return []
    return [
        f"{context}: the interquartile range over repetitions is at most {', '.join(widest)}; points that are nearer "
        "to each other than that are not in order."
    ]


def _priced_table(name: str, metric: str, cost: Cost, front: Sequence[Priced], where: str) -> Table:
    columns: dict[str, Callable[[Priced], Any]] = {
        "method": lambda one: one.method,
        "ratio asked": lambda one: ratio(one.ratio),
        cost.label: lambda one: one.cost,
        metric: lambda one: one.ppl,
        "on the front": lambda one: "yes" if one.on_front else "",
    }
    title = f"{metric} against {cost.label}" + (f" ({where})" if where else "")
    return table(name, title, sorted(front, key=lambda one: one.cost), columns)


def widths_section(runs: Runs) -> Section | None:
    pictures = []
    kinds = sorted({kind for one in runs for kind in kept_shares(one.run.plan)})
    for context, short, members in by_context(runs):
        rows = grouped(members, lambda one: f"{one.method}, {one.ratio:g}")
        for kind in kinds:
            picture = widths_figure(file_name("widths", kind, *short), kind, rows)
            pictures += [named(context, short, picture)] if picture is not None else []
    line = "Share of its units that each layer keeps, mean over seeds; a row is a method and the ratio asked."
    return Section("widths", "Kept widths", (line,), pictures=pictures) if pictures else None


def effects_section(runs: Runs) -> Section | None:
    lines, tables, pictures = [], [], []
    for context, short, members in by_context(runs):
        ablations = [study for metric in perplexities(members) if (study := ablation(members, metric)) is not None]
        for study in ablations:
            name = file_name("effects", study.metric, *short)
            tables.append(_effects_table(name, study, context if short else ""))
            pictures.append(named(context, short, effects_figure(name, study)))
        for design, alike in grouped(ablations, _design).items():
            lines.append(f"{context}, {', '.join(study.metric for study in alike)}: {design}")
        if ablations:
            lines += _unequal_shares(context, members)
    lines += left_out(runs, "perplexity", "ppl/.*")
    return Section("effects", "Main effects", lines, tables, pictures) if pictures else None


def _design(study: Ablation) -> str:
    seeds = f", {count(study.seeds, 'seed')}"
    if study.balanced:
        return f"balanced, all {study.possible} combinations of levels alike{seeds}."
    return (
        f"unbalanced, {study.cells} of {study.possible} combinations of levels, not all equally often{seeds}: a "
        "level's mean holds what the other factors happened to be there."
    )


def _unequal_shares(context: str, runs: Runs) -> list[str]:
    """A line where runs that asked for one ratio removed different shares: what removes less looks better for that
    alone."""
    share = removed(runs)
    by_ratio = grouped((one for one in runs if share.metric in one.run.metrics), lambda one: one.ratio)
    apart = []
    for target, members in sorted(by_ratio.items()):
        shares = [one.run.metrics[share.metric] for one in members]
        if max(shares) - min(shares) > UNEQUAL:
            apart.append(f"{100 * min(shares):.1f} to {100 * max(shares):.1f} % at {target:g}")
    if not apart:
        return []
    return [
        f"{context}: the shares really removed{share.name.removeprefix('share removed')} differ at one ratio asked "
        f"({', '.join(apart)}); part of an effect is that. The figures above, against the real share, do not have this "
        "flaw."
    ]


def _effects_table(name: str, study: Ablation, where: str) -> Table:
    columns: dict[str, Callable[[Effect], Any]] = {
        "factor": lambda effect: effect.factor,
        "level": lambda effect: effect.level,
        "runs": lambda effect: effect.n,
        "mean rise": lambda effect: effect.mean,
        "standard deviation": lambda effect: effect.spread,
        "effect": lambda effect: effect.effect,
    }
    if any(effect.half is not None for effect in study.effects):
        columns["95 % over seeds, ±"] = lambda effect: effect.half
    title = f"Rise in ln {study.metric} over the dense model by level; effect: its mean less that of all runs"
    return table(name, title + (f" ({where})" if where else ""), study.effects, columns)


def published_section(compared: Sequence[Comparison]) -> Section | None:
    if not compared:
        return None
    line = (
        "Published figures (marked) are the papers' own; the tolerance is this project's, or how far others came from "
        "them who ran the method. Where protocols differ, a figure within it proves less, and one outside it need not "
        "be a mistake."
    )
    numbers = {id(one): k for k, one in enumerate(compared, 1)}
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
        "found by others": lambda one: _found_by_others(one.published),
        "tolerance": lambda one: one.published.tolerance,
        "verdict": lambda one: Cell("within") if one.within else Cell("outside", mark="flag"),
        "our ratio": lambda one: ratio(one.ratio),
        "our share removed": lambda one: number(one.share, "share"),
        "source": lambda one: Cell(
            f"arXiv {one.published.source.arxiv}, {one.published.source.table}", mark="published"
        ),
    }
    shown = table("published", "Ours and the published figure, in its unit", compared, columns)
    return Section("published", "Beside published figures", (line,), (shown, _protocols_table(compared)))


def _found_by_others(figure: Published) -> Cell:
    return Cell("") if figure.reproduced is None else Cell(f"{figure.reproduced:g}", figure.reproduced, "published")


def _protocols_table(compared: Sequence[Comparison]) -> Table:
    """Papers share most of a protocol: each part of one is told once, with the comparisons that have it."""
    numbers: dict[Aspect, list[str]] = {}
    for k, one in enumerate(compared, 1):
        for aspect in one.aspects:
            numbers.setdefault(aspect, []).append(str(k))
    rows = [aspect for alike in grouped(numbers, lambda aspect: aspect.what).values() for aspect in alike]
    columns: dict[str, Callable[[Aspect], Any]] = {
        "what": lambda one: one.what,
        "published": lambda one: Cell(one.published, mark="" if one.published == NOT_STATED else "published"),
        "ours": lambda one: one.ours,
        "alike": lambda one: Cell("differs", mark="flag") if one.differs else "" if one.differs is None else "yes",
        "of no.": lambda one: ", ".join(numbers[one]),
    }
    return table("protocols", "Protocols, theirs and ours", rows, columns)

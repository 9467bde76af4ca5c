"""A report's content: which tables, figures and sections the runs call for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruneexp.pages.comparison import NOT_STATED, Comparison, comparisons, unpublished
from pruneexp.pages.figures import (
    KIND_NAMES,
    Picture,
    Style,
    effects_figure,
    pareto_figure,
    perplexity_figure,
    styles,
    widths_figure,
)
from pruneexp.pages.folders import Found
from pruneexp.pages.methods import RATIO, Described, departures, describe
from pruneexp.pages.page import Folded, Section
from pruneexp.pages.points import SHARE, Ablation, Point, ablation, costs, dense, machine, metrics_of, perplexities, points
from pruneexp.pages.tables import Cell, Table, number
from pruneexp.published import tables as published_tables
from pruneexp.summary import differing, settings

UNITS = {SHARE: "share", "memory/peak_bytes": "bytes"}
LATER = ("seconds/calibrate", "seconds/search", "seconds/shrink", "passes/forward", "passes/backward", "memory/peak_bytes")
FEW = 3  # lines of a list before it is folded


@dataclass(frozen=True)
class Report:
    """What is written: the page's parts, every table (some go to files alone) and every figure."""

    title: str
    lines: tuple[str, ...]
    sections: tuple[Section, ...]
    tables: tuple[Table, ...]

    @property
    def pictures(self) -> list[Picture]:
        return [picture for section in self.sections for picture in section.pictures]


def report(found: Found, folders: Sequence[Path]) -> Report:
    """From runs to content. There is at least one run."""
    runs = sorted(describe(found.runs), key=lambda one: (one.context, one.method, one.ratio, str(one.seed), one.run.name))
    counted = [one for one in runs if one.run.hash not in found.conflicts]
    conflicting = [one for one in runs if one.run.hash in found.conflicts]
    compared = comparisons(counted, published_tables())
    looks = styles(list(dict.fromkeys(one.method for one in runs)))
    sections = [
        _runs(runs, found),
        _left_out(found),
        _perplexity(counted, conflicting, compared, looks),
        _pareto(counted, looks),
        _widths(runs),
        _effects(counted),
        _published(counted, compared),
        _configs(runs),
    ]
    shown = [section for section in sections if section is not None]
    tables = [table for section in shown for table in section.tables]
    names = " and ".join(folder.name or str(folder.resolve()) for folder in folders[:FEW])
    more = f" and {len(folders) - FEW} more" if len(folders) > FEW else ""
    return Report(f"Pruning runs: {names}{more}", _header(runs, found), tuple(shown), (*tables, _all_metrics(runs)))


def _header(runs: Sequence[Described], found: Found) -> tuple[str, ...]:
    models = ", ".join(dict.fromkeys(one.context for one in runs))
    ended = sorted(str(one.run.status.get("ended") or "")[:10] for one in runs)
    when = f"{ended[0]} to {ended[-1]}" if ended[0] != ended[-1] else ended[0]
    versions = sorted({str((one.run.environment.get("versions") or {}).get("pruneexp")) for one in runs})
    where = sorted({machine(one.run.environment) for one in runs})
    first = f"{_count(len(runs), 'finished run')} of {models}" + (f", {when}" if when else "")
    lines = [f"{first}; pruneexp {', '.join(versions)}; on {'; '.join(where)}."]
    left = {"left out": len(found.skipped), "repeated": len(found.repeats), "contradicted": len(found.conflicts)}
    words = [f"{count} {what}" for what, count in left.items() if count]
    if words:
        lines.append(f"Of the others: {', '.join(words)} (see Folders left out).")
    return tuple(lines)


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _name(*parts: str) -> str:
    """A file name and HTML identifier."""
    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(parts)).strip("-")


def _only(runs: Sequence[Described], context: str) -> tuple[str, ...]:
    """The context, where a report has several."""
    return (context,) if len({one.context for one in runs}) > 1 else ()


def _runs(runs: Sequence[Described], found: Found) -> Section:
    flat = [settings(one.run.config) for one in runs]
    # The class of a choice is told by the method's name.
    keys = [k for k in differing(flat) if not k.endswith("_target_") and not k.startswith("evaluator.") and k != RATIO]
    several = len({one.context for one in runs}) > 1
    measured = [f"{side}/{name}" for name in _measured(runs) for side in ("dense", "pruned")]
    columns = [key for key in (SHARE, "pruned/params", *measured, *LATER) if any(key in one.run.metrics for one in runs)]
    rows = []
    for one, setting in zip(runs, flat, strict=True):
        flagged = one.run.hash in found.conflicts
        cells = [Cell(one.run.name, mark="flag" if flagged else ""), *([Cell(one.context)] if several else [])]
        cells += [Cell(one.method), number(one.ratio), *(Cell(str(setting.get(key, "-"))) for key in keys)]
        cells += [number(one.run.metrics.get(key), UNITS.get(key, "")) for key in columns]
        rows.append((*cells, Cell("same config, another result", mark="flag") if flagged else Cell("")))
    head = ["run", *(["model"] if several else []), "method", "ratio asked", *keys, *columns, "remark"]
    if not found.conflicts:
        head, rows = head[:-1], [row[:-1] for row in rows]
    table = Table("runs", "Every finished run; all its metrics are in metrics.csv", tuple(head), tuple(rows))
    lines = []
    if shared := _shared(runs):
        lines.append(f"In all of them: {shared}.")
    for hashed, why in found.conflicts.items():
        names = " and ".join(one.run.name for one in runs if one.run.hash == hashed)
        lines.append(
            f"Same config ({hashed}), another result: {names}: {why}. They are shown one by one and counted in no mean."
        )
    return Section("runs", "Runs", tuple(lines), (table,))


def _measured(runs: Sequence[Described]) -> list[str]:
    """Perplexities, then accuracies."""
    return perplexities(runs) + metrics_of(runs, r"(?!ppl/)(?:.*/)?acc\w*(?:[@/\[].*)?")


def _shared(runs: Sequence[Described]) -> str:
    """Settings that no run leaves at its options' defaults, and the same in all."""
    every = [departures(one) for one in runs]
    same = {key: value for key, value in every[0].items() if all(other.get(key) == value for other in every)}
    return ", ".join(f"{key}={value}" for key, value in same.items())


def _all_metrics(runs: Sequence[Described]) -> Table:
    keys = sorted({key for one in runs for key in one.run.metrics})
    flat = [settings(one.run.config) for one in runs]
    told = differing(flat)
    rows = tuple(
        (
            Cell(one.run.name),
            Cell(one.run.hash),
            Cell(one.context),
            Cell(one.method),
            *(Cell(str(setting.get(key, ""))) for key in told),
            *(number(one.run.metrics.get(key)) for key in keys),
        )
        for one, setting in zip(runs, flat, strict=True)
    )
    return Table("metrics", "Every metric of every run", ("run", "hash", "model", "method", *told, *keys), rows)


def _left_out(found: Found) -> Section | None:
    rows = [(Cell(one.name), Cell(one.reason, mark="flag")) for one in found.skipped]
    rows += [(Cell(one.name), Cell(one.reason)) for one in found.repeats]
    if not rows:
        return None
    table = Table("left_out", "Folders that are in no figure, and why", ("folder", "reason"), tuple(rows))
    return Section("left-out", "Folders left out", (), (table,))


def _perplexity(
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
            odd = [one for one in members if one in conflicting and {f"pruned/{metric}", SHARE} <= set(one.run.metrics)]
            if not here and not odd:
                continue
            theirs = [
                one
                for one in compared
                if one.published.metric == metric and one.published.ratio and one.runs[0].context == context
            ]
            name = _name("perplexity", metric, *_only(everyone, context))
            before = dense(members, metric)
            pictures.append(perplexity_figure(name, metric, here, before, odd, theirs, looks))
            if len(before) > 1:
                lines.append(
                    f"{context}: the dense model's {metric} is not one figure but {_list(before)}: other texts, numeric "
                    "precision or machines are mixed here."
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
            number(point.ratio),
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


def _pareto(runs: Sequence[Described], looks: Mapping[str, Style]) -> Section | None:
    pictures = []
    for context in dict.fromkeys(one.context for one in runs):
        members = [one for one in runs if one.context == context]
        places = list(dict.fromkeys(machine(one.run.environment) for one in members))
        for metric in perplexities(members):
            for cost in costs(members):
                # A latency is of its machine; bytes are the same everywhere.
                for k, place in enumerate(places if cost.inverse else [""]):
                    here = [one for one in members if not place or machine(one.run.environment) == place]
                    several = (f"machine{k + 1}",) if place and len(places) > 1 else ()
                    name = _name("pareto", metric, cost.metric, *_only(runs, context), *several)
                    picture = pareto_figure(name, points(here, metric), cost, looks)
                    pictures += [picture] if picture is not None else []
    return Section("pareto", "Perplexity against latency and bytes", (), (), tuple(pictures)) if pictures else None


def _widths(runs: Sequence[Described]) -> Section | None:
    pictures = []
    for context in dict.fromkeys(one.context for one in runs):
        rows: dict[str, list[Described]] = {}
        for one in runs:
            if one.context == context:
                rows.setdefault(f"{one.method}, {one.ratio:g}", []).append(one)
        for kind in KIND_NAMES:
            picture = widths_figure(_name("widths", kind, *_only(runs, context)), kind, list(rows.items()))
            pictures += [picture] if picture is not None else []
    lines = ("Share of its units that each layer keeps, mean over seeds; a row is a method and the ratio asked.",)
    return Section("widths", "Kept widths", lines, (), tuple(pictures)) if pictures else None


def _effects(runs: Sequence[Described]) -> Section | None:
    lines, tables, pictures = [], [], []
    for context in dict.fromkeys(one.context for one in runs):
        members = [one for one in runs if one.context == context]
        for metric in perplexities(members):
            found = ablation(members, metric)
            if found is not None:
                name = _name("effects", metric, *_only(runs, context))
                lines.append(_design(found))
                tables.append(_effects_table(name, found))
                pictures.append(effects_figure(name, found))
    if not pictures:
        return None
    return Section("effects", "Main effects", tuple(lines), tuple(tables), tuple(pictures))


def _design(found: Ablation) -> str:
    seeds = f", {_count(found.seeds, 'seed')}"
    if found.balanced:
        return f"{found.context}, {found.metric}: balanced, all {found.possible} combinations of levels alike{seeds}."
    return (
        f"{found.context}, {found.metric}: unbalanced, {found.cells} of {found.possible} combinations of levels, not all "
        f"equally often{seeds}: a level's mean holds what the other factors happened to be there."
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


def _published(runs: Sequence[Described], compared: Sequence[Comparison]) -> Section:
    lines = list(unpublished(runs, published_tables()))
    if not compared:
        lines.append("None of these runs has the model, method, ratio and metric of a published figure.")
        return Section("published", "Beside published figures", tuple(lines))
    lines.append(
        "Published figures (marked) are the papers' own; the tolerance is this project's. Where protocols differ, a figure "
        "within it proves less, and one outside it need not be a mistake."
    )
    rows = []
    for k, one in enumerate(compared):
        figure, distance = one.published, one.ours.mean - one.published.value
        rows.append(
            (
                number(k + 1),
                Cell(figure.model),
                Cell(figure.metric),
                number(figure.ratio),
                Cell(one.method),
                number(one.share, "share"),
                number(one.ours.mean),
                number(one.ours.half),
                number(one.ours.n),
                Cell(f"{figure.value:g}", figure.value, "published"),
                Cell(figure.method, mark="published"),
                Cell(f"{figure.source.paper}, {figure.source.table}, arXiv {figure.source.arxiv}", mark="published"),
                Cell(figure.certainty.replace("_", " "), mark="published"),
                number(distance),
                number(figure.tolerance),
                Cell("within" if one.within else "outside", mark="" if one.within else "flag"),
            )
        )
    head = ("no.", "model", "metric", "ratio", "our method", "our share removed", "ours", "95 %, ±", "seeds")
    head += ("published", "their method", "source", "read", "difference", "tolerance", "verdict")
    table = Table("published", "Ours and the published figure, in its unit", head, tuple(rows))
    protocols = Table(
        "protocols",
        "Protocols of the rows above, theirs and ours",
        ("no.", "what", "published", "ours", "alike"),
        tuple(
            (
                number(k + 1),
                Cell(aspect.what),
                Cell(aspect.published, mark="" if aspect.published == NOT_STATED else "published"),
                Cell(aspect.ours),
                Cell({True: "differs", False: "yes", None: ""}[aspect.differs], mark="flag" if aspect.differs else ""),
            )
            for k, one in enumerate(compared)
            for aspect in one.aspects
        ),
    )
    return Section("published", "Beside published figures", tuple(lines), (table, protocols))


def _configs(runs: Sequence[Described]) -> Section:
    flat = [settings(one.run.config) for one in runs]
    rows = tuple(
        tuple([Cell(one.run.name), *(Cell(str(setting.get(key, "-"))) for key in differing(flat))])
        for one, setting in zip(runs, flat, strict=True)
    )
    table = Table("configs", "Every key that is not the same in all runs", ("run", *differing(flat)), rows)
    folded = tuple(Folded(f"{one.run.name} ({one.method}, {one.ratio:g})", _yaml(one.run.config)) for one in runs)
    lines = ("The complete config of each run, as its config.yaml has it:",)
    return Section("configs", "Configs", lines, (table,) if len(runs) > 1 else (), (), folded)


def _yaml(config: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)

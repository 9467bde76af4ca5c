"""A report's content: which tables, figures and sections the runs call for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruneexp.fingerprint import differing, settings
from pruneexp.report.against_share import accuracy_section, perplexity_section
from pruneexp.report.comparison import comparisons
from pruneexp.report.figures import Picture, styles
from pruneexp.report.folders import Found
from pruneexp.report.methods import GROUPS, Described, departures, describe
from pruneexp.report.page import Folded, Section
from pruneexp.report.points import SHARE, accuracies, is_mean, kept_shares, machine, perplexities
from pruneexp.report.published import tables as published_tables
from pruneexp.report.sections import (
    effects_section,
    pareto_section,
    published_section,
    widths_section,
)
from pruneexp.report.tables import Cell, Table, count, number, ratio

UNITS = {SHARE: "share", "memory/peak_bytes": "bytes", "passes/forward": "count", "passes/backward": "count"}
LATER = (
    "seconds/calibrate",
    "seconds/search",
    "seconds/shrink",
    "passes/forward",
    "passes/backward",
    "memory/peak_bytes",
)
FEW = 3  # folders that the title names


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
    runs = sorted(
        describe(found.runs), key=lambda one: (one.context, one.method, one.ratio, str(one.seed), one.run.name)
    )
    counted = [one for one in runs if one.run.hash not in found.conflicts]
    conflicting = [one for one in runs if one.run.hash in found.conflicts]
    papers = published_tables()
    compared = comparisons(counted, papers)
    looks = styles(list(dict.fromkeys(one.method for one in runs)))
    sections = [
        _runs(runs, found),
        _left_out(found),
        perplexity_section(counted, conflicting, compared, looks),
        accuracy_section(counted, conflicting, compared, looks),
        pareto_section(counted, looks),
        widths_section(runs),
        effects_section(counted),
        published_section(counted, compared, papers),
        _configs(runs),
    ]
    shown = [section for section in sections if section is not None]
    tables = [table for section in shown for table in section.tables]
    names = " and ".join(folder.resolve().name or "/" for folder in folders[:FEW])
    more = f" and {len(folders) - FEW} more" if len(folders) > FEW else ""
    tables += [_all_metrics(runs), _kept(runs)]
    return Report(f"Pruning runs: {names}{more}", _header(runs, found), tuple(shown), tuple(tables))


def _header(runs: Sequence[Described], found: Found) -> tuple[str, ...]:
    models = ", ".join(dict.fromkeys(one.context for one in runs))
    ended = sorted(str(one.run.status.get("ended") or "")[:10] for one in runs)
    when = f"{ended[0]} to {ended[-1]}" if ended[0] != ended[-1] else ended[0]
    versions = sorted({str(one.run.environment["versions"].get("pruneexp")) for one in runs})
    where = sorted({machine(one.run.environment) for one in runs})
    first = f"{count(len(runs), 'finished run')} of {models}" + (f", {when}" if when else "")
    lines = [f"{first}; pruneexp {', '.join(versions)}; on {'; '.join(where)}."]
    if left := len(found.skipped) + len(found.repeats):
        lines.append(f"{count(left, 'more folder')} with a run left out, for the reasons below.")
    if found.conflicts:
        lines.append(f"{count(len(found.conflicts), 'config')} with more than one result: see Runs.")
    return tuple(lines)


def _runs(runs: Sequence[Described], found: Found) -> Section:
    flat = [settings(one.run.config) for one in runs]
    # What a choice brings along is told by the method's name.
    keys = list(dict.fromkeys(key for one in runs for key in one.settings))
    several = len({one.context for one in runs}) > 1
    measured = [f"{side}/{name}" for name in _measured(runs) for side in ("dense", "pruned")]
    columns = [
        key for key in (SHARE, "pruned/params", *measured, *LATER) if any(key in one.run.metrics for one in runs)
    ]
    rows = []
    for one, setting in zip(runs, flat, strict=True):
        flagged = one.run.hash in found.conflicts
        cells = [Cell(one.run.name, mark="flag" if flagged else ""), *([Cell(one.context)] if several else [])]
        cells += [Cell(one.method), ratio(one.ratio), *(Cell(str(setting.get(key, "-"))) for key in keys)]
        cells += [number(one.run.metrics.get(key), _unit(key)) for key in columns]
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
    """Perplexities, then accuracies: means over tasks where there are any."""
    found = accuracies(runs)
    return perplexities(runs) + ([name for name in found if is_mean(name)] or found)


def _unit(metric: str) -> str:
    return UNITS.get(metric, "accuracy" if "/acc" in metric else "")


def _shared(runs: Sequence[Described]) -> str:
    """The choices that are the same in all runs, and the settings in which they all depart from them alike."""
    told = [{group: one.choices[group].name for group in GROUPS} | departures(one) for one in runs]
    same = {key: value for key, value in told[0].items() if all(key in one and one[key] == value for one in told)}
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


def _kept(runs: Sequence[Described]) -> Table:
    rows = [
        (Cell(one.run.name), Cell(one.method), ratio(one.ratio), Cell(kind), number(layer), number(share))
        for one in runs
        for kind, layers in kept_shares(one.run.plan).items()
        for layer, share in sorted(layers.items())
    ]
    return Table("widths", "Share kept", ("run", "method", "ratio asked", "kind", "layer", "kept"), tuple(rows))


def _left_out(found: Found) -> Section | None:
    rows = [(Cell(one.name), Cell(one.reason, mark="flag")) for one in found.skipped]
    rows += [(Cell(one.name), Cell(one.reason)) for one in found.repeats]
    if not rows:
        return None
    table = Table("left_out", "Folders that are in no figure, and why", ("folder", "reason"), tuple(rows))
    return Section("left-out", "Folders left out", (), (table,))


def _configs(runs: Sequence[Described]) -> Section:
    flat = [settings(one.run.config) for one in runs]
    keys = differing(flat)
    rows = [
        (Cell(one.run.name), *(Cell(str(setting.get(key, "-"))) for key in keys))
        for one, setting in zip(runs, flat, strict=True)
    ]
    table = Table("configs", "Every key that is not the same in all runs", ("run", *keys), tuple(rows))
    folded = tuple(Folded(f"{one.run.name} ({one.method}, {one.ratio:g})", _yaml(one.run.config)) for one in runs)
    tables = (table,) if len(runs) > 1 else ()
    return Section("configs", "Configs", (), tables, (), folded, "The complete config of each run")


def _yaml(config: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)

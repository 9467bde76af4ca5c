"""A report's content: which tables, figures and sections the runs call for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pruneexp.fingerprint import differing
from pruneexp.report.against_share import accuracy_section, perplexity_section
from pruneexp.report.bytes_figure import bytes_section
from pruneexp.report.comparison import comparisons, unpublished
from pruneexp.report.figures import styles
from pruneexp.report.folders import RunsRead
from pruneexp.report.methods import GROUPS, Runs, departures, describe
from pruneexp.report.page import Folded, Report, Section
from pruneexp.report.points import (
    ACCURACY,
    accuracies,
    is_mean,
    kept_shares,
    left_out,
    machine,
    metrics_of,
    perplexities,
    removed,
)
from pruneexp.report.published import tables as published_tables
from pruneexp.report.sections import effects_section, pareto_section, published_section, widths_section
from pruneexp.report.tables import Cell, Table, count, number, ratio, table

UNITS = {"memory/peak_bytes": "bytes", "passes/forward": "count", "passes/backward": "count"}
LATER = ("seconds/calibrate", "seconds/search", "seconds/shrink")
LATER += ("passes/forward", "passes/backward", "memory/peak_bytes")
Show = Callable[[Any], Any]  # of a run, what a column has
FEW = 3  # folders that the title names
SHOWN = rf"ppl/.*|{ACCURACY}|latency/.*|params.*|bytes|macs/.*|kv_bytes/.*"  # in other sections, or sizes


def report(read: RunsRead, folders: Sequence[Path]) -> Report:
    """From runs to content. There is at least one run."""
    described = describe(read.runs)
    runs = sorted(described, key=lambda one: (one.context, one.method, one.ratio, str(one.seed), one.run.name))
    counted = [one for one in runs if one.run.hash not in read.conflicts]
    conflicting = [one for one in runs if one.run.hash in read.conflicts]
    papers = published_tables()
    compared = comparisons(counted, papers)
    looks = styles(list(dict.fromkeys(one.method for one in runs)))
    sections = [
        _runs(runs, read),
        _left_out(read),
        perplexity_section(counted, conflicting, compared, looks),
        accuracy_section(counted, conflicting, compared, looks),
        bytes_section(counted, looks),
        pareto_section(counted, looks),
        widths_section(runs),
        _others(runs),
        effects_section(counted),
        published_section(compared),
        _configs(runs),
    ]
    shown = [section for section in sections if section is not None]
    notes = unpublished(counted, papers)
    if not compared:
        notes.append("None of these runs has the model, method, ratio and metric of a published figure.")
    tables = [*(table for section in shown for table in section.tables), _all_metrics(runs), _kept(runs)]
    names = " and ".join(folder.resolve().name or "/" for folder in folders[:FEW])
    more = f" and {len(folders) - FEW} more" if len(folders) > FEW else ""
    return Report(f"Pruning runs: {names}{more}", _header(runs, read), shown, notes, tables)


def _header(runs: Runs, read: RunsRead) -> list[str]:
    models = ", ".join(dict.fromkeys(one.context for one in runs))
    ended = sorted(str(one.run.status.get("ended") or "")[:10] for one in runs)
    when = f"{ended[0]} to {ended[-1]}" if ended[0] != ended[-1] else ended[0]
    versions = sorted({str(one.run.environment["versions"].get("pruneexp")) for one in runs})
    where = sorted({machine(one.run) for one in runs})
    first = f"{count(len(runs), 'finished run')} of {models}" + (f", {when}" if when else "")
    lines = [f"{first}; pruneexp {', '.join(versions)}; on {'; '.join(where)}."]
    if left := len(read.skipped) + len(read.repeats):
        lines.append(f"{count(left, 'more folder')} with a run left out, for the reasons below.")
    if read.conflicts:
        lines.append(f"{count(len(read.conflicts), 'config')} with more than one result: see Runs.")
    return lines


def _runs(runs: Runs, read: RunsRead) -> Section:
    # What a choice brings along is told by the method's name.
    keys = [key for one in runs for key in one.settings] + (["sparsity.of"] if removed(runs).note else [])
    keys = list(dict.fromkeys(keys))
    names = perplexities(runs) + ([name for name in accuracies(runs) if is_mean(name)] or accuracies(runs))
    measured = [f"{side}/{name}" for name in names for side in ("dense", "pruned")]
    there = {key for one in runs for key in one.run.metrics}
    shares = sorted(key for key in there if key.startswith("sparsity/") and key != "sparsity/model")
    metrics = [*shares, *(key for key in ("pruned/params", *measured, *LATER) if key in there)]
    units = {key: "share" if key in shares else UNITS.get(key, "accuracy" if "/acc" in key else "") for key in metrics}
    columns: dict[str, Show] = {
        "run": lambda one: Cell(one.run.name, mark="flag" if one.run.hash in read.conflicts else ""),
        **_what_ran(runs),
        **{key: _setting(key) for key in keys},
        **{key: lambda one, key=key: number(one.run.metrics.get(key), units[key]) for key in metrics},
    }
    if read.conflicts:
        remark = Cell("same config, another result", mark="flag")
        columns["remark"] = lambda one: remark if one.run.hash in read.conflicts else ""
    # The choices that are the same in all runs, and the settings in which they all depart from them alike.
    settings = [{group: one.choices[group].name for group in GROUPS} | departures(one) for one in runs]
    alike = [
        f"{k}={value}" for k, value in settings[0].items() if all(k in one and one[k] == value for one in settings)
    ]
    lines = [f"In all of them: {', '.join(alike)}."] if alike else []
    for hashed, why in read.conflicts.items():
        names = " and ".join(one.run.name for one in runs if one.run.hash == hashed)
        lines.append(
            f"Same config ({hashed}), another result: {names}: {why}. They are shown one by one and counted in no mean."
        )
    lines += left_out(runs, "perplexity and accuracy", f"ppl/.*|{ACCURACY}")
    shown = table("runs", "Every finished run; all its metrics are in metrics.csv", runs, columns)
    return Section("runs", "Runs", lines, (shown,))


def _others(runs: Runs) -> Section | None:
    """Figures that no other section has: of what was written, and of evaluators of one's own."""
    names = metrics_of(runs, rf"(?!(?:{SHOWN})$).*")
    there = {key for one in runs for key in one.run.metrics}
    keys = [key for name in names for key in (f"dense/{name}", f"pruned/{name}") if key in there]
    columns: dict[str, Show] = {
        "run": lambda one: one.run.name,
        **_what_ran(runs),
        **{key: lambda one, key=key: one.run.metrics.get(key) for key in keys},
    }
    measured = [one for one in runs if any(key in one.run.metrics for key in keys)]
    shown = table("others", "What else was measured of each run's models", measured, columns)
    return Section("others", "Other figures", (), (shown,)) if keys else None


def _what_ran(runs: Runs) -> dict[str, Show]:
    """Columns that say what a run is, beside its name: the model where there are several."""
    several = len({one.context for one in runs}) > 1
    return {
        **({"model": lambda one: one.context} if several else {}),
        "method": lambda one: one.method,
        "ratio asked": lambda one: ratio(one.ratio),
    }


def _setting(key: str, absent: str = "-") -> Show:
    return lambda one: str(one.run.flat.get(key, absent))


def _all_metrics(runs: Runs) -> Table:
    columns: dict[str, Show] = {
        "run": lambda one: one.run.name,
        "hash": lambda one: one.run.hash,
        "model": lambda one: one.context,
        "method": lambda one: one.method,
        **{key: _setting(key, "") for key in differing([one.run.flat for one in runs])},
    }
    for key in sorted({key for one in runs for key in one.run.metrics}):
        columns[key] = lambda one, key=key: one.run.metrics.get(key)
    return table("metrics", "Every metric of every run", runs, columns)


def _kept(runs: Runs) -> Table:
    rows = tuple(
        (Cell(one.run.name), Cell(one.method), ratio(one.ratio), Cell(kind), number(layer), number(share))
        for one in runs
        for kind, layers in kept_shares(one.run.plan).items()
        for layer, share in sorted(layers.items())
    )
    return Table("widths", "Share kept", ("run", "method", "ratio asked", "kind", "layer", "kept"), rows)


def _left_out(read: RunsRead) -> Section | None:
    left = (*read.skipped, *read.repeats)
    columns: dict[str, Show] = {
        "folder": lambda one: one.name,
        "reason": lambda one: Cell(one.reason, mark="flag" if one in read.skipped else ""),
    }
    shown = table("left_out", "Folders that are in no figure, and why", left, columns)
    return Section("left-out", "Folders left out", (), (shown,)) if left else None


def _configs(runs: Runs) -> Section:
    import yaml

    keys = differing([one.run.flat for one in runs])
    columns: dict[str, Show] = {"run": lambda one: one.run.name, **{key: _setting(key) for key in keys}}
    shown = table("configs", "Every key that is not the same in all runs", runs, columns)
    folded = [
        Folded(
            f"{one.run.name} ({one.method}, {one.ratio:g})",
            yaml.safe_dump(dict(one.run.config), sort_keys=False, allow_unicode=True),
        )
        for one in runs
    ]
    tables = (shown,) if len(runs) > 1 else ()
    return Section("configs", "Configs", (), tables, folded=folded, fold="The complete config of each run")

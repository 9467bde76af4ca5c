"""What a run did, as a short table at its end."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneexp.tracker.structure import UNITS, widths
from pruneexp.types import Plan, Site, size_text

if TYPE_CHECKING:
    from rich.table import Table

SUBLAYERS = {"attention": "attention sublayers", "mlp": "FFN sublayers"}
GROUPS = {  # first part of a metric's name -> heading
    "ppl": "perplexity",
    "latency": "speed",
    "memory": "memory",
    "bytes": "memory",
    "bits": "memory",
    "kv_bytes": "memory",
    "passes": "passes",
    "seconds": "seconds",
}
COUNTED = {  # share removed of what the sparsity counts
    "sparsity/decoder": "decoder parameters",
    "sparsity/prunable": "parameters that units hold",
    "sparsity/macs": "multiply-accumulates",
    "sparsity/bytes": "weights and KV cache, bytes",
    "sparsity/kv_cache": "KV cache",
    "sparsity/latency": "milliseconds of the decoder, by the table",
    "sparsity/latency_measured": "milliseconds of the decoder, measured",
}
MOST_FIGURES = 4  # in a line
ORDER = ("removed", "perplexity", "accuracy", "speed", "memory", "other", "passes", "seconds")


@dataclass(frozen=True)
class Row:
    """One line of the summary. `change`: "20.0 %" removed, "x1.24" of the dense figure, "-1.3 points"."""

    group: str
    what: str
    dense: str
    pruned: str
    change: str


def summary(metrics: Mapping[str, float], plan: Plan, sites: Sequence[Site]) -> list[Row]:
    """The summary's lines, by group: what was removed, then every figure, dense beside pruned where both exist."""
    rows = _removed(metrics, plan, sites) + _measured(metrics)
    return sorted(rows, key=lambda row: ORDER.index(row.group))


def _removed(metrics: Mapping[str, float], plan: Plan, sites: Sequence[Site]) -> list[Row]:
    rows: list[Row] = []

    def counted(what: str, before: float, after: float) -> None:
        rows.append(Row("removed", what, f"{before:,}", f"{after:,}", _share(before - after, before)))

    by_kind = widths(plan, sites)
    for kind, layers in by_kind.items():
        counted(UNITS.get(kind, kind), sum(w.units for w in layers), sum(w.kept for w in layers))
    for kind, layers in by_kind.items():
        empty = sum(1 for w in layers if not w.kept and not w.block_gone)
        if empty and kind in SUBLAYERS:
            rows.append(Row("removed", SUBLAYERS[kind], f"{len(layers)}", f"{len(layers) - empty}", f"-{empty}"))
    gone = max((sum(w.block_gone for w in layers) for layers in by_kind.values()), default=0)
    if gone and "block" not in by_kind:
        count = max(map(len, by_kind.values()))
        counted(UNITS["block"], count, count - gone)
    dense, pruned = metrics.get("dense/params"), metrics.get("pruned/params")
    if dense is not None and pruned is not None:
        counted("parameters", dense, pruned)
    return rows + [Row("removed", what, "", "", _share(metrics[k], 1)) for k, what in COUNTED.items() if k in metrics]


def _measured(metrics: Mapping[str, float]) -> list[Row]:
    rows = []
    for key in metrics:
        side, _, name = key.partition("/")
        if key in ("dense/params", "pruned/params", *COUNTED) or (side == "dense" and f"pruned/{name}" in metrics):
            continue
        if side not in ("dense", "pruned"):
            name = key
        dense, pruned = metrics.get(f"dense/{name}"), metrics.get(key if name == key else f"pruned/{name}")
        group = metric_group(name)
        change = "" if dense is None or pruned is None else change_text(group, dense, pruned)
        rows.append(Row(group, _title(name), figure_text(name, dense), figure_text(name, pruned), change))
    return rows


def metric_group(name: str) -> str:
    parts = name.split("/")
    accuracy = any(part.startswith("acc") for part in parts)
    return "accuracy" if accuracy else GROUPS.get(parts[0], "other")


def _title(name: str) -> str:
    """Without the part that the heading says already."""
    first, _, rest = name.partition("/")
    return rest if rest and first in ("ppl", "passes", "seconds", "memory") else name


def _share(part: float, whole: float) -> str:
    # + 0.0: nothing removed is "+0.0 %", never "-0.0 %".
    return f"{-100 * part / whole + 0.0:+.1f} %" if whole else ""


def change_text(group: str, dense: float, pruned: float) -> str:
    if group == "accuracy":
        return f"{100 * (pruned - dense):+.1f} points"
    return f"x{pruned / dense:.3g}" if dense else ""


def figure_text(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if "bytes" in name:
        return size_text(value)
    if name.startswith("seconds"):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def summary_line(metrics: Mapping[str, float]) -> str:
    """What matters most of a job among many: the share removed, perplexities and accuracies, the time that it took.
    `summary.csv` has the rest."""
    figures = []
    for key, value in metrics.items():
        side, _, name = key.partition("/")
        if side == "pruned" and metric_group(name) in ("perplexity", "accuracy"):
            dense = figure_text(name, metrics.get(f"dense/{name}"))
            figures.append(f"{name} {dense and dense + ' -> '}{figure_text(name, value)}")
    more = [f"{len(figures) - MOST_FIGURES} more"] if len(figures) > MOST_FIGURES else []
    seconds = sum(value for key, value in metrics.items() if key.startswith("seconds/"))
    first = f"{_share(metrics['sparsity/decoder'], 1)} decoder parameters"
    return f"{', '.join([first, *figures[:MOST_FIGURES], *more])}, {seconds:.1f} s"


def summary_table(metrics: Mapping[str, float], plan: Plan, sites: Sequence[Site]) -> Table:
    """The summary as a rich table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, safe_box=True)
    table.add_column("", style="bold", no_wrap=True)
    table.add_column("", overflow="fold")
    for name in ("dense", "pruned", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    last = ""
    for row in summary(metrics, plan, sites):
        table.add_row("" if row.group == last else row.group, row.what, row.dense, row.pruned, row.change)
        last = row.group
    return table


def print_summary(metrics: Mapping[str, float], plan: Plan, sites: Sequence[Site], folder: Path) -> None:
    """The summary and where everything lies, on stdout: in colour on a terminal, plain text elsewhere."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    # Plain means plain: not even where FORCE_COLOR asks for escape codes in a file.
    colours, width = ("auto", None) if terminal else (None, 100)
    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    console = Console(file=sys.stdout, force_terminal=terminal, color_system=colours, width=width, **plain)
    console.print(summary_table(metrics, plan, sites))
    # soft_wrap: a long path stays one line, so that it can be copied.
    console.print(f"Everything is in {folder}", soft_wrap=True)
    if (folder / "model").is_dir():
        console.print(f"The pruned model is {folder / 'model'}", soft_wrap=True)

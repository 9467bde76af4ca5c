"""The figures of a report, as matplotlib draws them: narrow enough to be read on a telephone, told apart by marker and
dash as well as by colour."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

from pruneexp.report.methods import Runs
from pruneexp.report.points import Ablation, Cost, Priced, kept_shares
from pruneexp.report.statistics import grouped
from pruneexp.tracker.structure import UNITS, tick_step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.4  # inches
LEGEND = 56  # characters of a legend's line
INK, FAINT, GRID = "#1c2126", "#6a737c", "#d3d8dd"
# Okabe and Ito's colours, but for yellow and black: told apart by colour-blind readers, on white and on near-black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b98500", "#3f9fd8")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1.5, 2)))
KIND_NAMES = UNITS | {"attention": "attention heads (KV groups)"}


@dataclass(frozen=True)
class Picture:
    """`name` of its files; `in_words` is what it shows in words and numbers, for those who cannot see it."""

    name: str
    caption: str
    in_words: str
    figure: Figure

    @cached_property
    def svg(self) -> str:
        return as_svg(self.figure)


Style = dict[str, Any]
Looks = Mapping[str, Style]  # by method
WHOLE: Style = {"clip_on": False, "zorder": 3, "in_layout": False}  # of marks: not cut by the frame, nor under an axis


def look(k: int) -> Style:
    """The k-th way to tell marks apart, without lines."""
    return {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "linestyle": "none"}


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """One look a method, the same in every figure of a report."""
    return {m: look(k) | {"linestyle": DASHES[k // len(COLOURS) % len(DASHES)]} for k, m in enumerate(methods)}


def new_figure(height: float, rows: int) -> tuple[Figure, Axes]:
    """A figure with one panel and room below it for so many rows of a legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure and canvas by hand: pyplot would keep global state and may look for a screen.
    figure = Figure(figsize=(WIDTH, height + 0.19 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=10)
    return figure, axes


def wrapped(label: str, characters: int) -> str:
    return textwrap.fill(label, characters, break_on_hyphens=False)


def _legend_columns(labels: Sequence[str]) -> int:
    return 2 if all(len(label) <= 28 for label in labels) else 1


def legend_rows(labels: Sequence[str]) -> int:
    lines = sum(1 + wrapped(label, LEGEND).count("\n") for label in labels)
    return -(-lines // _legend_columns(labels))


def finish(figure: Figure, axes: Axes, cost: str, metric: str, grid: Literal["both", "y"] = "both") -> None:
    """What stands beside the axes, the grid, and the legend of what has been drawn."""
    axes.set_xlabel(cost)
    axes.set_ylabel(metric.replace("/", "/\n", 1) if len(metric) > 24 else metric)  # no longer than the axis
    axes.grid(axis=grid, color=GRID, linewidth=0.6)
    handles, labels = axes.get_legend_handles_labels()
    style: Style = {"frameon": False, "fontsize": 9, "labelcolor": INK, "ncols": _legend_columns(labels)}
    if handles:
        figure.legend(handles, [wrapped(label, LEGEND) for label in labels], loc="outside lower left", **style)


def log_scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where perplexities differ by more than a factor of three."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    range_ = max(values) / min(values) if values else 1.0
    if range_ > 3:
        axes.set_yscale("log")
        ticks = range(1, 10) if range_ < 8 else (1, 2, 5) if range_ < 300 else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=tuple(map(float, ticks))))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def pareto_figure(name: str, metric: str, cost: Cost, prices: Sequence[Priced], looks: Looks) -> Picture:
    """Perplexity against a measured cost; what no other point beats is filled, and joined."""
    front = sorted((one for one in prices if one.on_front), key=lambda one: one.cost)
    methods = grouped(prices, lambda one: one.method)
    figure, axes = new_figure(2.9, legend_rows([*methods, "front"]))
    steps: Style = {"where": "post", "color": INK, "linewidth": 1, "label": "front"}
    axes.step([one.cost for one in front], [one.ppl for one in front], **steps)
    for method, here in methods.items():
        style = {**looks.get(method, {"color": INK, "marker": "*"}), "linestyle": "none", "label": method}
        for on_front, marks in sorted(grouped(here, lambda one: one.on_front).items(), reverse=True):
            face = style["color"] if on_front else "none"
            x, y = [one.cost for one in marks], [one.ppl for one in marks]
            axes.plot(x, y, markersize=7, markerfacecolor=face, **style, **WHOLE)
            style["label"] = None
    log_scale(axes, [one.ppl for one in prices])
    axes.locator_params(axis="x", nbins=6)
    finish(figure, axes, cost.label, metric)
    in_words = "; ".join(f"{one.method} {one.ratio:g} ({one.cost:.4g}, {one.ppl:.4g})" for one in front)
    caption = f"{metric} against {cost.label}; lower is better in both. Filled: no other point beats it."
    return Picture(name, caption, f"on the front: {in_words}", figure)


def widths_figure(name: str, kind: str, rows: Mapping[str, Runs]) -> Picture | None:
    """The share of its units that each layer keeps: a row for each method and ratio (mean over its runs), a column for
    each layer. None where no plan names such units."""
    shares = {label: [kept_shares(one.run.plan) for one in members] for label, members in rows.items()}
    plans = [plan for of_row in shares.values() for plan in of_row]
    layers = 1 + max((layer for plan in plans for of_kind in plan.values() for layer in of_kind), default=0)
    table = {
        label: [sum(plan.get(kind, {}).get(k, 1.0) for plan in of_row) / len(of_row) for k in range(layers)]
        for label, of_row in shares.items()
        if any(kind in plan for plan in of_row)
    }
    if not table:
        return None
    labels = [wrapped(label, 46) for label in table]
    lines = max(label.count("\n") + 1 for label in labels)
    longest = max(len(line) for label in labels for line in label.split("\n"))
    figure, axes = new_figure(1.2 + (0.1 + 0.14 * lines) * len(table), 0)
    figure.set_figwidth(max(WIDTH, 2.2 + 0.075 * longest + 0.13 * layers))
    image = axes.imshow(list(table.values()), cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xticks(range(0, layers, tick_step(layers, 16)))
    axes.set_xlabel("layer")
    axes.set_title(f"{KIND_NAMES.get(kind, kind)} kept", fontsize=10, color=INK, loc="left")
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_ticks([0, 0.5, 1], labels=["0 %", "50 %", "100 %"])
    bar.ax.tick_params(colors=INK, labelsize=9)
    bar.outline.set_visible(False)
    in_words = "; ".join(f"{label} {' '.join(f'{100 * v:.0f}' for v in row)}" for label, row in table.items())
    return Picture(name, f"Share of {KIND_NAMES.get(kind, kind)} kept in each layer.", f"per cent: {in_words}", figure)


def effects_figure(name: str, study: Ablation) -> Picture:
    """Main effects: mean rise in log perplexity at each level, bars of one standard deviation over the runs there."""
    factors = grouped(study.effects, lambda effect: effect.factor)
    figure, axes = new_figure(0.9 + 0.26 * (len(study.effects) + len(factors)), 0)
    place, ticks, labels = 0.0, [], []
    for k, (factor, levels) in enumerate(factors.items()):
        places = [place + j for j in range(len(levels))]
        bars = [effect.spread or 0 for effect in levels]
        axes.errorbar([effect.mean for effect in levels], places, xerr=bars, capsize=3, **look(k))
        ticks += places
        first = wrapped(f"{factor} = {levels[0].level}", 34)
        labels += [first, *(wrapped(effect.level, 34) for effect in levels[1:])]
        place += len(levels) + 0.8
    axes.set_yticks(ticks, labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"rise in ln {study.metric}")
    axes.locator_params(axis="x", nbins=5)  # "-0.025" and its like are wide
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    in_words = "; ".join(f"{effect.factor}={effect.level} {effect.mean:.4g}" for effect in study.effects)
    text = f"Mean rise in ln {study.metric} at each level; bars of one standard deviation over the runs there."
    return Picture(name, text, in_words, figure)


def as_png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def as_svg(figure: Figure) -> str:
    """Text stays text; the same figure gives the same bytes."""
    import matplotlib

    file = BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pruneexp", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return file.getvalue().decode()

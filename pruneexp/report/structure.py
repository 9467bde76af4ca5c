"""What is left of each layer, as numbers and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneexp.types import Plan, Site

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = {"attention": "heads (KV groups)", "mlp": "FFN channels", "experts": "experts", "block": "layers"}
KEPT, GONE = "#2f6f9f", "#e9edf0"
OUTLINE, MARK = "#9aa5ad", "#b3412f"


@dataclass(frozen=True)
class Width:
    """Units of one kind in one layer of the original model, and the parameters that they carry."""

    layer: int
    kept: int
    units: int
    kept_params: int
    params: int
    block_gone: bool  # the whole layer leaves


def widths(plan: Plan, sites: Sequence[Site]) -> dict[str, list[Width]]:
    """What is left of each layer, by kind of site, in the order of the layers.

    A removed block takes its sublayers along. A kind that is there only as whole blocks is shown as such."""
    removed = {name for name, site in plan.sites.items() if site.kind == "block" and not site.kept}
    experts = {name: site for name, site in plan.sites.items() if site.kind == "experts"}
    inner = [site for site in sites if site.kind != "block"]
    found: dict[str, dict[int, Width]] = {}
    for site in sorted(inner or sites, key=lambda site: site.layer):
        layers = found.setdefault(site.kind, {})
        # A layer may hold several sites of a kind (experts): their units are counted together.
        before = layers.get(site.layer, Width(site.layer, 0, 0, 0, 0, False))
        gone = any(site.name == block or site.name.startswith(f"{block}.") for block in removed)
        mixture = experts.get(site.name.rpartition(".")[0]) if site.expert is not None else None
        left = mixture is None or site.expert in mixture.kept
        if mixture is not None:
            kept = 0 if gone else len(mixture.kept)
            whole = Width(site.layer, kept, mixture.units, 0, 0, gone)
            found.setdefault("experts", {})[site.layer] = whole
        kept = 0 if gone or not left else site.units - plan.removed(site)
        layers[site.layer] = Width(
            layer=site.layer,
            kept=before.kept + kept,
            units=before.units + site.units,
            kept_params=before.kept_params + kept * site.cost.params,
            params=before.params + site.units * site.cost.params,
            block_gone=gone,
        )
    return {kind: list(layers.values()) for kind, layers in found.items()}


def removed_share(plan: Plan, sites: Sequence[Site]) -> float:
    """Share of the prunable parameters (those that units carry) that leaves."""
    found = [width for layers in widths(plan, sites).values() for width in layers]
    total = sum(width.params for width in found)
    return 1 - sum(width.kept_params for width in found) / total if total else 0.0


def structure_figure(plan: Plan, sites: Sequence[Site], path: Path) -> None:
    """A PNG of the units kept in each layer, one panel per kind of site, the dense width as an outline.

    Drawn without axes: finding their margins and ticks takes several times as long as the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = widths(plan, sites)
    layers = max((w.layer + 1 for ws in panels.values() for w in ws), default=1)
    width, height = min(14.0, 7.0 + 0.1 * layers), 0.75 + 1.95 * max(len(panels), 1)
    # Figure and canvas by hand: pyplot would keep global state and may look for a screen.
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    title = f"{100 * removed_share(plan, sites):.1f} % of the prunable parameters removed"
    figure.text(0.5, 1 - 0.1 / height, title, fontsize=11, ha="center", va="top")
    for number, (kind, found) in enumerate(panels.items()):
        bottom = height - 0.65 - 1.45 - 1.95 * number
        _panel(figure, Frame(0.75, bottom, width - 0.9, 1.45, layers, max(w.units for w in found)), kind, found)
    figure.text(0.5, 0.1 / height, "layer", fontsize=9, ha="center", va="bottom")
    figure.savefig(path, dpi=130, format="png", pil_kwargs={"compress_level": 1})


@dataclass(frozen=True)
class Frame:
    """Where a panel lies in its figure, in inches, and what it shows: `layers` bars of up to `units`."""

    left: float
    bottom: float
    width: float
    height: float
    layers: int
    units: int

    def x(self, layer: float) -> float:
        return self.left + self.width * (layer + 0.7) / (self.layers + 0.4)

    def y(self, units: float) -> float:
        return self.bottom + self.height * units / (1.06 * self.units)

    def bar(self, layer: int, units: int) -> list[tuple[float, float]]:
        """Its corners."""
        left, right = self.x(layer - 0.4), self.x(layer + 0.4)
        return [(left, self.y(0)), (right, self.y(0)), (right, self.y(units)), (left, self.y(units))]


def _panel(figure: Figure, frame: Frame, kind: str, found: Sequence[Width]) -> None:
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.lines import Line2D

    inches: dict[str, Any] = {"transform": figure.dpi_scale_trans}
    right, top = frame.left + frame.width, frame.bottom + frame.height
    dense, kept = [frame.bar(w.layer, w.units) for w in found], [frame.bar(w.layer, w.kept) for w in found if w.kept]
    gone = [frame.bar(w.layer, w.units) for w in found if w.block_gone]
    emptied = [w.layer for w in found if not w.kept and not w.block_gone]
    figure.add_artist(PolyCollection(dense, facecolor=GONE, edgecolor=OUTLINE, linewidth=0.6, **inches))
    figure.add_artist(PolyCollection(kept, facecolor=KEPT, edgecolor=KEPT, linewidth=0.6, **inches))
    figure.add_artist(PolyCollection(gone, facecolor="none", edgecolor=OUTLINE, linewidth=0.6, hatch="////", **inches))
    # An emptied sublayer and a nearly empty one look alike without a mark.
    at, low = [frame.x(layer) for layer in emptied], [frame.y(0.06 * frame.units)] * len(emptied)
    figure.add_artist(Line2D(at, low, linestyle="", marker="x", markersize=5, color=MARK, **inches))
    columns, rows = range(0, frame.layers, _step(frame.layers, 22)), range(0, frame.units + 1, _step(frame.units, 5))
    ticks = [[(frame.x(layer), frame.bottom), (frame.x(layer), frame.bottom - 0.05)] for layer in columns]
    ticks += [[(frame.left - 0.05, frame.y(units)), (frame.left, frame.y(units))] for units in rows]
    sides = [[(frame.left, top), (frame.left, frame.bottom), (right, frame.bottom)]]
    figure.add_artist(LineCollection([*sides, *ticks], color="black", linewidth=0.8, **inches))
    small: dict[str, Any] = {"fontsize": 9, **inches}
    for layer in columns:
        figure.text(frame.x(layer), frame.bottom - 0.08, str(layer), ha="center", va="top", **small)
    for units in rows:
        figure.text(frame.left - 0.08, frame.y(units), str(units), ha="right", va="center", **small)
    figure.text(0.15, frame.bottom + frame.height / 2, UNITS.get(kind, kind), rotation=90, va="center", **small)
    figure.text(frame.left, top + 0.05, _caption(found, UNITS.get(kind, kind)), color="#444444", **small)


def _step(count: int, most: int) -> int:
    """The least of 1, 2, 5, 10, ... of which `count` holds at most `most`."""
    return next(digit * 10**power for power in range(12) for digit in (1, 2, 5) if count <= most * digit * 10**power)


def _caption(found: Sequence[Width], unit: str) -> str:
    units, kept = sum(w.units for w in found), sum(w.kept for w in found)
    words = [f"{kept:,} of {units:,} {unit} kept ({100 * kept / units:.1f} %)"]
    empty = sum(1 for w in found if not w.kept and not w.block_gone)
    gone = sum(w.block_gone for w in found)
    words += [f"{empty} emptied (x)"] * bool(empty) + [f"{gone} layers removed (hatched)"] * bool(gone)
    return ", ".join(words)

"""What is left of each layer, as numbers and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneexp.types import QUERY_HEADS, Plan, Site, Times

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

UNITS = {
    "attention": "heads (KV groups)",
    QUERY_HEADS: "query heads",
    "mlp": "FFN channels",
    "experts": "experts",
    "block": "layers",
}
KEPT, GONE = "#2f6f9f", "#e9edf0"
OUTLINE, MARK = "#9aa5ad", "#b3412f"
DPI = 110  # pixels


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

    A removed layer takes its sublayers along. A kind that is there only as whole layers is shown as such."""
    removed = {name for name, site in plan.sites.items() if site.kind == "block" and not site.kept}
    experts = {name: site for name, site in plan.sites.items() if site.kind == "experts"}
    fewer_heads = any(site.kept_query_heads is not None for site in plan.sites.values())
    inner = [site for site in sites if site.kind != "block"]
    by_kind: dict[str, dict[int, Width]] = {}
    for site in sorted(inner or sites, key=lambda site: site.layer):
        layers = by_kind.setdefault(site.kind, {})
        # A layer may hold several sites of a kind (experts): their units are counted together.
        before = layers.get(site.layer, Width(site.layer, 0, 0, 0, 0, False))
        gone = any(site.name == block or site.name.startswith(f"{block}.") for block in removed)
        mixture = experts.get(site.name.rpartition(".")[0]) if site.expert is not None else None
        kept = 0 if gone else site.units - plan.removed(site)
        if mixture is not None:
            whole = Width(site.layer, 0 if gone else len(mixture.kept), mixture.units, 0, 0, gone)
            by_kind.setdefault("experts", {})[site.layer] = whole
            kept = kept if site.expert in mixture.kept else 0
        if fewer_heads and site.kind == "attention":
            heads = site.units * site.group
            stay = kept * site.group - (0 if gone else plan.lost_heads(site))
            by_kind.setdefault(QUERY_HEADS, {})[site.layer] = Width(site.layer, stay, heads, 0, 0, gone)
        lost = 0 if gone or site.head_cost is None else plan.lost_heads(site) * site.head_cost.params
        layers[site.layer] = Width(
            layer=site.layer,
            kept=before.kept + kept,
            units=before.units + site.units,
            kept_params=before.kept_params + kept * site.cost.params - lost,
            params=before.params + site.units * site.cost.params,
            block_gone=gone,
        )
    return {kind: list(layers.values()) for kind, layers in by_kind.items()}


def removed_share(plan: Plan, sites: Sequence[Site]) -> float:
    """Share of the prunable parameters (those that units carry) that leaves."""
    everything = [width for layers in widths(plan, sites).values() for width in layers]
    total = sum(width.params for width in everything)
    return 1 - sum(width.kept_params for width in everything) / total if total else 0.0


def structure_figure(plan: Plan, sites: Sequence[Site], path: Path) -> None:
    """A PNG of the units kept in each layer, one panel per kind of site, the dense width as an outline.

    Drawn bar by bar: a plotting library takes as long to load, and to lay it out, as a small model to be pruned."""
    from PIL import Image, ImageDraw

    panels = widths(plan, sites)
    layers = max((w.layer + 1 for ws in panels.values() for w in ws), default=1)
    width, height = min(14.0, 7.0 + 0.1 * layers), 0.75 + 1.95 * max(len(panels), 1)
    image = Image.new("RGB", (round(DPI * width), round(DPI * height)), "white")
    draw = ImageDraw.Draw(image)
    title = f"{100 * removed_share(plan, sites):.1f} % of the prunable parameters removed"
    _text(draw, (DPI * width / 2, 0.1 * DPI), title, anchor="ma", points=11)
    for number, (kind, bars) in enumerate(panels.items()):
        units = max(w.units for w in bars)
        _panel(draw, Frame(0.6, 0.65 + 1.95 * number, width - 0.75, 1.45, layers, units), kind, bars)
    _text(draw, (DPI * width / 2, DPI * (height - 0.1)), "layer", anchor="md")
    image.save(path, format="PNG", compress_level=1)


@dataclass(frozen=True)
class Frame:
    """Where a panel lies in its figure, in inches from the left and the top, and what it shows: `layers` bars of up to
    `units`. Positions are in pixels."""

    left: float
    top: float
    width: float
    height: float
    layers: int
    units: int

    def x(self, layer: float) -> float:
        return DPI * (self.left + self.width * (layer + 0.7) / (self.layers + 0.4))

    def y(self, units: float) -> float:
        return DPI * (self.top + self.height * (1 - units / (1.06 * self.units)))

    def bar(self, layer: int, units: int) -> tuple[float, float, float, float]:
        """Its left, upper, right and lower edge."""
        return self.x(layer - 0.4), self.y(units), self.x(layer + 0.4), self.y(0)


def kept_times(
    kind: str, times: Times, plan: Plan, sites: Sequence[Site], origin: Sequence[int]
) -> list[tuple[int, float]]:
    """Units that each layer keeps of its "attention" or "mlp", and their milliseconds by the table; no time where the
    whole layer leaves. `origin`: which layer of the table each layer of the sites is."""
    by_kind, group = widths(plan, sites), {site.layer: site.group for site in sites if site.kind == kind}
    heads = {w.layer: w.kept for w in by_kind.get(QUERY_HEADS, ()) if kind == "attention"}
    marks = []
    for w in by_kind.get(kind, ()):
        each = heads[w.layer] // w.kept if w.kept and w.layer in heads else group[w.layer]
        ms = 0.0 if w.block_gone else times.layer(origin[w.layer]).sublayer(kind, w.kept, each)
        marks.append((w.kept, ms))
    return marks


def latency_figure(times: Times, plan: Plan, sites: Sequence[Site], origin: Sequence[int], path: Path) -> None:
    """A PNG of a latency table: milliseconds by what a sublayer keeps, with a bar as long as the interquartile range at
    each point, and a dot for what each layer keeps: below the line where query heads of kept groups left."""
    from PIL import Image, ImageDraw

    width, height, margin = 4.6, 3.0, 0.55  # inches of a panel
    image = Image.new("RGB", (round(DPI * 2 * width), round(DPI * height)), "white")
    draw = ImageDraw.Draw(image)
    for column, kind in enumerate(("attention", "mlp")):
        own = [site for site in sites if site.kind == kind]
        curves = list(dict.fromkeys(times.curve(kind, origin[site.layer]) for site in own))
        most = max((curve.most for curve in curves), default=1) or 1
        tallest = max((ms + iqr / 2 for curve in curves for _, ms, iqr in curve.points), default=1.0) or 1.0

        def at(kept: float, ms: float, left=column * width, most=most, tallest=tallest) -> tuple[float, float]:
            x = left + margin + kept / most * (width - 1.4 * margin)
            return DPI * x, DPI * (height - margin - ms / tallest * (height - 2 * margin))

        draw.line((*at(0, tallest), *at(0, 0), *at(most, 0)), fill="black")
        for curve in curves:
            draw.line([at(kept, ms) for kept, ms, _ in curve.points], fill=OUTLINE, width=2)
            for kept, ms, iqr in curve.points:
                draw.line((*at(kept, max(0.0, ms - iqr / 2)), *at(kept, ms + iqr / 2)), fill=OUTLINE, width=1)
        for kept, ms in kept_times(kind, times, plan, sites, origin):
            x, y = at(kept, ms)
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=KEPT)
        for kept in range(0, most + 1, tick_step(most, 5)):
            _text(draw, (at(kept, 0)[0], at(0, 0)[1] + 5), str(kept), anchor="ma")
        for share in (0.0, 0.5, 1.0):
            _text(draw, (at(0, 0)[0] - 5, at(0, share * tallest)[1]), f"{share * tallest:.3g}", anchor="rm")
        caption = f"ms by {UNITS[kind]} kept; bars: interquartile range"
        _text(draw, (at(0, 0)[0], 0.1 * DPI), caption, anchor="la", fill="#444444")
    image.save(path, format="PNG", compress_level=1)


def _panel(draw: ImageDraw, frame: Frame, kind: str, bars: Sequence[Width]) -> None:
    for w in bars:
        draw.rectangle(frame.bar(w.layer, w.units), fill=GONE, outline=OUTLINE)
        if w.kept:
            draw.rectangle(frame.bar(w.layer, w.kept), fill=KEPT)
        elif w.block_gone:
            _hatch(draw, frame.bar(w.layer, w.units))
        else:  # an emptied sublayer and a nearly empty one look alike without a mark
            x, y, arm = frame.x(w.layer), frame.y(0.06 * frame.units), 0.035 * DPI
            draw.line((x - arm, y - arm, x + arm, y + arm), fill=MARK, width=2)
            draw.line((x - arm, y + arm, x + arm, y - arm), fill=MARK, width=2)
    left, bottom, tick = DPI * frame.left, frame.y(0), 0.05 * DPI
    draw.line((left, DPI * frame.top, left, bottom, DPI * (frame.left + frame.width), bottom), fill="black")
    for layer in range(0, frame.layers, tick_step(frame.layers, 22)):
        draw.line((frame.x(layer), bottom, frame.x(layer), bottom + tick), fill="black")
        _text(draw, (frame.x(layer), bottom + 1.6 * tick), str(layer), anchor="ma")
    for units in range(0, frame.units + 1, tick_step(frame.units, 5)):
        draw.line((left - tick, frame.y(units), left, frame.y(units)), fill="black")
        _text(draw, (left - 1.6 * tick, frame.y(units)), str(units), anchor="rm")
    _text(draw, (left, DPI * (frame.top - 0.05)), _caption(bars, UNITS.get(kind, kind)), anchor="ld", fill="#444444")


def _hatch(draw: ImageDraw, bar: tuple[float, float, float, float]) -> None:
    """Slanting lines over a bar, cut off at its edges."""
    left, top, right, bottom = bar
    for start in range(round(top - bottom), round(right - left), round(0.09 * DPI)):
        near, far = max(0, -start), min(bottom - top, right - left - start)
        draw.line((left + start + near, bottom - near, left + start + far, bottom - far), fill=OUTLINE)


def _text(
    draw: ImageDraw, at: tuple[float, float], text: str, anchor: str, points: float = 9, fill: str = "black"
) -> None:
    draw.text(at, text, fill, _font(points * DPI / 72), anchor)


@cache
def _font(size: float) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def tick_step(count: int, most: int) -> int:
    """The least of 1, 2, 5, 10, ... of which `count` holds at most `most`."""
    return next(digit * 10**power for power in range(12) for digit in (1, 2, 5) if count <= most * digit * 10**power)


def _caption(bars: Sequence[Width], unit: str) -> str:
    units, kept = sum(w.units for w in bars), sum(w.kept for w in bars)
    words = [f"{kept:,} of {units:,} {unit} kept ({100 * kept / units:.1f} %)"]
    empty = sum(1 for w in bars if not w.kept and not w.block_gone)
    gone = sum(w.block_gone for w in bars)
    words += [f"{empty} emptied (x)"] * bool(empty)
    words += [f"{gone} layer{'s' * (gone > 1)} removed (hatched)"] * bool(gone)
    return ", ".join(words)

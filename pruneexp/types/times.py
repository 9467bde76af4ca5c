"""Times of sublayers by what they keep, as a table has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pruneexp.types.site import QUERY_HEADS, Site

PICOSECONDS = 1e9  # of a millisecond: whole numbers that no search rounds
LONGEST = 1e8  # milliseconds, a day: in picoseconds, those of all layers are an int64

Point = tuple[int, float, float]  # units kept, median milliseconds, their interquartile range
POINT = "[units kept, milliseconds, their interquartile range]"


@dataclass(frozen=True)
class Curve:
    """Milliseconds of a sublayer by the units that it keeps: straight between points, which ascend."""

    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        kept = [point[0] for point in self.points]
        if not kept or kept != sorted(set(kept)) or kept[0] < 0 or any(ms < 0 for _, ms, _ in self.points):
            raise ValueError(f"{[list(point) for point in self.points]!r}: expected [units, ms, iqr], units ascending")

    @property
    def most(self) -> int:
        """Units of the whole sublayer."""
        return self.points[-1][0]

    def at(self, kept: int) -> float:
        """Milliseconds with so many units; outside the measured range, those of the nearest point."""
        before = self.points[0]
        for after in self.points:
            if after[0] >= kept:
                share = (kept - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
                return before[1] + max(share, 0.0) * (after[1] - before[1])
            before = after
        return before[1]

    def slope(self, units: int) -> float:
        """Milliseconds that one of so many units takes: the mean down to the fewest units measured, never below 0. The
        point of no units is left out: the step to it is that of a sublayer which leaves as a whole."""
        fewest = next((kept for kept, _, _ in self.points if kept), 0)
        fewest = fewest if fewest < units else 0
        return max(0.0, (self.at(units) - self.at(fewest)) / (units - fewest)) if units else 0.0


@dataclass(frozen=True)
class LayerTimes:
    """Times of layers that are alike: of attention by KV groups, of an FFN by channels, each with half of what the
    layer takes besides. `query_heads`: of attention with all KV groups, by the query heads that each of them keeps;
    None where a group has one."""

    layers: tuple[int, ...]  # indices in the model as it was before pruning
    attention: Curve
    ffn: Curve
    query_heads: Curve | None = None

    def sublayer(self, kind: str, units: int, heads: int) -> float:
        """Milliseconds of a sublayer that keeps `units`: channels of "mlp", KV groups of attention with `heads` query
        heads each, or turns of query heads."""
        if kind == "mlp":
            return self.ffn.at(units)
        if kind == QUERY_HEADS:
            units, heads = self.attention.most, units
        lost = 0.0
        if self.query_heads is not None and units and heads < self.query_heads.most:
            lost = self.query_heads.at(self.query_heads.most) - self.query_heads.at(heads)
        return self.attention.at(units) - lost * units / self.attention.most


@dataclass(frozen=True)
class Times:
    """A table's curves, for every layer of the model as it was before pruning."""

    of: tuple[LayerTimes, ...]

    def layer(self, index: int) -> LayerTimes:
        return next(each for each in self.of if index in each.layers)

    def curve(self, kind: str, index: int) -> Curve:
        """Of "attention" or "mlp" in the original layer `index`."""
        return self.layer(index).attention if kind == "attention" else self.layer(index).ffn

    def total(self, index: int, sites: Sequence[Site]) -> int:
        """Picoseconds of the original layer `index` of which the sublayers `sites` are left."""
        own, there = self.layer(index), {site.kind: site for site in sites}
        attention, ffn = there.get("attention"), there.get("mlp")
        groups, heads = (0, 0) if attention is None else (attention.units, attention.group)
        ms = own.sublayer("attention", groups, heads) + own.sublayer("mlp", ffn.units if ffn else 0, 0)
        return round(ms * PICOSECONDS)

    def freed(self, index: int, site: Site, removed: int, lost_heads: int) -> int:
        """Picoseconds that leave the original layer `index` with `removed` units of a site, and with so many query
        heads of units that stay."""
        if site.kind not in ("attention", "mlp", QUERY_HEADS):
            return removed * site.cost.picoseconds
        own, kept = self.layer(index), site.units - removed
        heads = site.group - (lost_heads // kept if kept else 0)
        before, after = own.sublayer(site.kind, site.units, site.group), own.sublayer(site.kind, kept, heads)
        return round((before - after) * PICOSECONDS)

    def priced(self, index: int, site: Site, units: bool = True, whole: bool = False) -> Site:
        """A site of the original layer `index`, priced. Where `units` may leave, one costs the slope of the curve;
        where only all of them may, its equal part of the sublayer's time. Where the `whole` may leave as well, the rest
        of that time stands beside."""
        if site.kind not in ("attention", "mlp"):
            return site
        own, curve = self.layer(index), self.curve(site.kind, index)
        most = max(0.0, curve.at(site.units) - curve.at(0))
        slope = curve.slope(site.units) if units else most / site.units
        beside = max(0, round((most - site.units * slope) * PICOSECONDS)) if whole else 0
        cost, head_cost = replace(site.cost, picoseconds=round(slope * PICOSECONDS)), site.head_cost
        if head_cost is not None and own.query_heads is not None:
            each = own.query_heads.slope(site.group) / own.attention.most
            head_cost = replace(head_cost, picoseconds=round(each * PICOSECONDS))
        return replace(site, cost=cost, head_cost=head_cost, beside=replace(site.beside, picoseconds=beside))


def curve_of(points: Sequence[Sequence[float]]) -> Curve:
    """From a table's lists. Raises ValueError."""
    if not isinstance(points, list) or not points:
        raise ValueError(f"{points!r:.60}: expected a list of {POINT}")
    before = -1
    for point in points:
        numbers = isinstance(point, list) and len(point) == 3 and all(type(value) in (int, float) for value in point)
        if not numbers or not all(0 <= value < LONGEST for value in point) or point[0] != int(point[0]):
            raise ValueError(f"{point!r:.60}: expected {POINT}")
        if point[0] <= before:
            raise ValueError(f"{point!r:.60} comes after {before} units: expected units ascending")
        before = int(point[0])
    return Curve(tuple((int(kept), float(ms), float(iqr)) for kept, ms, iqr in points))


def times_of(data: Sequence[Mapping[str, Any]]) -> Times:
    """From a table's `layers`. Raises ValueError, KeyError."""
    if not isinstance(data, list) or not all(isinstance(own, dict) for own in data):
        raise ValueError(f"layers={data!r:.60}: expected a list of objects")
    layer_times, known = [], set()
    for own in data:
        layers = own["layers"]
        if not isinstance(layers, list) or not all(type(index) is int for index in layers):
            raise ValueError(f"layers={layers!r:.60}: expected a list of layers' indices")
        if twice := sorted(known & {*layers}):
            raise ValueError(f"layers={layers!r:.60}: has times of layer {twice[0]} a second time")
        known |= {*layers}
        heads = _named("query_heads", own) if own.get("query_heads") else None
        layer_times.append(LayerTimes(tuple(layers), _named("attention", own), _named("ffn", own), heads))
    return Times(tuple(layer_times))


def _named(name: str, own: Mapping[str, Any]) -> Curve:
    try:
        return curve_of(own[name])
    except ValueError as error:
        raise ValueError(f"{name} of layers {list(own['layers'])}: {error}") from error

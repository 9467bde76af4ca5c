"""A latency table as data and as a file: what it was measured on, at what, and the times by what sublayers keep."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pruneexp.types import ConfigError, Curve, Times, one_line, times_of

VERSION = 1
KINDS = {"int": "an integer", "str": "text"}
SPREAD, MANY = 0.25, 0.25  # interquartile range over median that says little; share of the points that may have it


@dataclass(frozen=True)
class Conditions:
    """What times depend on. `model`: hidden size, head size, and of each layer its KV groups, their query heads and its
    FFN channels."""

    device: str
    threads: int
    dtype: str
    attention: str  # implementation
    torch: str
    model: Mapping[str, Any]
    batch: int
    context: int
    phase: str


@dataclass(frozen=True)
class Table:
    """Times at some conditions; `source`: the file that they came from, None where they were measured here."""

    conditions: Conditions
    times: Times
    source: str | None = None

    def to_json(self) -> str:
        """The file: `version`, the conditions, and `layers`: of those that are alike, by what is kept, [units,
        milliseconds, interquartile range] of `attention` (KV groups), `ffn` (channels) and `query_heads` (of each
        group; empty where a group has one)."""

        def points(curve: Curve | None) -> str:
            return json.dumps([[kept, round(ms, 6), round(iqr, 6)] for kept, ms, iqr in curve.points] if curve else [])

        layers = ",\n".join(
            f'  {{"layers": {json.dumps(list(own.layers))},\n   "attention": {points(own.attention)},\n'
            f'   "query_heads": {points(own.query_heads)},\n   "ffn": {points(own.ffn)}}}'
            for own in self.times.of
        )
        head = "".join(f' "{key}": {json.dumps(value)},\n' for key, value in asdict(self.conditions).items())
        return f'{{"version": {VERSION},\n{head} "layers": [\n{layers}\n ]}}\n'

    @property
    def curves(self) -> list[Curve]:
        return [c for own in self.times.of for c in (own.attention, own.ffn, own.query_heads) if c is not None]

    def unsteady(self) -> tuple[int, int]:
        """How many points spread too much to be trusted, and how many there are."""
        points = [point for curve in self.curves for point in curve.points]
        return sum(iqr > SPREAD * ms for _, ms, iqr in points), len(points)

    @property
    def steady(self) -> bool:
        wide, points = self.unsteady()
        return wide <= MANY * points


def read_table(path: str) -> Table:
    """Raises ConfigError, naming `sparsity.table`, for what is no table."""
    where = f"sparsity.table={path!r}"
    try:
        data = json.loads(Path(os.path.expanduser(path)).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{where}: {error.strerror or error}; expected a run's latency.json, or one like it"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is no JSON ({error}); expected a run's latency.json, or one like it") from None
    try:
        if not isinstance(data, dict):
            raise ValueError(f"is a {type(data).__name__}, no object")
        for name, kind in Conditions.__annotations__.items():
            if kind in ("int", "str") and name in data and type(data[name]).__name__ != kind:
                raise ValueError(f"{name}={data[name]!r:.60}: expected {KINDS[kind]}")
        if data["version"] != VERSION:
            raise ValueError(f"version={data['version']!r}: expected {VERSION}")
        conditions = Conditions(**{name: data[name] for name in Conditions.__dataclass_fields__})
        return Table(conditions, times_of(data["layers"]), path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        lacks = f"has no {error}" if isinstance(error, KeyError) else one_line(error)
        raise ConfigError(f"{where}: {lacks}; expected a table as a run's latency.json is") from None


def check_table(table: Table, conditions: Conditions, by_query_head: bool = False) -> None:
    """Raises ConfigError where a table from a file is of another model, or at other conditions than those asked for, or
    has no times of query heads, which are to leave `by_query_head`. Devices, threads and versions may differ."""
    where = f"sparsity.table={table.source!r}"
    for name in ("model", "dtype", "batch", "context", "phase"):
        has, wanted = (json.loads(json.dumps(getattr(each, name))) for each in (table.conditions, conditions))
        if has != wanted and name == "model":
            if not isinstance(has, dict) or has.keys() != wanted.keys():
                raise ConfigError(f"{where}: has model={has!r:.60}; expected an object of {', '.join(wanted)}")
            raise ConfigError(f"{where}: is of a model with {_difference(has, wanted)}, as this one has")
        if has != wanted:
            key = "model.dtype" if name == "dtype" else f"sparsity.{name}"
            raise ConfigError(f"{where}: is at {name}={has}; expected {key}={wanted}, as asked for")
    widths: Sequence[Sequence[int]] = conditions.model["widths"]
    if beyond := {index for own in table.times.of for index in own.layers if not 0 <= index < len(widths)}:
        raise ConfigError(f"{where}: has times of layer {min(beyond)}; expected 0 to {len(widths) - 1}, all layers")
    for index, (groups, heads, channels) in enumerate(widths):
        own = next((each for each in table.times.of if index in each.layers), None)
        if own is None:
            raise ConfigError(f"{where}: has no times of layer {index}; expected those of all {len(widths)}")
        ends = [("attention", own.attention, 0, groups), ("ffn", own.ffn, 0, channels)]
        if own.query_heads is not None:
            ends.append(("query_heads", own.query_heads, 1, heads))
        elif by_query_head and heads > 1:
            raise ConfigError(f"{where}: has no query_heads of layer {index}; expected times of 1 to {heads}")
        for name, curve, least, whole in ends:
            if curve.most != whole or (whole and curve.points[0][0] > least):
                raise ConfigError(
                    f"{where}: {name} of layer {index} goes from {curve.points[0][0]} to {curve.most}; expected "
                    f"{least} to {whole}, all that it has"
                )


def _difference(has: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first of what two models have differently; of the widths of all layers, the first that differ."""
    key = next(key for key in wanted if has[key] != wanted[key])
    ours, theirs = wanted[key], has[key]
    if key != "widths" or not isinstance(theirs, list):
        return f"{key}={theirs!s:.60}; expected {ours}"
    if len(theirs) != len(ours):
        return f"{len(theirs)} layers; expected {len(ours)}"
    layer = next(layer for layer, own in enumerate(ours) if own != theirs[layer])
    what = "KV groups, query heads of each, FFN channels"
    return f"widths={theirs[layer]!s:.60} ({what}) in layer {layer}; expected {ours[layer]}"


def same_device(table: Table, here: Conditions) -> bool:
    return (table.conditions.device, table.conditions.threads) == (here.device, here.threads)

"""What the papers print: their tables as data, one YAML file each, with source, protocol and how certain a figure is.

A table names methods (with the recipes of ours that they are, and what they calibrated on) and columns (model, metric
in our naming, unit); a row is a method at a ratio. Tables whose figures were not found say so under `missing`.

    certainty   read: in the authors' repository or a figure of the paper; second_hand: quoted elsewhere; inferred:
                worked out from other figures; unknown: not found
    tolerance   this project's own: how near ours should come, `relative` or, for percentages, in `points`; as wide as
                the distance of what others found, where that is wider
    reproduced  of a row: what others found who ran the method themselves; `reproduced_by` says who, and how sure it is
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Claim", "Published", "Source", "Table", "read_table", "tables"]

CERTAINTY = ("read", "second_hand", "inferred", "unknown")
TABLE_KEYS = {"title", "source", "certainty", "model", "unit", "recipes", "protocol", "tolerance", "methods", "columns"}
TABLE_KEYS |= {"rows", "missing", "claims", "reproduced_by"}
METHOD_KEYS = {"recipes", "settings", "recovery", "calibration", "note"}
COLUMN_KEYS = {"model", "metric", "unit", "mean_of", "certainty"}
ROW_KEYS = {"method", "ratio", "values", "reproduced", "note"}
PROTOCOL_KEYS = {"window", "bos", "split", "text", "checkpoint", "harness", "score", "hardware", "note"}
ROUNDING = 0.011  # of a printed mean: two decimals, cut off rather than rounded in some rows


@dataclass(frozen=True)
class Source:
    paper: str
    arxiv: str
    table: str
    read_in: str  # where this project read it


@dataclass(frozen=True)
class Published:
    """One figure. `recipes`: ours that are this method, where `settings` hold; "dense" for the model before pruning."""

    source: Source
    model: str  # name of the option in conf/model where there is one
    metric: str  # as in metrics.json, without "dense/" or "pruned/"
    mean_of: tuple[str, ...]  # metrics whose mean it is, where the table prints them, too
    unit: str  # "perplexity", "percent", ...
    method: str  # as printed
    ratio: float  # nominal share removed
    value: float
    tolerance: float  # largest distance from `value` that counts as reproduced, in its unit
    certainty: str
    recipes: tuple[str, ...]
    settings: Mapping[str, Any]  # config keys without which it is another method
    recovery: str  # "none", "lora", or what else was trained
    calibration: Mapping[str, Any] | None  # dataset, samples, length; None: not stated, or no data
    protocol: Mapping[str, Any]
    note: str
    reproduced: float | None  # what others found
    reproduced_by: str


@dataclass(frozen=True)
class Claim:
    """What a paper says in words; `value` is None where it gives no figure."""

    what: str
    value: float | None
    unit: str
    certainty: str


@dataclass(frozen=True)
class Table:
    name: str  # of the file
    title: str
    source: Source
    certainty: str
    recipes: tuple[str, ...]  # ours that it concerns
    figures: tuple[Published, ...]
    missing: str  # why there are no figures, "" where there are
    claims: tuple[Claim, ...]


@cache
def tables() -> tuple[Table, ...]:
    """Every table that travels with the package, by name. Raises ValueError where one is not whole."""
    return tuple(read_table(path) for path in sorted(Path(__file__).parent.glob("*.yaml")))


def read_table(path: Path) -> Table:
    """Raises ValueError, naming the file, for keys that nothing reads, rows and columns that do not fit, figures that
    are no positive numbers, figures given twice, and means that are not the mean."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return _table(path.stem, data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path.name}: {kind}{error}") from error


def _table(name: str, data: Mapping[str, Any]) -> Table:
    _known("table", data, TABLE_KEYS)
    _known("protocol", data.get("protocol") or {}, PROTOCOL_KEYS)
    source = Source(**{key: str(value) for key, value in data["source"].items()})
    certainty = _certain(data["certainty"])
    if bool(data.get("rows")) == bool(data.get("missing")):
        raise ValueError("expected rows, or `missing` that says why there are none")
    figures = tuple(_figures(data, source)) if data.get("rows") else ()
    keys = Counter((figure.model, figure.metric, figure.method, figure.ratio) for figure in figures)
    if twice := [key for key, count in keys.items() if count > 1]:
        raise ValueError(f"{twice[0]}: given twice")
    recipes = {recipe for figure in figures for recipe in figure.recipes} | set(data.get("recipes", ()))
    named, missing, claims = tuple(sorted(recipes - {"dense"})), str(data.get("missing", "")), []
    for claim in data.get("claims", ()):
        _known("claim", claim, {"what", "value", "unit", "certainty"})
        value = None if claim.get("value") is None else float(claim["value"])
        claims.append(Claim(str(claim["what"]), value, claim.get("unit", ""), _certain(claim["certainty"])))
    return Table(name, str(data["title"]), source, certainty, named, figures, missing, tuple(claims))


def _figures(data: Mapping[str, Any], source: Source) -> Iterator[Published]:
    columns, methods = data["columns"], data["methods"]
    for name, column in columns.items():
        _known(f"column {name}", column, COLUMN_KEYS)
    for name, method in methods.items():
        _known(f"method {name}", method, METHOD_KEYS)
    for row in data["rows"]:
        where = f"{row['method']} at {row['ratio']}"
        _known(where, row, ROW_KEYS)
        method, ratio = methods[row["method"]], float(row["ratio"])
        if not 0 <= ratio < 1 or (ratio == 0) != ("dense" in method.get("recipes", ())):
            raise ValueError(f"{where}: expected a ratio in [0, 1), 0 for the dense model alone")
        values = _values(where, row["values"], columns)
        by_others = _by_others(where, row, values, data)
        for name, value in values.items():
            column, others = columns[name], by_others.get(name)
            unit = str(column.get("unit") or data.get("unit") or "perplexity")
            tolerance = data["tolerance"]["points"] if unit == "percent" else data["tolerance"]["relative"] * value
            tolerance = max(tolerance, 0.0 if others is None else abs(others - value))
            yield Published(
                source=source,
                model=str(column.get("model") or data["model"]),
                metric=str(column["metric"]),
                mean_of=tuple(str(columns[part]["metric"]) for part in column.get("mean_of", ())),
                unit=unit,
                method=str(row["method"]),
                ratio=ratio,
                value=value,
                tolerance=float(tolerance),
                certainty=_certain(column.get("certainty") or data["certainty"]),
                recipes=tuple(method.get("recipes", ())),
                settings=dict(method.get("settings") or {}),
                recovery=str(method.get("recovery", "none")),
                calibration=method.get("calibration"),
                protocol=dict(data.get("protocol") or {}),
                note="; ".join(str(part["note"]) for part in (method, row) if part.get("note")),
                reproduced=others,
                reproduced_by="" if others is None else str(data["reproduced_by"]),
            )


def _by_others(
    where: str, row: Mapping[str, Any], values: Mapping[str, float], data: Mapping[str, Any]
) -> dict[str, float]:
    """What others found, by column. Raises ValueError where a figure stands beside none, or nobody is named."""
    figures = {name: _positive(f"{where}, {name}", value) for name, value in (row.get("reproduced") or {}).items()}
    _known(f"{where}, reproduced", figures, set(values))
    if figures and not data.get("reproduced_by"):
        raise ValueError(f"{where}: expected `reproduced_by`, who reproduced it")
    return figures


def _values(where: str, values: Any, columns: Mapping[str, Any]) -> dict[str, float]:
    """A row's figures by column. Raises ValueError where they do not fit, or a mean is not that of its columns."""
    if isinstance(values, list):
        if len(values) != len(columns):
            raise ValueError(f"{where}: {len(values)} values for {len(columns)} columns")
        values = dict(zip(columns, values, strict=True))
    _known(where, values, set(columns))
    values = {name: _positive(f"{where}, {name}", value) for name, value in values.items()}
    for name, column in columns.items():
        if parts := column.get("mean_of"):
            mean = sum(values[part] for part in parts) / len(parts)
            if abs(mean - values[name]) > ROUNDING:
                raise ValueError(f"{where}: {name} is {values[name]}, the mean of its columns {mean:.3f}")
    return values


def _positive(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{where}: {value!r}: expected a positive number")
    return float(value)


def _certain(word: str) -> str:
    if word not in CERTAINTY:
        raise ValueError(f"certainty={word!r}: expected one of {', '.join(CERTAINTY)}")
    return word


def _known(where: str, given: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(set(given) - known):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; expected {', '.join(sorted(known))}")

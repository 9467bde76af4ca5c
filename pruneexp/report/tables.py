"""A table once, as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
LONG = 48  # characters from which on a cell may break its line


@dataclass(frozen=True)
class Cell:
    """`text` is what people read; `value` the number itself, written out in full where programs read. `mark`: "flag" or
    "published", a CSS class."""

    text: str
    value: float | None = None
    mark: str = ""

    @property
    def classes(self) -> str:
        kind = "number" if self.value is not None else "long" if len(self.text) > LONG else ""
        return f"{self.mark} {kind}".strip()


@dataclass(frozen=True)
class Table:
    """`title` names it on the page, `name` its files. Columns of numbers are set flush right."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def numeric(self, column: int) -> bool:
        return any(row[column].value is not None for row in self.rows)


def table(name: str, title: str, items: Iterable[T], columns: Mapping[str, Callable[[T], Any]]) -> Table:
    """A row an item. A column is its heading and what it shows of an item: a cell, a number (or None), or text."""
    rows = tuple(tuple(_cell(show(item)) for show in columns.values()) for item in items)
    return Table(name, title, tuple(columns), rows)


def _cell(shown: Any) -> Cell:
    if isinstance(shown, Cell):
        return shown
    return Cell(shown) if isinstance(shown, str) else number(shown)


def number(value: float | None, unit: str = "") -> Cell:
    """Four significant digits, whole numbers whole; `value` in full."""
    if value is None:
        return Cell("")
    if unit == "bytes":
        return Cell(_bytes(value), value)
    if unit == "share":
        return Cell(f"{100 * value:.2f} %", value)
    if unit == "accuracy":
        return Cell(f"{value:.4f}", value)
    if isinstance(value, int) or (unit == "count" and value.is_integer()):
        return Cell(f"{value:,.0f}", value)
    return Cell(f"{value:#.4g}".rstrip(".") if abs(value) < 1e4 else f"{value:,.0f}", value)


def ratio(value: float) -> Cell:
    """A ratio as it was asked for."""
    return Cell(f"{value:g}", value)


def count(number: int, what: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _bytes(value: float) -> str:
    units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    return next((f"{value / size:,.2f} {unit}" for unit, size in units if value >= size), f"{value:,.0f} B")


def as_csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.header)
    for row in table.rows:
        writer.writerow([cell.text if cell.value is None else repr(cell.value) for cell in row])
    return text.getvalue()


def as_markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rule = ["---:" if table.numeric(k) else "---" for k in range(len(table.header))]
    rows = [line([_markdown(cell.text) for cell in row]) for row in table.rows]
    return "\n".join([line([_markdown(name) for name in table.header]), line(rule), *rows]) + "\n"


def _markdown(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    return escaped.replace("*", "\\*").replace("_", "\\_")


def as_latex(table: Table) -> str:
    columns = "".join("r" if table.numeric(k) else "l" for k in range(len(table.header)))

    def line(cells: Sequence[str]) -> str:
        return " & ".join(cells) + r" \\"

    rows = [line([_latex(cell.text) for cell in row]) for row in table.rows]
    head = line([_latex(name) for name in table.header])
    body = "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\hline", head, r"\hline", *rows, r"\hline"])
    return body + "\n\\end{tabular}\n"


SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {character: f"\\{character}" for character in "&%$#_{}"}
SPECIAL |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "\n": " ", "±": r"$\pm$", "×": r"$\times$"}


def _latex(text: str) -> str:
    return "".join(SPECIAL.get(character, character) for character in text)

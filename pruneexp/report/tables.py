"""A table once, as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pruneexp.types import size_text

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

    def cell(shown: Any) -> Cell:
        return shown if isinstance(shown, Cell) else Cell(shown) if isinstance(shown, str) else number(shown)

    rows = tuple(tuple(cell(show(item)) for show in columns.values()) for item in items)
    return Table(name, title, tuple(columns), rows)


def number(value: float | None, unit: str = "") -> Cell:
    """Four significant digits, whole numbers whole; `value` in full."""
    if value is None:
        return Cell("")
    if unit == "bytes":
        return Cell(size_text(value, 4), value)
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


def count(number: int | None, what: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def as_csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.header)
    for row in table.rows:
        writer.writerow([cell.text if cell.value is None else repr(cell.value) for cell in row])
    return text.getvalue()


MARKDOWN = str.maketrans({"\\": r"\\", "|": r"\|", "*": r"\*", "_": r"\_", "<": "&lt;", "\n": " "})
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " "}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "×": r"$\times$"}
)


def as_markdown(table: Table) -> str:
    rule = ["---:" if table.numeric(k) else "---" for k in range(len(table.header))]
    rows = [[cell.text.translate(MARKDOWN) for cell in row] for row in table.rows]
    lines = [[name.translate(MARKDOWN) for name in table.header], rule, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_latex(table: Table) -> str:
    columns = "".join("r" if table.numeric(k) else "l" for k in range(len(table.header)))
    head, *rows = (
        " & ".join(text.translate(LATEX) for text in line) + r" \\"
        for line in (table.header, *([cell.text for cell in row] for row in table.rows))
    )
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", head, r"\hline", *rows, r"\hline", r"\end{tabular}"]
    return "\n".join(lines) + "\n"

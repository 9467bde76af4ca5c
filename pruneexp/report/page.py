"""The page: sections of text, tables and figures, in one HTML file that refers to nothing outside itself."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pruneexp.report.figures import FAINT, GRID, INK, WIDTH, Picture
from pruneexp.report.tables import Table


@dataclass(frozen=True)
class Folded:
    """Text behind its title."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """`anchor` names it in links. `lines` are paragraphs; what follows them comes in this order. `fold`: what the
    folded texts are, all behind this title."""

    anchor: str
    title: str
    lines: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    folded: Sequence[Folded] = ()
    fold: str = ""


@dataclass(frozen=True)
class Report:
    """What is written: the page's parts, every table (some go to files alone) and every figure. `notes` stand at the
    end of the page."""

    title: str
    lines: Sequence[str]
    sections: Sequence[Section]
    notes: Sequence[str]
    tables: Sequence[Table]

    @property
    def pictures(self) -> list[Picture]:
        return [picture for section in self.sections for picture in section.pictures]


def page(report: Report) -> str:
    """The whole file."""
    from jinja2 import Template

    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return Template(template, autoescape=True, keep_trailing_newline=True).render(report=report, inline=_inline)


def _inline(picture: Picture) -> str:
    """The figure as part of a page: no header, no reference outside, identifiers of its own, the page's ink and ground.
    Its label is what screen readers say."""
    text = re.sub(r"<metadata>.*?</metadata>", "", picture.svg[picture.svg.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{picture.name}-", text)
    # matplotlib writes colours into every element, where no style sheet reaches them; a variable is reached.
    for colour, variable in ((INK, "ink"), (FAINT, "faint"), (GRID, "grid"), ("#ffffff", "ground")):
        text = text.replace(colour, f"var(--{variable})")
    width = re.match(r'<svg[^>]*\swidth="([\d.]+)pt"', text)
    text = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", text, count=2)
    own = float(width[1]) * 4 / 3 if width else WIDTH * 96  # pixels
    size = f"width:100%;min-width:{0.8 * own:.0f}px;max-width:{1.35 * own:.0f}px"
    label = html.escape(f"{picture.caption} {picture.in_words}", quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}" style="{size}"', 1)

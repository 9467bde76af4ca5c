"""The page: sections of text, tables and figures, in one HTML file that refers to nothing outside itself."""

from __future__ import annotations

import html
import re
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
    lines: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    folded: tuple[Folded, ...] = ()
    fold: str = ""


@dataclass(frozen=True)
class Report:
    """What is written: the page's parts, every table (some go to files alone) and every figure. `notes` stand at the
    end of the page."""

    title: str
    lines: tuple[str, ...]
    sections: tuple[Section, ...]
    notes: tuple[str, ...]
    tables: tuple[Table, ...]

    @property
    def pictures(self) -> list[Picture]:
        return [picture for section in self.sections for picture in section.pictures]


def page(report: Report) -> str:
    """The whole file."""
    from jinja2 import Template

    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return Template(template, autoescape=True, keep_trailing_newline=True).render(report=report, inline=_inline)


def _inline(picture: Picture) -> str:
    return _inline_svg(picture.svg, f"{picture.caption} {picture.told}", f"{picture.name}-")


def _inline_svg(svg: str, label: str, prefix: str) -> str:
    """The figure as part of a page: no header, no reference outside, identifiers of its own, the page's ink and ground.
    `label` is what screen readers say."""
    text = svg[svg.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'href="#', f'href="#{prefix}', text)
    text = re.sub(r"url\(#", f"url(#{prefix}", text)
    # matplotlib writes colours into every element, where no style sheet reaches them; a variable is reached.
    for colour, variable in ((INK, "ink"), (FAINT, "faint"), (GRID, "grid"), ("#ffffff", "ground")):
        text = text.replace(colour, f"var(--{variable})")
    width = re.match(r'<svg[^>]*\swidth="([\d.]+)pt"', text)
    text = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", text, count=2)
    own = float(width[1]) * 4 / 3 if width else WIDTH * 96  # pixels
    size = f"width:100%;min-width:{0.8 * own:.0f}px;max-width:{1.35 * own:.0f}px"
    label = html.escape(label, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}" style="{size}"', 1)

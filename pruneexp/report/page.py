"""The page: sections of text, tables and figures, in one HTML file that refers to nothing outside itself."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pruneexp.report.figures import FAINT, GRID, INK, WIDTH, Picture
from pruneexp.report.tables import Table, as_html

STYLE = """
:root { --ink: #1c2126; --faint: #6a737c; --grid: #d3d8dd; --ground: #ffffff; --band: #f3f5f7; --link: #0b5cad;
  --flag: #9c2a10; --published: #5b3a86; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --faint: #98a2ac; --grid: #3a424a; --ground: #14181c;
  --band: #1e2429; --link: #7db7f0; --flag: #ff9d85; --published: #c9a8f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 88rem; color: var(--ink); background: var(--ground);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--grid); padding-bottom: .2rem; }
p, li { max-width: 50rem; overflow-wrap: anywhere; }
a { color: var(--link); }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
.wide:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .88rem; }
caption { text-align: left; color: var(--faint); padding-bottom: .3rem; }
th, td { padding: .28rem .7rem .28rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid); }
th { white-space: nowrap; background: var(--band); padding-left: .35rem; } td { padding-left: .35rem; }
tr > :first-child { position: sticky; left: 0; } td:first-child { background: var(--ground); }
td { white-space: nowrap; } td.long { white-space: normal; min-width: 15rem; overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.flag { color: var(--flag); font-weight: 600; }
.published { color: var(--published); font-style: italic; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; min-width: 0; } figure svg { display: block; height: auto; }
figcaption { color: var(--faint); font-size: .85rem; overflow-wrap: anywhere; }
details { margin: .5rem 0; } details details { margin-left: 1.2rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { background: var(--band); padding: .8rem; overflow-x: auto; font-size: .8rem; line-height: 1.4; }
@media print { details > pre { display: none; } }
"""


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


def page(title: str, lines: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole file."""
    links = "".join(f"<li><a href='#{one.anchor}'>{html.escape(one.title)}</a></li>" for one in sections)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            "<html lang='en'><head><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width, initial-scale=1'>",
            f"<title>{html.escape(title)}</title>",
            f"<style>{STYLE}</style></head><body>",
            f"<header><h1>{html.escape(title)}</h1>",
            *_paragraphs(lines),
            f"</header><nav aria-label='Sections'><ul>{links}</ul></nav><main>",
            *(_section(section) for section in sections),
            "</main></body></html>",
            "",
        ]
    )


def _paragraphs(lines: Sequence[str]) -> list[str]:
    return [f"<p>{html.escape(line)}</p>" for line in lines]


def _section(section: Section) -> str:
    parts = [f"<section id='{section.anchor}'><h2>{html.escape(section.title)}</h2>", *_paragraphs(section.lines)]
    if section.pictures:
        figures = (_figure(picture) for picture in section.pictures)
        parts += ["<div class='figures'>", *figures, "</div>"]
    parts += [as_html(table) for table in section.tables]
    if section.folded:
        texts = (
            f"<details><summary>{html.escape(one.title)}</summary><pre>{html.escape(one.text)}</pre></details>"
            for one in section.folded
        )
        parts += [f"<details><summary>{html.escape(section.fold)}</summary>", *texts, "</details>"]
    return "\n".join([*parts, "</section>"])


def _figure(picture: Picture) -> str:
    svg = _inline_svg(picture.svg, f"{picture.caption} {picture.told}", f"{picture.name}-")
    caption = html.escape(picture.caption)
    return f"<figure><div class='wide' tabindex='0'>{svg}</div><figcaption>{caption}</figcaption></figure>"


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

"""Draws this folder's figures from `measured.json`, the numbers behind them: effort.svg and ridge.svg.

python -m tests.benchmarks.figures [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pruneexp.files import write_atomic
from pruneexp.report.figures import FAINT, WHOLE, as_svg, finish, look, new_figure

HERE = Path(__file__).parent


def effort_figure(measured: Mapping[str, Any]) -> str:
    """Shares of FLAP's excess log perplexity against the effort, in both texts. Faint lines: the better start."""
    points: Sequence[Mapping[str, float]] = measured["points"]
    efforts = [point["effort"] for point in points]
    figure, axes = new_figure(2.9, 3)
    for k, (text, name) in enumerate(measured["texts"].items()):
        axes.plot(efforts, [point[text] for point in points], label=name, **look(k) | {"linestyle": "-"}, **WHOLE)
        axes.axhline(measured["start"][text], color=look(k)["color"], linewidth=0.8, linestyle=(0, (1.5, 1.5)))
    axes.set_xscale("log")
    axes.set_xticks(efforts, [f"{effort:g}" for effort in efforts])
    axes.minorticks_off()
    axes.set_ylim(0, 1)
    axes.axhline(1, color=FAINT, linewidth=0.8)
    finish(figure, axes, "search.effort (plain passes)", "share of FLAP's excess")
    return as_svg(figure)


def ridge_figure(measured: Mapping[str, Any]) -> str:
    """The ridge that each site has chosen, by depth, for several amounts of calibration text."""
    figure, axes = new_figure(2.9, len(measured))
    for k, (amount, layers) in enumerate(measured.items()):
        x = [int(layer) for layer, ridges in layers.items() for _ in ridges]
        y = [ridge for ridges in layers.values() for ridge in ridges]
        axes.plot(x, y, markersize=4.5, alpha=0.75, label=amount, **look(k), **WHOLE)
    axes.set_yscale("log")
    finish(figure, axes, "decoder layer", "ridge")
    return as_svg(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """`argv`: the arguments, those typed unless given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=HERE, help="the folder to write them to; this page's own")
    out = parser.parse_args(argv).out
    measured = json.loads((HERE / "measured.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "effort.svg", effort_figure(measured["effort"]))
    write_atomic(out / "ridge.svg", ridge_figure(measured["ridge"]))


if __name__ == "__main__":
    main()

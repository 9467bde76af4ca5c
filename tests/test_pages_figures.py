"""Figures: their scale, what stands for seeds, marks that are whole, and what they say in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pruneexp.report.against_share import perplexity_section
from pruneexp.report.figures import Picture, styles
from pruneexp.report.folders import find
from pruneexp.report.methods import describe
from tests.report_samples import config, metrics, write_run


def picture(folder: Path, ppls: dict[float, list[float]]) -> Picture:
    """Of one method: the perplexity of each seed at each share."""
    for share, of_seeds in ppls.items():
        for seed, ppl in enumerate(of_seeds):
            composed = config("recipe=flap", **{"sparsity.ratio": share, "dataset.seed": seed})
            write_run(folder / "HASH", composed, metrics(ppl, share))
    runs = describe(find([folder], "same").runs)
    section = perplexity_section(runs, [], [], styles([one.method for one in runs]))
    assert section is not None
    return section.pictures[0]


def drawn(plot: Picture) -> tuple[Any, list[Any]]:
    (axes,) = plot.figure.axes
    return axes, [line for line in axes.get_lines() if len(line.get_xdata())]


def bars(lines: list[Any]) -> list[list[float]]:
    return [list(line.get_ydata()) for line in lines if line.get_marker() == "_"]


def test_two_seeds_are_drawn_and_their_interval_is_not(tmp_path: Path) -> None:
    """Of 5 and 20, the interval goes from 0.0015 to 67,000."""
    plot = picture(tmp_path, {0.2: [5.0, 20.0], 0.5: [30.0, 40.0]})
    axes, lines = drawn(plot)
    low, high = axes.get_ylim()
    assert 1.5 < low < 3.0 and 40.0 < high < 80.0  # 3 is the dense model's
    small = [sorted(line.get_ydata()) for line in lines if line.get_markersize() == 3]
    assert [pytest.approx(values) for values in small] == [[5.0, 20.0], [30.0, 40.0]] and not bars(lines)
    assert plot.caption.endswith("2 seeds a point; small marks are the seeds.")


def test_three_seeds_have_an_interval_that_does_not_set_the_scale(tmp_path: Path) -> None:
    plot = picture(tmp_path, {0.2: [5.0, 5.1, 5.2], 0.5: [6.0, 12.0, 40.0]})
    axes, lines = drawn(plot)
    low, high = axes.get_ylim()
    narrow, wide = bars(lines)
    assert low < narrow[0] < 5.0 < narrow[1] < high and (wide[0] < low or wide[1] > high)
    span = math.log(math.exp(math.log(6 * 12 * 40) / 3) / 3.0)  # of the marks: the dense model's to the highest mean
    assert math.log(high / low) <= span * 1.61
    assert not [line for line in lines if line.get_markersize() == 3]
    assert plot.caption.endswith("t-intervals of the mean log perplexity; bars cut by the frame are longer.")


def test_bars_that_fit_are_said_to_end_where_they_end(tmp_path: Path) -> None:
    plot = picture(tmp_path, {0.2: [5.0, 5.1, 5.2], 0.5: [9.0, 9.1, 9.2]})
    low, high = drawn(plot)[0].get_ylim()
    assert all(low < bound < high for bar in bars(drawn(plot)[1]) for bound in bar)
    assert plot.caption.endswith("bars are 95 % t-intervals of the mean log perplexity.")


@pytest.mark.parametrize("ppls", [{0.0: [3.5], 0.2: [5.0]}, {0.2: [3.0]}, {0.2: [3.0, 3.0, 3.0]}, {0.2: [1e9, 4.0]}])
def test_marks_are_whole(ppls: dict[float, list[float]], tmp_path: Path) -> None:
    """No mark is cut by the frame, also at no removal, and none lies outside it."""
    axes, lines = drawn(picture(tmp_path, ppls))
    marks = [line for line in lines if line.get_marker() not in ("None", "_")]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert marks and not any(line.get_clip_on() for line in marks)
    for line in marks:
        assert all(left <= x <= right for x in line.get_xdata()) and all(low < y < high for y in line.get_ydata())

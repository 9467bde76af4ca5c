"""Progress on stderr of work that lasts: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any, TypeVar

T = TypeVar("T")

BAR_AFTER = 2.0  # seconds; what is over sooner shows nothing
LINE_EVERY = 30.0  # seconds between lines where stderr is a file or a pipe

_part: ContextVar[str] = ContextVar("part", default="")


@contextmanager
def part_of(whole: str) -> Iterator[None]:
    """Adds to every stage that is shown inside what it is a part of: "calibrate (round 2 of 4)"."""
    token = _part.set(f" ({whole})" if whole else "")
    try:
        yield
    finally:
        _part.reset(token)


def progress(iterable: Iterable[T], stage: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """The items of `iterable`, with stage, count, rate and time left shown while they are consumed. `total`: how many
    there are (taken from the iterable where it knows); `unit`: the plural of what one item is ("blocks")."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    stage += _part.get()
    notebook = _in_notebook()
    if not notebook and not sys.stderr.isatty():
        return _lines(iterable, stage, total, unit)
    # leave=False: the bar makes room when it is done; what took how long is in the summary of the run.
    bar, shape = _bar(notebook)
    return iter(bar(iterable, stage, total, leave=False, delay=BAR_AFTER, unit=f" {unit}", **shape))


def _in_notebook() -> bool:
    """Whether stderr is shown in a notebook's cell, which is no terminal and yet looked at."""
    return "ipykernel" in sys.modules


def _bar(notebook: bool) -> tuple[Any, dict[str, Any]]:
    """What draws the bar, and its width: the terminal's, or that of a notebook's cell (a widget or, where there are
    none, a line of text)."""
    from tqdm import tqdm

    if notebook and find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm as widget

        return widget, {"ncols": "100%"}
    try:
        sized = not notebook and all(os.get_terminal_size(sys.stderr.fileno()))
    except (AttributeError, OSError, ValueError):
        sized = False
    # Terminals inside containers and job runners may say 0 x 0, where tqdm would draw nothing.
    return tqdm, {"dynamic_ncols": True} if sized else {"ncols": 80, "nrows": 24}


@contextmanager
def waiting(stage: str) -> Iterator[None]:
    """Says on stderr what is being done, for work that cannot be counted and lasts: after BAR_AFTER seconds or, where
    stderr is a file or a pipe, after LINE_EVERY."""
    stderr = sys.stderr  # also where it is redirected inside
    timer = threading.Timer(
        BAR_AFTER if stderr.isatty() or _in_notebook() else LINE_EVERY,
        lambda: print(f"{stage} ...", file=stderr, flush=True),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _lines(iterable: Iterable[T], stage: str, total: int | None, unit: str) -> Iterator[T]:
    start = last = time.monotonic()
    for done, item in enumerate(iterable, start=1):
        yield item
        now = time.monotonic()
        if now - last >= LINE_EVERY and done != total:
            last, rate = now, done / (now - start)
            left = f", {_clock((total - done) / rate)} left" if total is not None else ""
            count = f"{done}/{total}" if total is not None else f"{done}"
            print(f"{stage}: {count} {unit}, {rate:.3g}/s{left}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """93.4 -> "1:33"; an hour and more: "1:00:05"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"

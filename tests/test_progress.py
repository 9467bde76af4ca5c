import sys
import time

import pytest

from pruneexp import progress as module
from pruneexp.progress import progress


class Terminal:
    """A stream that says that it is a terminal."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


def slowly(n: int, seconds: float):
    for i in range(n):
        time.sleep(seconds)
        yield i


@pytest.fixture
def clock(monkeypatch):
    """A clock that each item of work moves by `clock.step` seconds."""

    class Clock:
        now, step = 100.0, 0.0

        def work(self, n: int):
            for i in range(n):
                self.now += self.step
                yield i

    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    return clock


def test_short_work_shows_nothing(monkeypatch, capsys):
    terminal = Terminal()
    assert list(progress(range(5), "calibrate")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress(range(5), "calibrate")) == [0, 1, 2, 3, 4]
    assert terminal.text == ""


def test_a_bar_on_a_terminal_makes_room_when_it_is_done(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "BAR_AFTER", 0.1)
    assert list(progress(slowly(8, 0.05), "calibrate", 8, "blocks")) == list(range(8))
    assert "calibrate" in terminal.text and "/8" in terminal.text and "blocks/s" in terminal.text
    assert "\n" not in terminal.text and terminal.text.endswith("\r")


def test_now_and_then_a_line_where_stderr_is_no_terminal(clock, capsys):
    clock.step = 10
    assert list(progress(clock.work(9), "calibrate", 9, "blocks")) == list(range(9))
    assert capsys.readouterr().err == (
        "calibrate: 3/9 blocks, 0.1/s, 1:00 left\ncalibrate: 6/9 blocks, 0.1/s, 0:30 left\n"
    )


def test_without_a_total(clock, capsys):
    clock.step = 40
    list(progress(clock.work(2), "search", unit="rounds"))
    assert capsys.readouterr().err == "search: 1 rounds, 0.025/s\nsearch: 2 rounds, 0.025/s\n"


def test_an_error_in_the_work_comes_through(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())

    def broken():
        yield 1
        raise ValueError("from the work")

    with pytest.raises(ValueError, match="from the work"):
        list(progress(broken(), "calibrate"))


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (93.4, "1:33"), (3605, "1:00:05")])
def test_clock(seconds, text):
    assert module._clock(seconds) == text


def test_a_notebooks_cell_has_a_bar_that_fits(monkeypatch, capsys):
    """A cell's stderr is no terminal, and yet somebody looks at it."""
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    monkeypatch.setattr(module, "find_spec", lambda name: None)  # without widgets, a line of text
    monkeypatch.setattr(module, "BAR_AFTER", 0.0)
    assert list(progress(range(3), "calibrate", 3, "blocks")) == [0, 1, 2]
    shown = capsys.readouterr().err.split("\r")
    assert any(line.startswith("calibrate: ") and "0/3" in line for line in shown)
    assert max(len(line.rstrip("\n")) for line in shown) <= 80

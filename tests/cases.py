"""Many cases of one test: a choice that meets every pair of values, and a loop that is one test with a line a case."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

UNTIMED = (1, "decode", None)  # what times are measured at: of sparsities that count something else


def pairwise(*parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows with a value of every parameter: any two values of any two parameters meet in at least one row.

    Greedy, and the same each time: a row begins with the first pair that is still to meet, and takes of every other
    parameter the value that meets the most, the least used one of several.
    """
    sizes = [range(len(values)) for values in parameters]
    columns = itertools.combinations(range(len(sizes)), 2)
    left = {((i, a), (j, b)): None for i, j in columns for a in sizes[i] for b in sizes[j]}  # a dict keeps the order
    used = {(i, a): 0 for i, size in enumerate(sizes) for a in size}
    rows = []
    while left:
        row = dict(next(iter(left)))
        for i in sorted(set(range(len(sizes))) - set(row), key=lambda i: (-len(sizes[i]), i)):
            cells = list(row.items())
            met = {a: sum(tuple(sorted(((i, a), cell))) in left for cell in cells) for a in sizes[i]}
            row[i] = max(sizes[i], key=lambda a, i=i, met=met: (met[a], -used[i, a]))
        for pair in itertools.combinations(sorted(row.items()), 2):
            left.pop(pair, None)
        for cell in row.items():
            used[cell] += 1
        rows.append(tuple(parameters[i][row[i]] for i in range(len(sizes))))
    return rows


def each(names: str, cases: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """As `pytest.mark.parametrize`, but all of the cases are one test: for what takes milliseconds a case.

    A case that fails is named, and the next ones still run. All cases share the fixtures; each has a `tmp_path` of
    its own.
    """
    keys = [name.strip() for name in names.split(",")]
    rows = [case if len(keys) > 1 else (case,) for case in cases]
    assert rows, "a test without a case asserts nothing"

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        def loop(subtests: pytest.Subtests, **fixtures: Any) -> None:
            for number, row in enumerate(rows):
                case = dict(zip(keys, row, strict=True))
                if "tmp_path" in fixtures:
                    case["tmp_path"] = Path(fixtures["tmp_path"], str(number))
                    case["tmp_path"].mkdir()
                with subtests.test(**{key: str(case[key]) for key in keys}):
                    test(**{**fixtures, **case})

        kept = [each for name, each in inspect.signature(test).parameters.items() if name not in keys]
        own = inspect.Parameter("subtests", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        loop.__signature__ = inspect.Signature([own, *kept])  # type: ignore[attr-defined]
        loop.__name__, loop.__doc__, loop.__module__ = test.__name__, test.__doc__, test.__module__
        loop.pytestmark = getattr(test, "pytestmark", [])  # type: ignore[attr-defined]
        return loop

    return decorate

"""Config values as the types that annotations ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from pruneexp.cli.coerce import coerced
from pruneexp.types import ConfigError
from tests.cases import each


class Own(tuple):
    """Somebody's class, which no config holds."""


@each(
    "value, annotation, expected",
    [
        (3, float, 3.0),
        (3, float | int, 3),
        (3, str | int | None, 3),
        (2024, str, "2024"),
        (2024, Path | None, Path("2024")),
        (None, Path | None, None),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        ([1, "a"], tuple[int, str], (1, "a")),
        ((1, 2), Sequence[int], [1, 2]),
        ([1], list, [1]),
        ({1: 2}, Mapping[str, float], {1: 2.0}),
        (1, Literal[1, "all"], 1),
        ("anything", Own, "anything"),
        ("anything", Any, "anything"),
    ],
)
def test_values_that_fit(value: Any, annotation: Any, expected: Any) -> None:
    actual = coerced(value, annotation, "key")
    assert actual == expected and type(actual) is type(expected)


@each(
    "value, annotation, expected",
    [
        (True, int, "an integer"),
        (True, Literal[1, 2], "one of 1, 2"),
        ("3", float | None, "a number or null"),
        (2.5, str, "text, in quotes"),
        ("ab", list[str], "a list of text"),
        ([1], tuple[int, str], "a list of an integer"),
        ([1, "b"], list[int], "a list of an integer"),
        ([], dict[str, int], "keys with values (an integer)"),
        ("heads", tuple[Literal["heads", "ffn"], ...], "a list of one of heads, ffn; did you mean [heads]?"),
        (False, Literal["process", "off"], 'one of process, off; did you mean "off", in quotes?'),
        ("heds", Literal["heads", "ffn"], "one of heads, ffn; did you mean heads?"),
    ],
)
def test_values_that_do_not(value: Any, annotation: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        coerced(value, annotation, "key")
    assert str(caught.value).removeprefix(f"key={value!r}")[2:] == f"expected {expected}"

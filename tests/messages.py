"""What the line about a mistake must hold: the key with its value, and what to type instead. Its words are free."""

from __future__ import annotations

import re


def says(text: str, words: str) -> bool:
    """Whether `words` stand in the text, and not as a part of longer ones."""
    return bool(re.search(rf"(?<![\w.=/]){re.escape(words)}(?![\w=/]|\.\w)", text))


def assert_told(printed: str, named: str, *typed: str) -> None:
    """One line, which begins with the key and the value that are wrong; all of `typed` is offered behind them."""
    assert printed.count("\n") == 1 and printed.endswith("\n"), printed
    line = printed.removeprefix("pruneexp: ")
    assert re.match(rf"{re.escape(named)}[: ]", line), f"expected it to begin with {named!r}: {line}"
    missing = [words for words in typed if not says(line[len(named) :], words)]
    assert not missing, f"expected {missing} in: {line}"

"""Config keys that came later than others: what configs without them mean."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

# Patterns of dotted names, and the value that means what was done before there was the key: with it they leave the
# hash, so that finished jobs stay finished.
NEW_KEYS: Mapping[str, Any] = {
    "dataset.bos": False,
    "evaluator.*.dataset.bos": False,
    **{f"evaluator.{name}.bos": False for name in ("generation", "latency", "questions", "zeroshot")},
    "search.alike": False,
}


def value_before(key: str) -> Any:
    """The value of a key that came later that means what was done before there was the key; None for all others."""
    return next((before for new, before in NEW_KEYS.items() if fnmatchcase(key, new)), None)


def without_new_keys(node: Any, name: str = "") -> Any:
    """The config without the keys of `NEW_KEYS` that change nothing, at every depth."""
    if not isinstance(node, Mapping):
        return node
    dotted = {key: f"{name}.{key}".lstrip(".") for key in node}
    return {
        key: without_new_keys(value, dotted[key])
        for key, value in node.items()
        if not any(fnmatchcase(dotted[key], new) and value == before for new, before in NEW_KEYS.items())
    }

"""Text that is tokenised once, not anew for each model."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")


def once_per_tokenizer(make: Callable[[Any, Any], T]) -> Callable[[Any, Any], T]:
    """For a method whose answer follows from the object's fields and the tokenizer alone: the last answer stays with
    the object, for the same tokenizer."""
    place = f"{make.__name__} by tokenizer"

    @wraps(make)
    def made(self: Any, tokenizer: Any) -> T:
        last = vars(self).get(place)
        if last is None or last[0] is not tokenizer:
            last = vars(self)[place] = tokenizer, make(self, tokenizer)
        return last[1]

    return made

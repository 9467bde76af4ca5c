"""How a module's `forward` is called, and another one in its place for a while."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def cache_name(module: Any) -> str:
    """What the KV cache is called, as an argument of the model and in what it returns: `cache` in transformers from
    5.24 on, before that (and in modeling files that were written for it) `past_key_values`."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def last_logits_only(module: Any) -> dict[str, int]:
    """The argument that asks a model for the last position's logits, where it takes one: writing needs no others, and a
    large vocabulary would dominate the time."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(module.forward).parameters else {}


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, `module` computes another function."""
    own = {key: value for key, value in module.__dict__.items() if key == "forward"}  # put there by somebody else
    module.forward = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
        module.__dict__.update(own)

"""How much leaves the model, and in which rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pruneexp.types import ConfigError


@dataclass(frozen=True)
class OneShot:
    """Everything at once: a share `ratio` of what `of` counts.

    of=decoder: every parameter of the decoder blocks, norms and biases with them. of=prunable: only the parameters that
    units hold (writers' rows, reader's columns), which is what the formulas of FLAP's released code count. of=macs:
    multiply-accumulates of a token in the decoder blocks' matrices, and of its attention over `context` tokens.
    of=bytes: the decoder blocks' weights, and the KV cache of `context` tokens, both in the model's dtype. of=kv_cache:
    that cache alone, which only heads fill.
    """

    ratio: float
    of: Literal["decoder", "prunable", "macs", "bytes", "kv_cache"]
    context: int

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ConfigError(f"ratio={self.ratio!r}: expected a number in [0, 1)")
        if self.context < 0:
            raise ConfigError(f"context={self.context!r}: expected an integer >= 0, tokens")

    def rounds(self) -> tuple[float, ...]:
        """Cumulative share removed after each round."""
        return (self.ratio,)

"""How much leaves the model, and in which rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pruneexp.types import ConfigError


@dataclass(frozen=True)
class OneShot:
    """Everything at once: a share `ratio` of what `of` counts.

    of=decoder: every parameter of the decoder blocks, norms and biases with them. of=prunable: only the parameters that
    units hold (in-projections' rows, out-projection's columns), which is what the formulas of FLAP's released code
    count. of=macs: multiply-accumulates of a token in the decoder blocks' matrices, and of its attention over `context`
    tokens.
    of=bytes: the decoder blocks' weights, and the KV cache of `context` tokens, both in the model's dtype. of=kv_cache:
    that cache alone, which only heads fill.
    """

    ratio: float
    of: Literal["decoder", "prunable", "macs", "bytes", "kv_cache"]
    context: int

    def __post_init__(self) -> None:
        _check(self.ratio, self.context)

    def shares(self) -> tuple[float, ...]:
        """Cumulative share removed after each round."""
        return (self.ratio,)


@dataclass(frozen=True)
class Linear:
    """As much in every round: ratio k / n of the original model has left after round k of n. `of` and `context`: as
    OneShot's."""

    ratio: float
    of: Literal["decoder", "prunable", "macs", "bytes", "kv_cache"]
    context: int
    rounds: int

    def __post_init__(self) -> None:
        _check(self.ratio, self.context)
        _check_rounds(self.rounds)

    def shares(self) -> tuple[float, ...]:
        """Cumulative share removed after each round."""
        return _shares(self.ratio, self.rounds, lambda x: x)


@dataclass(frozen=True)
class Cubic:
    """Much at first, little at last: ratio (1 - (1 - k / n)^3) of the original model has left after round k of n (Zhu &
    Gupta 2017, their schedule from a sparsity of 0). `of` and `context`: as
    OneShot's."""

    ratio: float
    of: Literal["decoder", "prunable", "macs", "bytes", "kv_cache"]
    context: int
    rounds: int

    def __post_init__(self) -> None:
        _check(self.ratio, self.context)
        _check_rounds(self.rounds)

    def shares(self) -> tuple[float, ...]:
        """Cumulative share removed after each round."""
        return _shares(self.ratio, self.rounds, lambda x: 1 - (1 - x) ** 3)


def _shares(ratio: float, rounds: int, curve: Callable[[float], float]) -> tuple[float, ...]:
    # The last is `ratio` itself: a rounding error there would be another budget than that of one shot.
    return (*(ratio * curve(k / rounds) for k in range(1, rounds)), ratio)


def _check(ratio: float, context: int) -> None:
    if not 0 <= ratio < 1:
        raise ConfigError(f"ratio={ratio!r}: expected a number in [0, 1)")
    if context < 0:
        raise ConfigError(f"context={context!r}: expected an integer >= 0, tokens")


def _check_rounds(rounds: int) -> None:
    if rounds < 1:
        raise ConfigError(f"rounds={rounds!r}: expected an integer >= 1")

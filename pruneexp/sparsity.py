"""How much leaves the model, and in which rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pruneexp.types import ConfigError

Of = Literal["decoder", "prunable", "macs", "bytes", "kv_cache", "latency"]
Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class OneShot:
    """Everything at once: a share `ratio` of what `of` counts.

    of=decoder: every parameter of the decoder blocks, norms and biases with them. of=prunable: only the parameters that
    units hold (in-projections' rows, out-projection's columns), which is what the formulas of FLAP's released code
    count. of=macs: multiply-accumulates of a token in the decoder blocks' matrices, and of its attention over `context`
    tokens.
    of=bytes: the decoder blocks' weights, and the KV cache of `context` tokens, both in the model's dtype. of=kv_cache:
    that cache alone, which only heads fill. of=latency: milliseconds of the decoder blocks for `batch` sequences on the
    device at hand, by a table that is measured first (or read from the file `table`): phase=prefill, `context` tokens
    in one pass; phase=decode, one token behind `context` tokens in the KV cache.
    """

    ratio: float
    of: Of
    context: int
    batch: int
    phase: Phase
    table: str | None

    def __post_init__(self) -> None:
        _check(self)

    def shares(self) -> tuple[float, ...]:
        """Cumulative share removed after each round."""
        return (self.ratio,)


@dataclass(frozen=True)
class Linear:
    """As much in every round: ratio k / n of the original model has left after round k of n. The others: as
    OneShot's."""

    ratio: float
    of: Of
    context: int
    rounds: int
    batch: int
    phase: Phase
    table: str | None

    def __post_init__(self) -> None:
        _check(self)
        _check_rounds(self.rounds)

    def shares(self) -> tuple[float, ...]:
        """Cumulative share removed after each round."""
        return _shares(self.ratio, self.rounds, lambda x: x)


@dataclass(frozen=True)
class Cubic:
    """Much at first, little at last: ratio (1 - (1 - k / n)^3) of the original model has left after round k of n (Zhu &
    Gupta 2017, their schedule from a sparsity of 0). The others: as
    OneShot's."""

    ratio: float
    of: Of
    context: int
    rounds: int
    batch: int
    phase: Phase
    table: str | None

    def __post_init__(self) -> None:
        _check(self)
        _check_rounds(self.rounds)

    def shares(self) -> tuple[float, ...]:
        """Cumulative share removed after each round."""
        return _shares(self.ratio, self.rounds, lambda x: 1 - (1 - x) ** 3)


def _shares(ratio: float, rounds: int, curve: Callable[[float], float]) -> tuple[float, ...]:
    # The last is `ratio` itself: a rounding error there would be another budget than that of one shot.
    return (*(ratio * curve(k / rounds) for k in range(1, rounds)), ratio)


def _check(own: OneShot | Linear | Cubic) -> None:
    if not 0 <= own.ratio < 1:
        raise ConfigError(f"ratio={own.ratio!r}: expected a number in [0, 1)")
    if own.context < 0:
        raise ConfigError(f"context={own.context!r}: expected an integer >= 0, tokens")
    if own.batch < 1:
        raise ConfigError(f"batch={own.batch!r}: expected an integer >= 1, sequences")
    if own.of == "latency" and own.phase == "prefill" and own.context < 1:
        raise ConfigError("context=0: expected the tokens that are read at once, with phase=prefill; or phase=decode")


def _check_rounds(rounds: int) -> None:
    if rounds < 1:
        raise ConfigError(f"rounds={rounds!r}: expected an integer >= 1")

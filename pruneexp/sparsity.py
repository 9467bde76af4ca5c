"""How much leaves the model, and in which rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pruneexp.types import ConfigError, require_least, require_within

Of = Literal["decoder", "prunable", "macs", "bytes", "kv_cache", "latency"]
Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class OneShot:
    """Removes a share `ratio` at once. `of` says what is counted:

    decoder   all parameters of the decoder layers, including norms and biases
    prunable  only the parameters of units (rows of in-projections, columns of out-projections), as the formulas of
              FLAP's released code count
    macs      multiply-accumulates of one token: in the decoder layers' matrices, and in its attention over `context`
              tokens
    bytes     the decoder layers' weights and the KV cache of `context` tokens, both in the model's dtype
    kv_cache  that cache alone, which only heads fill
    latency   milliseconds of the decoder layers for `batch` sequences on the device at hand, by a table that is
              measured first (or read from the file `table`). phase=prefill: `context` tokens in one pass; phase=decode:
              one token behind `context` tokens in the KV cache
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
    """Removes equally much in every round: after round k of n, a share ratio k / n of the original model has left. The
    other settings are those of `OneShot`."""

    ratio: float
    of: Of
    context: int
    rounds: int
    batch: int
    phase: Phase
    table: str | None

    def __post_init__(self) -> None:
        _check(self)
        require_least(self, 1, "rounds")

    def shares(self) -> tuple[float, ...]:
        """Cumulative share removed after each round."""
        return _shares(self.ratio, self.rounds, lambda x: x)


@dataclass(frozen=True)
class Cubic:
    """Removes much at first and little at last: after round k of n, a share ratio (1 - (1 - k / n)^3) of the original
    model has left (Zhu & Gupta 2017, their schedule from a sparsity of 0). The other settings are those of
    `OneShot`."""

    ratio: float
    of: Of
    context: int
    rounds: int
    batch: int
    phase: Phase
    table: str | None

    def __post_init__(self) -> None:
        _check(self)
        require_least(self, 1, "rounds")

    def shares(self) -> tuple[float, ...]:
        """Cumulative share removed after each round."""
        return _shares(self.ratio, self.rounds, lambda x: 1 - (1 - x) ** 3)


def _shares(ratio: float, rounds: int, curve: Callable[[float], float]) -> tuple[float, ...]:
    # The last is `ratio` itself: a rounding error there would be another budget than that of one shot.
    return (*(ratio * curve(k / rounds) for k in range(1, rounds)), ratio)


def _check(own: OneShot | Linear | Cubic) -> None:
    require_within(own, "[0, 1)", "ratio")
    require_least(own, 0, "context", besides=", tokens")
    require_least(own, 1, "batch", besides=", sequences")
    if own.of == "latency" and own.phase == "prefill" and own.context < 1:
        raise ConfigError("context=0: expected the tokens that are read at once, with phase=prefill; or phase=decode")

"""How much leaves the model, and in which rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pruneexp.types import ConfigError


@dataclass(frozen=True)
class OneShot:
    """Everything at once: a share `ratio` of what `of` counts.

    of=decoder: every parameter of the decoder blocks, norms and biases with them. of=prunable: only the parameters that
    units hold (writers' rows, reader's columns), which is what the formulas of FLAP's released code count.
    """

    ratio: float
    of: Literal["decoder", "prunable"]

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ConfigError(f"ratio={self.ratio!r}: expected a number in [0, 1)")

    def rounds(self) -> tuple[float, ...]:
        """Cumulative share removed after each round."""
        return (self.ratio,)

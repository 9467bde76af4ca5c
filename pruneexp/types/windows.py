"""The protocols that calibration windows come from."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Dataset(Protocol):
    """Token windows, int64 [N, T], for calibration and for evaluation: `samples` and `evaluation_samples` of `length`
    tokens, None for as many, or as long, as there are. `origins`: of each calibration window the name of its source.
    `apart(tokenizer, length)`: what is evaluated apart, by name: a weight, and windows. Both None where there is one
    source.
    """

    name: str
    samples: int | None
    evaluation_samples: int | None
    length: int | None
    origins: Any
    apart: Any

    def calibration(self, tokenizer: Any) -> Tensor: ...

    def evaluation(self, tokenizer: Any, length: int) -> Tensor: ...


class Augmentation(Protocol):
    """Windows that join the calibration windows, `added(windows, length)` of them, by a dense `model` in memory. For
    forecasts: `working_bytes(model, windows, length)`, beside the model."""

    def added(self, windows: int, length: int, /) -> int: ...

    def working_bytes(self, model: Any, windows: int, length: int, /) -> int: ...

    def __call__(self, model: Any, tokens_NT: Tensor, meter: Any, seed: int) -> Tensor: ...

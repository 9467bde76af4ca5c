"""Windows that are in memory already: given from Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pruneexp.types import ConfigError


@dataclass(frozen=True, eq=False)
class GivenTokens:
    """Calibration windows, int64 [N, T], exactly as they are. For evaluation there are none."""

    windows_NT: Tensor

    name: ClassVar[str] = "tokens"
    contiguous: ClassVar[bool] = False

    def check(self, calibration: bool = True, evaluation: bool = True) -> None:
        pass

    def calibration(self, tokenizer: Any) -> Tensor:
        return self.windows_NT

    def evaluation(self, tokenizer: Any, length: int | None) -> Tensor:
        raise ConfigError("dataset: only calibration windows were given; expected overrides=['dataset=NAME']")

    def key(self, part: str) -> str:
        return "tokens"

    def description(self) -> Mapping[str, Any]:
        return {"kind": "tokens", "calibration": "given from Python", "sampling": "all windows, in order"}


def as_windows(tokens: Any) -> Tensor:
    """What was given as int64 [N, T] on the CPU. Raises ConfigError where it is no such windows."""
    expected = "expected token windows, integers [N, T] with T >= 2"
    try:
        windows = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ConfigError(f"tokens: a {type(tokens).__name__}; {expected}") from None
    if windows.is_floating_point() or windows.is_complex() or windows.dtype == torch.bool:
        raise ConfigError(f"tokens: of type {str(windows.dtype).removeprefix('torch.')}; {expected}")
    if windows.is_quantized or windows.is_nested or windows.is_meta or windows.layout != torch.strided:
        raise ConfigError(f"tokens: quantised, nested, sparse or on the meta device; {expected}")
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ConfigError(f"tokens: of shape {list(windows.shape)}; {expected}")
    return windows.detach().to("cpu", torch.int64)

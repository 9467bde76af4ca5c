"""Half precision on processors that cannot multiply it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

ROWS_BYTES = 2**24  # of a weight, widened at once: what stays in the cache, and in the allocator's hands
LEAST_TOKENS = 32  # fewer are done before the weights are widened


def widening_pays(hidden_BTD: Tensor) -> bool:
    """Whether matrices are multiplied faster in float32, widening included: several times, on a CPU without
    instructions for the type (AVX2 alone)."""
    tokens = hidden_BTD.numel() // max(1, hidden_BTD.shape[-1])
    return hidden_BTD.device.type == "cpu" and tokens >= LEAST_TOKENS and not _multiplied_natively(hidden_BTD.dtype)


def overflow_hint(dtype: torch.dtype) -> str:
    """What to say of NaN or Inf in a model of `dtype`, where that ends early."""
    return "; float16 ends at 65504: model.dtype=bfloat16 or float32 may help" if dtype == torch.float16 else ""


@cache
def _multiplied_natively(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype != torch.float16 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


class WideLinear(TorchFunctionMode):
    """Inside, linear layers of half precision multiply and add in float32 and round once, at the end: what processors
    do that know the type."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and args[0].dtype in (torch.bfloat16, torch.float16):
            return _wide_linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _wide_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`functional.linear`, a few rows of the weight at a time."""
    output, wide = input.new_empty(*input.shape[:-1], len(weight)), input.float()
    rows = max(1, ROWS_BYTES // (4 * max(1, weight.shape[1])))
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        own = None if bias is None else bias[part].float()
        output[..., part] = functional.linear(wide, weight[part].float(), own)
    return output

"""Half precision on processors that cannot multiply it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

HALF = (torch.bfloat16, torch.float16)
ROWS_BYTES = 2**24  # of a weight, widened at once: what stays in the cache, and in the allocator's hands
_active: ContextVar[WideLinear | None] = ContextVar("active", default=None)
LEAST_TOKENS = 32  # fewer are done before the weights are widened


def widening_pays(hidden_BTD: Tensor) -> bool:
    """Whether matrices are multiplied faster in float32, widening included: several times, on a CPU without
    instructions for the type (AVX2 alone)."""
    tokens = hidden_BTD.numel() // max(1, hidden_BTD.shape[-1])
    return hidden_BTD.device.type == "cpu" and tokens >= LEAST_TOKENS and not _multiplied_natively(hidden_BTD.dtype)


def overflow_hint(dtype: torch.dtype) -> str:
    """What a message about NaN or Inf adds for a model of float16, which overflows early."""
    return "; float16 ends at 65504: model.dtype=bfloat16 or float32 may help" if dtype == torch.float16 else ""


@cache
def _multiplied_natively(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype != torch.float16 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


class WideLinear(TorchFunctionMode):
    """Inside, linear layers of half precision multiply and add in float32 and round once, at the end, where that pays:
    what processors do that know the type."""

    def __enter__(self) -> WideLinear:
        _active.set(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _active.set(None)
        super().__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and args and args[0].dtype in HALF and widening_pays(args[0]):
            return _wide_linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def widened(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """`WideLinear` for a model of `dtype`, where any of its layers could profit: everything that is called inside takes
    a little longer otherwise."""
    return WideLinear() if dtype in HALF and not _multiplied_natively(dtype) else nullcontext()


@contextmanager
def plain_linear() -> Iterator[None]:
    """Inside, nothing is widened, so that what is timed is what others will run. The mode is left altogether, because
    it slows every operation a little. It must be the last mode that was entered."""
    active = _active.get()
    if active is None:
        yield
        return
    active.__exit__(None, None, None)
    try:
        yield
    finally:
        active.__enter__()


def _wide_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`functional.linear`, a few rows of the weight at a time."""
    return _WideLinear.apply(input, weight, bias)


class _WideLinear(torch.autograd.Function):
    """y = x W^T + b; dL/dx = dL/dy W, dL/dW = dL/dy^T x, dL/db = the sum of dL/dy. x: [..., in]; W: [out, in].
    `backward` is differentiated itself where second derivatives are asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        output, wide = x.new_empty(*x.shape[:-1], len(weight)), x.float()
        for part in _rows(weight):
            own = None if bias is None else bias[part].float()
            output[..., part] = functional.linear(wide, weight[part].float(), own)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        wide, grad_NO = x.flatten(0, -2).float(), grads[0].flatten(0, -2)
        grad_x = torch.zeros_like(wide) if of_x else None
        grad_weight = torch.empty_like(weight) if of_weight else None
        for part in _rows(weight):
            grad = grad_NO[:, part].float()
            if grad_x is not None:
                grad_x.addmm_(grad, weight[part].float())
            if grad_weight is not None:
                grad_weight[part] = (grad.T @ wide).to(weight.dtype)
        grad_bias = grad_NO.float().sum(0).to(x.dtype) if of_bias else None
        return None if grad_x is None else grad_x.to(x.dtype).view(x.shape), grad_weight, grad_bias


def _rows(weight: Tensor) -> Iterator[slice]:
    at_once = max(1, ROWS_BYTES // (4 * max(1, weight.shape[1])))
    return (slice(start, start + at_once) for start in range(0, len(weight), at_once))

"""Losses of predictions, a few rows at a time: a whole batch of them, widened, would not stay in a cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_AT_ONCE = 2**19  # logits, on a CPU
_AT_ONCE_ELSEWHERE = 2**25  # a GPU starts a kernel in the time that it takes for a million


def next_token_losses(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """Nats of every predicted token, float64 [B, T-1] on the CPU."""

    def losses(logits_TV: Tensor, next_T: Tensor) -> Tensor:
        return nn.functional.cross_entropy(_wide(logits_TV), next_T, reduction="none")

    windows = zip(logits_BTV, tokens_BT.to(logits_BTV.device), strict=True)
    return torch.stack([_by_parts(losses, logits_TV[:-1], tokens_T[1:]) for logits_TV, tokens_T in windows])


def mean_next_token_loss(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """Mean nats of the predicted tokens, differentiable."""
    logits_NV, next_N = logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].to(logits_BTV.device).flatten()
    return nn.functional.cross_entropy(_wide(logits_NV), next_N)


def divergences(logits_TV: Tensor, dense_TV: Tensor) -> Tensor:
    """KL(p || q) of every prediction, p those of `dense_TV`: nats, float64 [T] on the CPU."""

    def losses(logits_TV: Tensor, dense_TV: Tensor) -> Tensor:
        q_TV, p_TV = (_wide(logits).log_softmax(-1) for logits in (logits_TV, dense_TV))
        return nn.functional.kl_div(q_TV, p_TV, reduction="none", log_target=True).sum(-1)

    return _by_parts(losses, logits_TV, dense_TV)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _by_parts(losses: Callable[[Tensor, Tensor], Tensor], logits_TV: Tensor, other: Tensor) -> Tensor:
    rows = _rows(logits_TV)
    parts = zip(logits_TV.split(rows), other.split(rows), strict=True)
    return torch.cat([losses(*part) for part in parts]).double().cpu()


def _rows(logits_TV: Tensor) -> int:
    """How many are taken at once."""
    return max(1, (_AT_ONCE if logits_TV.is_cpu else _AT_ONCE_ELSEWHERE) // logits_TV.shape[-1])

"""The reader fitted anew, in closed form, on the inputs that stay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruneexp.evidence import Gram
from pruneexp.types import ConfigError, RunError


@dataclass(frozen=True)
class LeastSquares:
    """The reader that comes nearest to the unpruned one's output on the kept channels.

    Minimises, over W' [O,K] and b' [O],

        sum_t ||W x_t + b - (W' x_t[keep] + b')||^2 + lambda ||W' - W[:,keep]||^2

    in closed form: W' = W[:,keep] + W[:,gone] S[gone,keep] (S[keep,keep] + lambda I)^-1 with the covariance S [C,C] of
    x, b' from the means. lambda is `ridge` times the mean of S' diagonal; it holds back the change alone, so that what
    nothing left is told about keeps its weights, and keeping everything is the identity. Float64, Cholesky, rounded
    once to the reader's dtype.

    Raises:
        RunError: S[keep,keep] + lambda I is singular (a ridge of 0 and constant or dependent channels).
    """

    evidence: ClassVar[type[Gram]] = Gram
    adds_bias: ClassVar[bool] = True

    ridge: float
    sequential: bool

    def __post_init__(self) -> None:
        check_ridge(self.ridge)

    def __call__(
        self, weight_OC: Tensor, bias_O: Tensor | None, evidence: Gram, keep_C: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if len(keep_C) == weight_OC.shape[1]:
            return weight_OC, bias_O
        cov_CC, mean_C = (t.to(weight_OC.device) for t in (evidence.covariance_CC, evidence.mean_C))
        return refitted(weight_OC, bias_O, cov_CC, mean_C, keep_C, self.ridge)


def check_ridge(ridge: float) -> None:
    if not (ridge >= 0 and math.isfinite(ridge)):
        raise ConfigError(f"ridge={ridge!r}: expected a number >= 0")


def refitted(
    weight_OC: Tensor, bias_O: Tensor | None, cov_CC: Tensor, mean_C: Tensor, keep_C: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """`LeastSquares`' solution from a covariance and means, float64, in the dtype of `weight_OC`."""
    keep_C = keep_C.to(weight_OC.device)
    gone_C = torch.ones(weight_OC.shape[1], dtype=torch.bool, device=weight_OC.device)
    gone_C[keep_C] = False
    gone_C = gone_C.nonzero().flatten()
    weight = weight_OC.double()
    fitted_OK, lost_OC = weight[:, keep_C], weight[:, gone_C]
    if len(keep_C) and len(gone_C):
        gram_KK = cov_CC[keep_C[:, None], keep_C]
        gram_KK.diagonal().add_(ridge * cov_CC.diagonal().mean())
        told_KO = cov_CC[keep_C[:, None], gone_C] @ lost_OC.T
        fitted_OK = fitted_OK + torch.cholesky_solve(told_KO, cholesky(gram_KK, ridge)).T
    bias = (0 if bias_O is None else bias_O.double()) + weight @ mean_C - fitted_OK @ mean_C[keep_C]
    return fitted_OK.to(weight_OC.dtype).contiguous(), bias.to(weight_OC.dtype)


def cholesky(gram_KK: Tensor, ridge: float) -> Tensor:
    """Lower factor. Raises RunError where the matrix is singular to float64."""
    factor_KK, info = torch.linalg.cholesky_ex(gram_KK)
    diagonal, scale = factor_KK.diagonal(), gram_KK.diagonal().max()
    if info.any() or not (diagonal.square() > 1e-14 * scale).all():
        raise RunError(
            f"ridge={ridge!r}: the inputs' covariance is singular (constant or dependent channels); "
            "expected a larger ridge, such as 1e-4"
        )
    return factor_KK

"""The reader fitted anew, in closed form, on the inputs that stay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pruneexp.evidence import Gram, WantedOutput
from pruneexp.types import ConfigError, RunError


@dataclass(frozen=True)
class LeastSquares:
    """The reader that comes nearest to a wanted output on the kept channels.

    Minimises, over W' [O,K] and b' [O],

        sum_t ||y_t - (W' x_t[keep] + b')||^2 + lambda ||W' - W[:,keep]||^2

    in closed form: W' = W[:,keep] + (S_yx - W[:,keep] S_xx) (S_xx + lambda I)^-1 with the covariances S of y and
    x[keep], b' from the means. lambda is `ridge` times the mean variance of x; it holds back the change alone, so that
    what nothing is told about keeps its weights. Float64, Cholesky, rounded once to the reader's dtype. Where nothing
    leaves, weight and bias come back untouched.

    target=pruned: y = W x + b, what the unpruned reader gives on the same inputs; keeping everything is the identity.
    target=dense: y is what makes the hidden state behind the reader the dense model's, so that the reader also makes up
    for what was lost before it. The second walk then goes sublayer by sublayer, the dense model's hidden states beside
    the pruned one's: four plain passes. Sequential by nature.

    Raises:
        RunError: S_xx + lambda I is singular (a ridge of 0 and constant or dependent channels).
    """

    adds_bias: ClassVar[bool] = True

    ridge: float
    target: Literal["pruned", "dense"]
    sequential: bool

    def __post_init__(self) -> None:
        check_ridge(self.ridge)
        if self.target == "dense" and not self.sequential:
            raise ConfigError("sequential=False: expected true with target=dense, which is sequential by nature")

    @property
    def evidence(self) -> type[Gram] | type[WantedOutput]:
        return WantedOutput if self.target == "dense" else Gram

    def __call__(
        self, weight_OC: Tensor, bias_O: Tensor | None, evidence: Gram | WantedOutput, keep_C: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if len(keep_C) == weight_OC.shape[1]:
            return weight_OC, bias_O
        inputs = evidence if isinstance(evidence, Gram) else evidence.inputs
        cov_CC, mean_C = (t.to(weight_OC.device) for t in (inputs.covariance_CC, inputs.mean_C))
        if isinstance(evidence, Gram):
            return refitted(weight_OC, bias_O, cov_CC, mean_C, keep_C, self.ridge)
        cov_CO, wanted_O = (t.to(weight_OC.device) for t in (evidence.covariance_CO, evidence.wanted_mean_O))
        return fitted(weight_OC, cov_CC, mean_C, cov_CO, wanted_O, keep_C, self.ridge)


def check_ridge(ridge: float) -> None:
    if not (ridge >= 0 and math.isfinite(ridge)):
        raise ConfigError(f"ridge={ridge!r}: expected a number >= 0")


def refitted(
    weight_OC: Tensor, bias_O: Tensor | None, cov_CC: Tensor, mean_C: Tensor, keep_C: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """`LeastSquares`' solution for target=pruned from a covariance and means, float64, in the dtype of `weight_OC`."""
    weight = weight_OC.double()
    wanted_O = weight @ mean_C + (0 if bias_O is None else bias_O.double())
    return fitted(weight_OC, cov_CC, mean_C, cov_CC @ weight.T, wanted_O, keep_C, ridge)


def fitted(
    weight_OC: Tensor,
    cov_CC: Tensor,
    mean_C: Tensor,
    cov_CO: Tensor,
    wanted_O: Tensor,
    keep_C: Tensor,
    ridge: float,
) -> tuple[Tensor, Tensor]:
    """`LeastSquares`' solution from the covariance and mean of the inputs, their covariance with the wanted output and
    its mean, float64, in the dtype of `weight_OC`."""
    keep_C = keep_C.to(weight_OC.device)
    fitted_OK = weight_OC[:, keep_C].double()
    constant = ridge > 0 and not cov_CC.any()  # inputs that never change, as an expert's without tokens: nothing to fit
    if len(keep_C) and not constant:
        gram_KK = cov_CC[keep_C[:, None], keep_C]
        missing_KO = cov_CO[keep_C] - gram_KK @ fitted_OK.T
        gram_KK.diagonal().add_(ridge * cov_CC.diagonal().mean())
        fitted_OK = fitted_OK + torch.cholesky_solve(missing_KO, cholesky(gram_KK, ridge)).T
    bias_O = wanted_O - fitted_OK @ mean_C[keep_C]
    return fitted_OK.to(weight_OC.dtype).contiguous(), bias_O.to(weight_OC.dtype)


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

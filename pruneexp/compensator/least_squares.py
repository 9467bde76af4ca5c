"""The reader fitted anew, in closed form, on the inputs that stay."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pruneexp.evidence import Gram, WantedOutput, others
from pruneexp.types import ConfigError, RunError


@dataclass(frozen=True)
class LeastSquares:
    """The reader that comes nearest to a wanted output on the kept channels.

    Minimises, over W' [O,K] and b' [O],

        sum_t ||y_t - (W' x_t[keep] + b')||^2 + lambda ||W' - W[:,keep]||^2

    in closed form: W' = W[:,keep] + (S_yx - W[:,keep] S_xx) (S_xx + lambda I)^-1 with the covariances S of y and
    x[keep], b' from the means. lambda is `ridge` times the mean variance of x (with target=dense: of
    x[keep], all that is seen there); it holds back the change alone, so that what nothing is told about keeps its
    weights. Float64, Cholesky, rounded once to the reader's dtype. Where nothing leaves, weight and bias come back
    untouched.

    target=pruned: y = W x + b, what the unpruned reader gives on the same inputs; keeping everything is the identity.
    target=dense: y is what makes the hidden state behind the reader the dense model's, so that the reader also makes up
    for what was lost before it. The second walk then goes sublayer by sublayer, the dense model's hidden states beside
    the pruned one's: two plain passes and less than one more. Sequential by nature.

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
        return self.in_place(weight_OC, bias_O, evidence.copy(), keep_C)

    def in_place(
        self, weight_OC: Tensor, bias_O: Tensor | None, evidence: Gram | WantedOutput, keep_C: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As calling it, but worked out in the memory of `evidence`, which is spent. Beside it 8 K O bytes are held
        for a `Gram`, the result alone for a `WantedOutput`."""
        if len(keep_C) == weight_OC.shape[1]:
            return weight_OC, bias_O
        device = weight_OC.device
        if isinstance(evidence, Gram):
            mean_C = evidence.mean_C.to(device)
            return refitted_(weight_OC, bias_O, evidence.covariance_().to(device), mean_C, keep_C, self.ridge)
        seen = evidence.narrowed(keep_C)
        mean_K, wanted_O, cov_KO = (t.to(device) for t in (seen.inputs.mean_C, seen.wanted_mean_O, seen.covariance_()))
        cov_KK = seen.inputs.covariance_().to(device)
        strength = self.ridge * cov_KK.trace() / max(1, len(keep_C))
        weight_OK = weight_OC[:, keep_C.to(device)]
        return fitted_(weight_OK, cov_KK, mean_K, cov_KO, wanted_O, strength, self.ridge)


def check_ridge(ridge: float) -> None:
    if not (ridge >= 0 and math.isfinite(ridge)):
        raise ConfigError(f"ridge={ridge!r}: expected a number >= 0")


def refitted_(
    weight_OC: Tensor, bias_O: Tensor | None, cov_CC: Tensor, mean_C: Tensor, keep_C: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """`LeastSquares`' solution for target=pruned from a covariance and means, float64, in the dtype of `weight_OC`, and
    in the memory of the covariance: W[:,keep] + W[:,gone] S_gone,keep (S_keep,keep + lambda I)^-1."""
    keep_C = keep_C.to(weight_OC.device)
    gone_C, strength = others(keep_C, weight_OC.shape[1]), ridge * cov_CC.diagonal().mean()
    gone_OG, missing_KO = weight_OC[:, gone_C].double(), mean_C.new_empty(len(keep_C), len(weight_OC))
    for rows in _parts(len(keep_C)):
        missing_KO[rows] = cov_CC[keep_C[rows]][:, gone_C] @ gone_OG.T
    solved_KO = _solved_(missing_KO, _compacted_(cov_CC, keep_C), strength, ridge)
    bias = gone_OG @ mean_C[gone_C] - solved_KO.T @ mean_C[keep_C]
    bias = bias if bias_O is None else bias + bias_O.double()
    return _rounded(solved_KO.add_(weight_OC[:, keep_C].T), weight_OC.dtype), bias.to(weight_OC.dtype)


def fitted_(
    weight_OK: Tensor,
    cov_KK: Tensor,
    mean_K: Tensor,
    cov_KO: Tensor,
    wanted_O: Tensor,
    strength: Tensor,
    ridge: float,
) -> tuple[Tensor, Tensor]:
    """`LeastSquares`' solution from the kept inputs' covariance and mean, their covariance with the wanted output and
    its mean, float64, in the memory of the covariances: (S_y,keep + lambda W[:,keep]) (S_keep,keep + lambda I)^-1 with
    lambda = `strength`."""
    # inputs that never change, as an expert's without tokens, leave nothing to fit
    cov_KO.add_(weight_OK.T, alpha=strength.item() if strength or not ridge else 1.0)
    solved_KO = _solved_(cov_KO, cov_KK, strength, ridge)
    bias_O = wanted_O - solved_KO.T @ mean_K
    return _rounded(solved_KO, weight_OK.dtype), bias_O.to(weight_OK.dtype)


def _solved_(right_KO: Tensor, cov_KK: Tensor, strength: Tensor, ridge: float) -> Tensor:
    """(S + strength I)^-1 right, in the memory of both; `right` itself where inputs never change."""
    if not len(cov_KK) or (ridge and not strength):
        return right_KO
    cov_KK.diagonal().add_(strength)
    upper_KK = cholesky_(cov_KK, ridge).T
    transposed_OK = right_KO.T  # solved from the right, where LAPACK finds its own order of elements and copies nothing
    for factor_KK, upper in ((upper_KK, True), (upper_KK.T, False)):
        torch.linalg.solve_triangular(factor_KK, transposed_OK, upper=upper, left=False, out=transposed_OK)
    return right_KO


def cholesky_(matrix_KK: Tensor, ridge: float) -> Tensor:
    """Lower factor of a symmetric matrix, in its memory. Raises RunError where the matrix is singular to float64."""
    scale, info = matrix_KK.diagonal().max(), torch.zeros((), dtype=torch.int32, device=matrix_KK.device)
    factor_KK = matrix_KK.T  # the same numbers, in LAPACK's order
    torch.linalg.cholesky_ex(factor_KK, out=(factor_KK, info))
    if info.any() or not (factor_KK.diagonal().square() > 1e-14 * scale).all():
        raise RunError(
            f"ridge={ridge!r}: the inputs' covariance is singular (constant or dependent channels); "
            "expected a larger ridge, such as 1e-4"
        )
    return factor_KK


def _compacted_(matrix_CC: Tensor, keep_C: Tensor) -> Tensor:
    """The rows and columns `keep_C` (ascending) of a matrix, moved to the front of its memory."""
    if (keep_C.diff() <= 0).any():
        raise ValueError("kept channels: expected in ascending order, each once")
    front_KK = matrix_CC.view(-1)[: len(keep_C) ** 2].view(len(keep_C), len(keep_C))
    for part in _parts(len(keep_C)):  # a row never moves behind one that is still to be read
        front_KK[part] = matrix_CC[keep_C[part]][:, keep_C]
    return front_KK


def _parts(rows: int) -> Iterator[slice]:
    return (slice(start, start + 512) for start in range(0, rows, 512))


def _rounded(weight_KO: Tensor, dtype: torch.dtype) -> Tensor:
    return weight_KO.to(dtype).T.contiguous()

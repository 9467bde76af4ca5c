"""Weights fitted to covariances in closed form, in the covariances' own memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from pruneexp.evidence.gram import WantedOutput, others
from pruneexp.types import ConfigError, RunError

RidgePer = Literal["channel", "site"]

_LEAST_VARIANCE = 1e-4  # of the mean: the least variance that a channel counts with


def held_back(variance_C: Tensor, per: RidgePer, mean: Tensor | None = None) -> Tensor:
    """What a ridge is multiplied by. per=channel: each channel's variance [C], so that the fit does not depend on how
    channels are scaled. per=site: the mean variance, which may be given as `mean`."""
    mean = variance_C.mean() if mean is None else mean
    return mean if per == "site" else variance_C.maximum(_LEAST_VARIANCE * mean)


def check_ridge(ridge: float) -> None:
    if not (ridge >= 0 and math.isfinite(ridge)):
        raise ConfigError(f"ridge={ridge!r}: expected a number >= 0")


def refitted_(
    weight_OC: Tensor,
    bias_O: Tensor | None,
    cov_CC: Tensor,
    mean_C: Tensor,
    keep_C: Tensor,
    ridge: float,
    per: RidgePer,
) -> tuple[Tensor, Tensor]:
    """The least-squares weights for the unpruned outputs, from a covariance and means, float64, in the dtype of
    `weight_OC`, and in the memory of the covariance: W[:,keep] + W[:,gone] S_gone,keep (S_keep,keep + L)^-1 with L
    diagonal, `ridge` times what is `held_back`."""
    keep_C = keep_C.to(weight_OC.device)
    variance_C = cov_CC.diagonal()
    gone_C = others(keep_C, weight_OC.shape[1])
    strength = ridge * held_back(variance_C[keep_C], per, variance_C.mean())
    gone_OG, missing_KO = weight_OC[:, gone_C].double(), mean_C.new_empty(len(keep_C), len(weight_OC))
    for rows in _parts(len(keep_C)):
        missing_KO[rows] = cov_CC[keep_C[rows]][:, gone_C] @ gone_OG.T
    solved_KO = _solved_(missing_KO, _compacted_(cov_CC, keep_C), strength, ridge)
    bias = gone_OG @ mean_C[gone_C] - solved_KO.T @ mean_C[keep_C]
    bias = bias if bias_O is None else bias + bias_O.double()
    return _rounded(solved_KO.add_(weight_OC[:, keep_C].T), weight_OC.dtype), bias.to(weight_OC.dtype)


def fitted_to_(
    seen: WantedOutput, weight_OK: Tensor, ridge: float, per: RidgePer, mean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The least-squares weights for the wanted output y, from covariances, float64, and in the memory of `seen`:
    (S_y,keep + W[:,keep] L) (S_keep,keep + L)^-1 with L diagonal, `ridge` times what is `held_back` of the inputs,
    whose `mean` variance may be given."""
    device = weight_OK.device
    mean_K, wanted_O, cov_KO = (t.to(device) for t in (seen.inputs.mean_C, seen.wanted_mean_O, seen.covariance_()))
    cov_KK = seen.inputs.covariance_().to(device)
    variance_K = cov_KK.diagonal()
    mean = variance_K.sum() / max(1, len(mean_K)) if mean is None else mean
    strength = ridge * held_back(variance_K, per, mean)  # of all, or of each
    # inputs that never change, as an expert's without tokens, leave nothing to fit
    towards_K = (strength if strength.any() or not ridge else torch.ones_like(strength)).expand(len(cov_KO))
    for rows in _parts(len(cov_KO)):
        cov_KO[rows] += weight_OK.T[rows] * towards_K[rows, None]
    solved_KO = _solved_(cov_KO, cov_KK, strength, ridge)
    bias_O = wanted_O - solved_KO.T @ mean_K
    return _rounded(solved_KO, weight_OK.dtype), bias_O.to(weight_OK.dtype)


def _solved_(right_KO: Tensor, cov_KK: Tensor, strength: Tensor, ridge: float) -> Tensor:
    """(S + L)^-1 right, L diagonal, in the memory of both; `right` itself where inputs never change."""
    if not len(cov_KK) or (ridge and not strength.any()):
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
        raise singular(ridge)
    return factor_KK


def singular(ridge: float) -> RunError:
    return RunError(
        f"ridge={ridge!r}: the inputs' covariance is singular (constant or dependent channels); "
        "expected a larger ridge, such as 1e-4"
    )


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

"""What criteria share: sums over a weight's columns, and units made of columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from pruneexp.evidence.statistics import wide
from pruneexp.types import ColumnScores, Site

Kind = TypeVar("Kind")

# How the scores of a unit's coupled matrices, stacked in the first dimension, become one.
MEMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda parts: parts.sum(0),
    "mean": lambda parts: parts.mean(0),
    "max": lambda parts: parts.amax(0),
    "prod": lambda parts: parts.prod(0),
    "first": lambda parts: parts[0],
    "second": lambda parts: parts[1],
}
_CHUNK = 2**20  # elements of a weight that are widened and squared together: the temporary stays in the cache


def with_settings(kind: type[Kind], criterion: Any) -> Kind:
    """A kind of evidence with the criterion's settings of the same names. Raises ConfigError where they cannot be."""
    return kind(**{field.name: getattr(criterion, field.name) for field in fields(kind)})  # type: ignore[arg-type]


def of_columns(site: Site, columns_C: Tensor) -> ColumnScores:
    return ColumnScores(columns_C.reshape(site.units, site.width).sum(1), columns_C)


def powers_C(weight_OC: Tensor, p: int) -> Tensor:
    """sum_i |w_ij|^p, float64 [C]; float64 weights in float64, others in float32 within a chunk of rows."""
    total_C = torch.zeros(weight_OC.shape[1], dtype=torch.float64, device=weight_OC.device)
    for w_OC in weight_OC.split(max(1, _CHUNK // max(1, weight_OC.shape[1]))):
        w_OC = wide(w_OC)
        total_C += (w_OC.abs() if p == 1 else w_OC.square()).sum(0)
    return total_C


def wifn_C(weight_OC: Tensor, mean_square_C: Tensor) -> Tensor:
    # sqrt(mean_t x_tj^2) is the same for every row i, so that it leaves the mean
    return powers_C(weight_OC, 1) / weight_OC.shape[0] * mean_square_C.sqrt()


def weighted_C(weight_OC: Tensor, rows_O: Tensor) -> Tensor:
    """sum_i |w_ij| rows_i, float64 [C]; in chunks of rows, as `powers_C`."""
    total_C = torch.zeros(weight_OC.shape[1], dtype=torch.float64, device=weight_OC.device)
    size = max(1, _CHUNK // max(1, weight_OC.shape[1]))
    for w_OC, rows in zip(weight_OC.split(size), rows_O.to(weight_OC.device).split(size), strict=True):
        w_OC = wide(w_OC).abs()
        total_C += rows.to(w_OC.dtype) @ w_OC
    return total_C


def relative_C(weight_OC: Tensor) -> Tensor:
    """sum_i |w_ij| / sum_k |w_ik|, float64 [C]: what share of each output's weights a column has. Rows of zeros have
    none."""
    rows_O = wide(weight_OC).abs().sum(1).double()
    return weighted_C(weight_OC, torch.where(rows_O > 0, 1 / rows_O.clamp_min(1e-300), 0.0))

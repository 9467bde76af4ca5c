"""Compensators that need no more than means: none at all, and FLAP's bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruneexp.evidence import Moments, RunningFluctuation, others


@dataclass(frozen=True)
class NoCompensation:
    """The kept columns as they are."""

    evidence: ClassVar[None] = None
    adds_bias: ClassVar[bool] = False

    sequential: bool

    def __call__(
        self, weight_OC: Tensor, bias_O: Tensor | None, evidence: object, keep_C: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        return _columns(weight_OC, keep_C), bias_O


@dataclass(frozen=True)
class Bias:
    """Removed channels give their mean: bias += W[:, removed] @ mean[removed], the unpruned W: FLAP's
    baseline bias compensation (An et al., AAAI 2024).

    Exact for channels that do not fluctuate. Float64 arithmetic, rounded once to the out-projection's dtype. Where
    nothing leaves, weight and bias come back untouched.
    """

    evidence: ClassVar[type[Moments] | type[RunningFluctuation]] = Moments
    adds_bias: ClassVar[bool] = True

    sequential: bool

    def __call__(
        self, weight_OC: Tensor, bias_O: Tensor | None, evidence: Moments | RunningFluctuation, keep_C: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if len(keep_C) == weight_OC.shape[1]:
            return weight_OC, bias_O
        gone_C = others(keep_C.to(weight_OC.device), weight_OC.shape[1])
        lost_O = weight_OC[:, gone_C].double() @ evidence.mean_C.to(weight_OC.device, torch.float64)[gone_C]
        bias_O = lost_O if bias_O is None else bias_O.double() + lost_O
        return _columns(weight_OC, keep_C), bias_O.to(weight_OC.dtype)


@dataclass(frozen=True)
class BiasOfficial(Bias):
    """`Bias` with the running mean of FLAP's released code, so that a run of `flap_official` collects one evidence.

    That mean is the mean of the sequences' means, and so `Bias`' own up to float32 rounding where they are equally
    long. Departs: there it is stored in float16, here as it is.
    """

    evidence: ClassVar[type[Moments] | type[RunningFluctuation]] = RunningFluctuation


def _columns(weight_OC: Tensor, keep_C: Tensor) -> Tensor:
    """The kept columns, contiguous; the weight itself where all are kept."""
    return weight_OC if len(keep_C) == weight_OC.shape[1] else weight_OC.index_select(1, keep_C.to(weight_OC.device))

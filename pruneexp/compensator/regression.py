"""Each output of an out-projection by itself, fitted to what it was: SlimLLM's linear regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruneexp.evidence import Gram
from pruneexp.types import Site


@dataclass(frozen=True)
class LinearRegression:
    """Scales and shifts every output (SlimLLM, Guo et al., ICML 2025; released code, commit 24881bf): with
    y_d = W_d x + b_d what the unpruned out-projection gives on the same inputs and z_d = W_d,keep x_keep,

        W'_d = a_d W_d,keep,  b'_d = mean(y_d) - a_d mean(z_d),  a_d = cov(y_d, z_d) / var(z_d)

    the least of sum_t (y_td - a_d z_td - b'_d)^2. Two numbers an output, where `LeastSquares` fits K: little text does.
    a_d is 1 where z_d never changes. Float64, rounded once to the out-projection's dtype. Where nothing leaves, weight
    and bias come back untouched. Departs: that code prunes and fits attention before the same layer's FFN is seen; here
    both are seen behind the layers before.
    """

    evidence: ClassVar[type[Gram]] = Gram
    few_tokens: ClassVar[bool] = True
    adds_bias: ClassVar[bool] = True

    sequential: bool

    def working_bytes(self, site: Site, outputs: int) -> int:
        """What covariances give with the weights, 16 C O bytes."""
        return 16 * site.channels * outputs

    def __call__(
        self, weight_OC: Tensor, bias_O: Tensor | None, evidence: Gram, keep_C: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Worked out in the memory of `evidence`, which is spent."""
        if len(keep_C) == weight_OC.shape[1]:
            return weight_OC, bias_O
        device, keep_C = weight_OC.device, keep_C.to(weight_OC.device)
        mean_C, cov_CC = evidence.mean_C.to(device), evidence.covariance_().to(device)
        whole_OC = weight_OC.double()
        kept_OK = whole_OC.index_select(1, keep_C)
        seen_KC = cov_CC.index_select(0, keep_C)
        covariance_O = ((whole_OC @ seen_KC.T) * kept_OK).sum(1)
        variance_O = ((kept_OK @ seen_KC.index_select(1, keep_C)) * kept_OK).sum(1)
        scale_O = torch.where(variance_O > 0, covariance_O / variance_O.clamp_min(1e-300), 1.0)
        shift_O = whole_OC @ mean_C - scale_O * (kept_OK @ mean_C[keep_C])
        if bias_O is not None:
            shift_O = shift_O + bias_O.double()
        return (scale_O[:, None] * kept_OK).to(weight_OC.dtype), shift_O.to(weight_OC.dtype)

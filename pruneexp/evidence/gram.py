"""Second moments of a reader's input, alone or with the output that is wanted of it.

What has a `_` at the end of its name (`update_`, `covariance_`) works in the memory of the value, which is then spent:
for whoever alone holds it, and cannot hold two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pruneexp.evidence.statistics import _chunks_NC, _require_tokens
from pruneexp.types import Site

_CHUNK = 2**22  # elements looked at together on a CPU: a Gram is read and written once a chunk
_ROWS = 256  # of a Gram's lower triangle, multiplied at once


def grown(evidence: Any, *seen: Any) -> Any:
    """`evidence` of any kind and what was seen since, for whoever alone holds it."""
    return getattr(evidence, "update_", evidence.update)(*seen)


def _add_(sum_C: Tensor, gram_CC: Tensor, x_NC: Tensor) -> None:
    """Adds float64 tokens to a Gram's sums: to the lower triangle alone, a run of rows at a time."""
    sum_C += x_NC.sum(0)
    for start in range(0, len(gram_CC), _ROWS):
        end = start + _ROWS
        gram_CC[start:end, :end].addmm_(x_NC[:, start:end].T, x_NC[:, :end])


def _mirror_(gram_CC: Tensor) -> None:
    """The upper triangle from the lower one."""
    for start in range(_ROWS, len(gram_CC), _ROWS):
        gram_CC[:start, start : start + _ROWS] = gram_CC[start : start + _ROWS, :start].T


@dataclass(frozen=True)
class Gram:
    """Second moments of a reader's input: gram_CC = sum_t x_t x_t^T (not centred) and sum_C = sum_t x_t, float64.

    Products are formed and summed in float64, so the statistic is chunk-invariant up to float64 rounding. Memory: 8 C^2
    bytes; `update` holds the old and the new value for a moment, `update_` does not. C^2 flops a token: one triangle.
    """

    source: ClassVar[str] = "reader"

    n: int  # tokens
    sum_C: Tensor
    gram_CC: Tensor

    @classmethod
    def empty(cls, site: Site) -> Gram:
        c = site.channels
        return cls(0, torch.zeros(c, dtype=torch.float64), torch.zeros(c, c, dtype=torch.float64))

    def update(self, x_BTC: Tensor) -> Gram:
        return self.copy().update_(x_BTC)

    def update_(self, x_BTC: Tensor) -> Gram:
        sum_C, gram_CC = self._at(self.sum_C, x_BTC.device), self._at(self.gram_CC, x_BTC.device)
        for x_NC in _chunks_NC(x_BTC.detach(), _CHUNK):
            _add_(sum_C, gram_CC, x_NC.double())
        _mirror_(gram_CC)
        return Gram(self.n + x_BTC.shape[:-1].numel(), sum_C, gram_CC)

    def _at(self, sums: Tensor, device: torch.device) -> Tensor:
        """On `device`; zeros are made there rather than sent."""
        return sums.to(device) if self.n or sums.device == device else torch.zeros_like(sums, device=device)

    def copy(self) -> Gram:
        return Gram(self.n, self.sum_C.clone(), self.gram_CC.clone())

    def merge(self, other: Gram) -> Gram:
        device = other.sum_C.device
        return Gram(self.n + other.n, self.sum_C.to(device) + other.sum_C, self.gram_CC.to(device) + other.gram_CC)

    @property
    def mean_C(self) -> Tensor:
        _require_tokens(self.n, 1)
        return self.sum_C / self.n

    @property
    def covariance_CC(self) -> Tensor:
        """(gram - n mean mean^T) / (n - 1), unbiased. Raises RunError for fewer than two tokens."""
        return self.copy().covariance_()

    def covariance_(self) -> Tensor:
        """`covariance_CC` in the memory of gram_CC, which is spent."""
        _require_tokens(self.n, 2)
        mean_C = self.mean_C
        return self.gram_CC.addr_(mean_C, mean_C, alpha=-self.n).div_(self.n - 1)


@dataclass(frozen=True)
class WantedOutput:
    """A reader's input beside the output that is wanted of it: sums, centred when they are read.

    `update(x_BTC, y_BTO)`: y is what the reader would have to give for the hidden state behind it to be the dense
    model's, x what the layers before give it as they are. inputs is the Gram of x; cross_CO = sum_t x_t y_t^T and
    wanted_O = sum_t y_t, float64.
    """

    source: ClassVar[str] = "wanted"

    inputs: Gram
    wanted_O: Tensor
    cross_CO: Tensor

    @classmethod
    def empty(cls, site: Site) -> WantedOutput:
        return cls(Gram.empty(site), torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64))

    def update(self, x_BTC: Tensor, y_BTO: Tensor) -> WantedOutput:
        return self.copy().update_(x_BTC, y_BTO)

    def update_(self, x_BTC: Tensor, y_BTO: Tensor) -> WantedOutput:
        x_NC, y_NO = (t.detach().flatten(0, -2) for t in (x_BTC, y_BTO))
        sum_C, gram_CC = self.inputs.sum_C.to(x_NC.device), self.inputs.gram_CC.to(x_NC.device)
        wanted_O, cross_CO = self.wanted_O.to(x_NC.device), self.cross_CO.to(x_NC.device)
        if self.inputs.n == 0:
            wanted_O = torch.zeros(y_NO.shape[1], dtype=torch.float64, device=x_NC.device)
            cross_CO = wanted_O.new_zeros(x_NC.shape[1], y_NO.shape[1])
        x_chunks = list(_chunks_NC(x_NC, _CHUNK))
        y_chunks = y_NO.split(len(x_chunks[0])) if x_chunks else ()
        for x_nC, y_nO in zip(x_chunks, y_chunks, strict=True):
            x_nC, y_nO = x_nC.double(), y_nO.double()
            _add_(sum_C, gram_CC, x_nC)
            wanted_O += y_nO.sum(0)
            cross_CO.addmm_(x_nC.T, y_nO)
        _mirror_(gram_CC)
        return WantedOutput(Gram(self.inputs.n + len(x_NC), sum_C, gram_CC), wanted_O, cross_CO)

    def copy(self) -> WantedOutput:
        return WantedOutput(self.inputs.copy(), self.wanted_O.clone(), self.cross_CO.clone())

    def merge(self, other: WantedOutput) -> WantedOutput:
        if self.inputs.n == 0:
            return other
        if other.inputs.n == 0:
            return self
        device = other.wanted_O.device
        wanted_O, cross_CO = self.wanted_O.to(device) + other.wanted_O, self.cross_CO.to(device) + other.cross_CO
        return WantedOutput(self.inputs.merge(other.inputs), wanted_O, cross_CO)

    @property
    def wanted_mean_O(self) -> Tensor:
        _require_tokens(self.inputs.n, 1)
        return self.wanted_O / self.inputs.n

    @property
    def covariance_CO(self) -> Tensor:
        """Of x with y, unbiased. Raises RunError for fewer than two tokens."""
        return self.copy().covariance_()

    def covariance_(self) -> Tensor:
        """`covariance_CO` in the memory of cross_CO, which is spent."""
        _require_tokens(self.inputs.n, 2)
        return self.cross_CO.addr_(self.inputs.sum_C, self.wanted_mean_O, alpha=-1).div_(self.inputs.n - 1)

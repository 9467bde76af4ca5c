"""Second moments of an out-projection's input, alone or with the output that is wanted of it.

A method whose name ends in `_` (`update_`, `covariance_`) works in the memory of the value, which is then spent. It is
for callers that alone hold the value and have no room for two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pruneexp.evidence.statistics import _chunks_NC, _require_tokens
from pruneexp.types import Site

_CHUNK = 2**22  # elements looked at together on a CPU: a Gram is read and written once a chunk
_ROWS = (64, 256)  # of a Gram's lower triangle, multiplied at once: a quarter of them within these bounds


def _add_(sum_C: Tensor, gram_CC: Tensor, x_NC: Tensor) -> None:
    """Adds float64 tokens to a Gram's sums: to the lower triangle alone, a run of rows at a time."""
    sum_C += x_NC.sum(0)
    rows = _rows(len(gram_CC))
    for start in range(0, len(gram_CC), rows):
        end = start + rows
        gram_CC[start:end, :end].addmm_(x_NC[:, start:end].T, x_NC[:, :end])


def _mirror_(gram_CC: Tensor) -> None:
    """The upper triangle from the lower one."""
    rows = _rows(len(gram_CC))
    for start in range(rows, len(gram_CC), rows):
        gram_CC[:start, start : start + rows] = gram_CC[start : start + rows, :start].T


def _rows(width: int) -> int:
    least, most = _ROWS
    return min(most, max(least, width // 4))


@dataclass(frozen=True)
class Gram:
    """Second moments of an out-projection's input: gram_CC = sum_t x_t x_t^T (not centred) and sum_C = sum_t x_t,
    float64.

    Products are formed and summed in float64, so the statistic is chunk-invariant up to float64 rounding. Memory: 8 C^2
    bytes. C^2 flops a token: one triangle.
    """

    source: ClassVar[str] = "reader"
    fits: ClassVar[bool] = True

    n: int  # tokens
    sum_C: Tensor
    gram_CC: Tensor

    @classmethod
    def empty(cls, site: Site) -> Gram:
        return cls.of_width(site.channels)

    @classmethod
    def of_width(cls, c: int) -> Gram:
        """Of as many channels, before any token."""
        return cls(0, torch.zeros(c, dtype=torch.float64), torch.zeros(c, c, dtype=torch.float64))

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
    """The inputs that an out-projection is left with, beside the output that is wanted of it: sums, centred when they
    are read.

    `update_(x_BTK, y_BTO)`: x is the out-projection's input in the partly pruned model, of the channels `keep_C` or of
    all, from which these are taken. y is the output that would make the hidden state behind the out-projection the
    dense model's. inputs is the Gram of x, cross_KO = sum_t x_t y_t^T, wanted_O = sum_t y_t; all float64.
    """

    source: ClassVar[str] = "wanted"
    fits: ClassVar[bool] = True

    keep_C: Tensor  # indices [K], ascending
    inputs: Gram
    wanted_O: Tensor
    cross_KO: Tensor

    @classmethod
    def empty(cls, site: Site) -> WantedOutput:
        """Of all channels, before any token."""
        return cls.of(site, torch.arange(site.channels))

    @staticmethod
    def held_bytes(site: Site, outputs: int, itemsize: int) -> int:
        """8 C^2 and 8 C O bytes, if all channels stay."""
        return 8 * site.channels * (site.channels + outputs)

    @classmethod
    def of(cls, site: Site, keep_C: Tensor) -> WantedOutput:
        """Of the channels `keep_C`, before any token."""
        none = torch.zeros(0, dtype=torch.float64)
        return cls(keep_C, Gram.of_width(len(keep_C)), none, none[:, None])

    def update_(self, x_BTK: Tensor, y_BTO: Tensor) -> WantedOutput:
        x_NK, y_NO = x_BTK.detach().flatten(0, -2), y_BTO.detach().flatten(0, -2)
        if x_NK.shape[1] != len(self.keep_C):
            x_NK = x_NK.index_select(1, self.keep_C.to(x_NK.device))
        sum_K, gram_KK, wanted_O, cross_KO = (
            t.to(x_NK.device) for t in (self.inputs.sum_C, self.inputs.gram_CC, self.wanted_O, self.cross_KO)
        )
        if self.inputs.n == 0:
            wanted_O = wanted_O.new_zeros(y_NO.shape[1])
            cross_KO = wanted_O.new_zeros(x_NK.shape[1], y_NO.shape[1])
        for x_nK, y_nO in _chunks_beside(x_NK, y_NO):
            x_nK, y_nO = x_nK.double(), y_nO.double()
            _add_(sum_K, gram_KK, x_nK)
            wanted_O += y_nO.sum(0)
            cross_KO.addmm_(x_nK.T, y_nO)
        _mirror_(gram_KK)
        return WantedOutput(self.keep_C, Gram(self.inputs.n + len(x_NK), sum_K, gram_KK), wanted_O, cross_KO)

    def copy(self) -> WantedOutput:
        wanted_O, cross_KO = self.wanted_O.clone(), self.cross_KO.clone()
        return replace(self, inputs=self.inputs.copy(), wanted_O=wanted_O, cross_KO=cross_KO)

    def merge(self, other: WantedOutput) -> WantedOutput:
        if self.inputs.n == 0:
            return other
        if other.inputs.n == 0:
            return self
        device = other.wanted_O.device
        sums = {name: getattr(self, name).to(device) + getattr(other, name) for name in ("wanted_O", "cross_KO")}
        return replace(self, inputs=self.inputs.merge(other.inputs), **sums)

    def narrowed(self, keep_C: Tensor) -> WantedOutput:
        """Evidence of some of its channels (ascending, each once); of all of them, itself."""
        keep_C = keep_C.to(self.keep_C.device).contiguous()
        if torch.equal(keep_C, self.keep_C):
            return self
        if (keep_C.diff() <= 0).any() or not torch.isin(keep_C, self.keep_C).all():
            raise ValueError("kept channels: expected some of those looked at, in ascending order, each once")
        at_K = torch.searchsorted(self.keep_C, keep_C).to(self.inputs.sum_C.device)
        inputs = Gram(self.inputs.n, self.inputs.sum_C[at_K], self.inputs.gram_CC[at_K][:, at_K])
        return WantedOutput(keep_C, inputs, self.wanted_O, self.cross_KO[at_K.to(self.cross_KO.device)])

    @property
    def wanted_mean_O(self) -> Tensor:
        _require_tokens(self.inputs.n, 1)
        return self.wanted_O / self.inputs.n

    def covariance_(self) -> Tensor:
        """Of x with y, unbiased, [K, O], in the memory of cross_KO, which is spent. Raises RunError for fewer than two
        tokens."""
        _require_tokens(self.inputs.n, 2)
        return self.cross_KO.addr_(self.inputs.sum_C, self.wanted_mean_O, alpha=-1).div_(self.inputs.n - 1)


def _chunks_beside(x_NK: Tensor, y_NO: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in runs of the same tokens. An out-projection may have no inputs left."""
    chunks = list(_chunks_NC(x_NK, _CHUNK)) if x_NK.numel() else [x_NK]
    return zip(chunks, y_NO.split(len(chunks[0])), strict=True)


def others(some: Tensor, count: int) -> Tensor:
    """The indices below `count` that are not among `some`, ascending."""
    left = torch.ones(count, dtype=torch.bool, device=some.device)
    left[some] = False
    return left.nonzero().flatten()

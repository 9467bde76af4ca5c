"""What calibration collects at an out-projection's input.

`update_(x_BTC)` receives the input of the site's out-projection (o_proj, down_proj, fc2), batch by batch. All
return new values, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pruneexp.types import RunError, Site

# Elements looked at together. On a CPU a chunk and its one temporary stay in the last-level cache, so that memory sees
# one reading of x and no writing; smaller chunks lose to the cost of starting the threads. An accelerator reduces in
# a tree, so that only its memory bounds a chunk.
_CPU_CHUNK = 2**20
_DEVICE_CHUNK = 2**25


def wide(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _chunks_NC(x_BTC: Tensor, cpu_chunk: int | None = None) -> Iterator[Tensor]:
    """Runs of tokens [n, C] that are cheap to work on: `cpu_chunk` elements each, or as many as a CPU's cache takes."""
    x_NC = x_BTC.flatten(0, -2)
    size = (cpu_chunk or _CPU_CHUNK) if x_NC.device.type == "cpu" else _DEVICE_CHUNK
    return iter(x_NC.split(max(1, size // max(1, x_NC.shape[1])))) if len(x_NC) else iter(())


def _sum_squares_C(d_NC: Tensor) -> Tensor:
    """sum_n d^2 [C]; overwrites `d_NC`, which is the caller's temporary."""
    if d_NC.device.type == "cpu":
        return d_NC.square_().sum(0)  # vectorised; vector_norm along the outer axis is not, and is 3x slower
    return torch.linalg.vector_norm(d_NC, dim=0).square_()  # one read, no write


@dataclass(frozen=True)
class Moments:
    """Mean and spread of each out-projection channel over all tokens: mean_C, variance_C, mean_square_C, float64 [C].

    mean_C = sum_t x_t / n and m2_C = sum_t (x_t - mean)^2, float64 [C]. Chunk-invariant: chunks are centred on their
    own mean and joined by the pairwise update of Chan, Golub and LeVeque (1983). Inside a chunk (2^20 elements)
    float64 input is reduced in float64, anything else in float32, centred before it is squared: a variance is then good
    to about 1e-6 relative, whatever the offset, a mean to 1e-6 standard deviations (or 1e-8 of itself).
    """

    source: ClassVar[str] = "reader"

    n: int  # tokens
    mean_C: Tensor
    m2_C: Tensor

    @classmethod
    def empty(cls, site: Site) -> Moments:
        return cls(0, torch.zeros(site.channels, dtype=torch.float64), torch.zeros(site.channels, dtype=torch.float64))

    def update_(self, x_BTC: Tensor) -> Moments:
        total = self
        for x_NC in _chunks_NC(x_BTC.detach()):
            n, near_C = len(x_NC), x_NC.mean(0, dtype=wide(x_NC[:0]).dtype)
            d_NC = x_NC - near_C  # half precision is promoted to float32 here
            rest_C = d_NC.sum(0).double()  # what rounding left of the mean: matters where it is large
            m2_C = _sum_squares_C(d_NC).double() - rest_C.square() / n
            total = total.merge(Moments(n, near_C.double() + rest_C / n, m2_C.clamp_min(0)))
        return total

    def merge(self, other: Moments) -> Moments:
        if self.n == 0:
            return other
        if other.n == 0:
            return self
        n = self.n + other.n
        apart_C = other.mean_C - self.mean_C.to(other.mean_C.device)
        mean_C = self.mean_C.to(apart_C.device) + apart_C * (other.n / n)
        m2_C = self.m2_C.to(apart_C.device) + other.m2_C + apart_C.square() * (self.n * other.n / n)
        return Moments(n, mean_C, m2_C)

    @property
    def variance_C(self) -> Tensor:
        """m2 / (n - 1), unbiased. Raises RunError for fewer than two tokens."""
        _require_tokens(self.n, 2)
        return self.m2_C / (self.n - 1)

    @property
    def mean_square_C(self) -> Tensor:
        """mean_t x_t^2 = m2 / n + mean^2."""
        _require_tokens(self.n, 1)
        return self.m2_C / self.n + self.mean_C.square()


@dataclass(frozen=True)
class InputMoments(Moments):
    """`Moments` of what the site's in-projections read, [D]: source "writer"."""

    source: ClassVar[str] = "writer"

    @classmethod
    def empty(cls, site: Site) -> InputMoments:
        return cls(0, torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))


@dataclass(frozen=True)
class AbsoluteMoments:
    """Mean size of each out-projection channel over all tokens: sum_C = sum_t |x_t|, float64 [C], of sums within a
    chunk in float32 (float64 for float64 input). Chunk-invariant up to that rounding."""

    source: ClassVar[str] = "reader"

    n: int  # tokens
    sum_C: Tensor

    @classmethod
    def empty(cls, site: Site) -> AbsoluteMoments:
        return cls(0, torch.zeros(site.channels, dtype=torch.float64))

    def update_(self, x_BTC: Tensor) -> AbsoluteMoments:
        total = self
        for x_NC in _chunks_NC(x_BTC.detach()):
            total = total.merge(AbsoluteMoments(len(x_NC), wide(x_NC).abs().sum(0).double()))
        return total

    def merge(self, other: AbsoluteMoments) -> AbsoluteMoments:
        return AbsoluteMoments(self.n + other.n, self.sum_C.to(other.sum_C.device) + other.sum_C)

    @property
    def mean_C(self) -> Tensor:
        """mean_t |x_t|. Raises RunError without tokens."""
        _require_tokens(self.n, 1)
        return self.sum_C / self.n


@dataclass(frozen=True)
class WindowNorms:
    """Mean over windows of the L2 norm of each out-projection channel: sum_C = sum_w sqrt(sum_t x_wt^2), float64 [C].

    A window's squares are summed in float32 (float64 for float64 input). Chunk-invariant up to that rounding, and
    independent of the order of the windows.
    """

    source: ClassVar[str] = "reader"
    by_window: ClassVar[bool] = True

    n: int  # windows
    sum_C: Tensor

    @classmethod
    def empty(cls, site: Site) -> WindowNorms:
        return cls(0, torch.zeros(site.channels, dtype=torch.float64))

    def update_(self, x_BTC: Tensor) -> WindowNorms:
        norms = [_sum_squares_C(wide(x_TC).clone()).double().sqrt() for x_TC in x_BTC.detach()]
        return self.merge(WindowNorms(len(norms), torch.stack(norms).sum(0)))

    def merge(self, other: WindowNorms) -> WindowNorms:
        return WindowNorms(self.n + other.n, self.sum_C.to(other.sum_C.device) + other.sum_C)

    @property
    def mean_C(self) -> Tensor:
        """mean_w ||x_w||_2. Raises RunError without windows."""
        if not self.n:
            raise RunError("no calibration window was seen: expected at least 1 for the norm of a channel")
        return self.sum_C / self.n


@dataclass(frozen=True)
class RunningFluctuation:
    """The estimators of FLAP's released code (`BiasGPT`, commit 3bb57db), operation by operation, in float32.

    Sequence number s = 0, 1, ... with tokens x_t, per channel:

        mean   <- mean * s/(s+1) + mean_t(x_t) / (s+1)
        fluct  <- 0                                                          for s = 0: the first one is not counted
                  fluct * (s-1)/s + sum_t (x_t - mean)^2 / (s+1)             later; both factors use the new mean
        scaler <- scaler * s/(s+1) + ||x||_2^2 / (s+1)

    Quirks kept: that code means one factor to be x_t - (old mean), but "old" is an alias of the tensor that it
    then changes; the sum over tokens is not divided by T (fluct is about T times the variance, which no ranking sees).
    Not kept: there the mean of float16 input is rounded to float16; here half precision becomes float32 first, and
    float64 stays. Depends on the order of the sequences (not on how they are batched): there is no `merge`.
    """

    source: ClassVar[str] = "reader"
    by_window: ClassVar[bool] = True

    n: int  # sequences
    mean_C: Tensor
    fluctuation_C: Tensor
    scaler_C: Tensor

    @classmethod
    def empty(cls, site: Site) -> RunningFluctuation:
        return cls(0, *(torch.zeros(site.channels) for _ in range(3)))

    def update_(self, x_BTC: Tensor) -> RunningFluctuation:
        n, device = self.n, x_BTC.device
        mean_C, fluctuation_C, scaler_C = (s.to(device) for s in (self.mean_C, self.fluctuation_C, self.scaler_C))
        for x_TC in wide(x_BTC.detach()):
            mean_C = mean_C * (n / (n + 1)) + x_TC.mean(0) / (n + 1)
            scaler_C = scaler_C * (n / (n + 1)) + torch.linalg.vector_norm(x_TC, dim=0) ** 2 / (n + 1)
            if n > 0:
                fluctuation_C = fluctuation_C * ((n - 1) / n) + (x_TC - mean_C).square_().sum(0) / (n + 1)
            n += 1
        return RunningFluctuation(n, mean_C, fluctuation_C, scaler_C)

    def merge(self, other: RunningFluctuation) -> RunningFluctuation:
        raise RunError(
            "RunningFluctuation depends on the order of the sequences and cannot be merged: collect it in one pass, "
            "or use criterion=flap, whose moments can"
        )


def _require_tokens(n: int, least: int) -> None:
    if n < least:
        raise RunError(f"{n} calibration tokens were seen: expected at least {least} for a statistic of them")

"""Importance of every unit of every site, higher = keep: weights and evidence to scores.

Criteria that judge a reader's channels answer with `ColumnScores`: a unit's score is the sum of its channels' (heads:
W channels, FFN: one), and the channels stay at hand for searches that standardise by their spread. Scores are as the
paper's formula has them, never standardised here: comparing sites is the search's business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pruneexp.evidence import Moments, RunningFluctuation
from pruneexp.types import Block, ColumnScores, Score, Site, SiteWeights

_CHUNK = 2**20  # elements of a weight that are widened and squared together: the temporary stays in the cache


@dataclass(frozen=True)
class Random:
    """Uniform draws from [0, 1): the floor that every criterion has to beat.

    A site's draws depend on `seed` and the site's name alone, not on which other sites there are.
    """

    evidence: ClassVar[None] = None
    sequential: ClassVar[bool] = False

    seed: int

    def __call__(self, block: Block, evidence: Mapping[str, object]) -> dict[str, Score]:
        return {site.name: self._draw_U(site) for site in block.sites}

    def _draw_U(self, site: Site) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}:{site.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.rand(site.units, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Magnitude:
    """Size of a unit's weights.

    members=reader: sum over the unit's channels j of (sum_i |W_ij|^p)^(1/p), W [O,C] the reader, p = `norm`; p = 2 is
    FLAP's baseline mag_sp (released code, commit 3bb57db).
    members=coupled: mean over the site's matrices of sum |w|^p over the unit's rows (writers) or columns (reader), no
    root: the L1 and L2 baselines of LLM-Pruner (Ma et al., NeurIPS 2023), biases not counted.
    """

    evidence: ClassVar[None] = None
    sequential: ClassVar[bool] = False

    members: Literal["reader", "coupled"]
    norm: Literal[1, 2]

    def __call__(self, block: Block, evidence: Mapping[str, object]) -> dict[str, Score]:
        score = {"reader": self._reader, "coupled": self._coupled}[self.members]
        return {site.name: score(site, block.weights[site.name]) for site in block.sites}

    def _reader(self, site: Site, weights: SiteWeights) -> ColumnScores:
        return _of_columns(site, _powers_C(weights.reader, self.norm) ** (1 / self.norm))

    def _coupled(self, site: Site, weights: SiteWeights) -> Tensor:
        rows = [_powers_C(w_URD.reshape(site.units, -1).T, self.norm) for w_URD in weights.writers.values()]
        columns_U = _powers_C(weights.reader, self.norm).reshape(site.units, -1).sum(1)
        return torch.stack([*rows, columns_U]).mean(0)


@dataclass(frozen=True)
class WandaSp:
    """Wanda made structured: channel j = mean_i |W_ij| * sqrt(mean_t x_tj^2), W [O,C] the reader, x its input.

    Element score of Wanda (Sun et al., ICLR 2024, eq. 1), averaged over the output rows i as FLAP's baseline wanda_sp
    does; a head is the `heads` = sum (FLAP) or mean (backprop-free pruning) of its channels. The released code takes
    the mean over sequences of ||x||_2^2, which differs by the factor T that no ranking sees.
    """

    evidence: ClassVar[type[Moments]] = Moments

    heads: Literal["sum", "mean"]
    sequential: bool

    def __call__(self, block: Block, evidence: Mapping[str, Moments]) -> dict[str, Score]:
        return {site.name: self._score(site, block.weights[site.name], evidence[site.name]) for site in block.sites}

    def _score(self, site: Site, weights: SiteWeights, moments: Moments) -> ColumnScores:
        scale = {"sum": 1.0, "mean": 1 / site.width}[self.heads]
        return _of_columns(site, _wifn_C(weights.reader, moments.mean_square_C) * scale)


@dataclass(frozen=True)
class Flap:
    """FLAP's fluctuation metrics as the paper means them (An et al., AAAI 2024).

    With W [O,C] the reader and x its input, channel j scores
        WIFV  var_t(x_tj) * sum_i W_ij^2      IFV  var_t(x_tj)      WIFN  mean_i |W_ij| * sqrt(mean_t x_tj^2)
    var_t is the unbiased variance over all calibration tokens; heads add up their channels. The paper's metric is per
    channel; the released code estimates the variance otherwise and squares the metric of attention: `FlapOfficial`.
    """

    evidence: ClassVar[type[Moments]] = Moments

    metric: Literal["WIFV", "IFV", "WIFN"]
    sequential: bool

    def __call__(self, block: Block, evidence: Mapping[str, Moments]) -> dict[str, Score]:
        metric = _FLAP[self.metric]
        return {s.name: _of_columns(s, metric(block.weights[s.name].reader, evidence[s.name])) for s in block.sites}


@dataclass(frozen=True)
class FlapOfficial:
    """FLAP's metrics as the released code computes them (commit 3bb57db), in float32 and in its order of operations.

    `Flap`'s three formulas with the running fluctuation for the variance and the running squared norm for the mean
    square. Quirk: for attention the metric of each channel is squared before anything else. Departs: weights in half
    precision are widened to float32 first. That code knows LLaMA without grouped queries alone; elsewhere a unit is
    a KV group with all its query heads' channels.
    """

    evidence: ClassVar[type[RunningFluctuation]] = RunningFluctuation

    metric: Literal["WIFV", "IFV", "WIFN"]
    sequential: bool

    def __call__(self, block: Block, evidence: Mapping[str, RunningFluctuation]) -> dict[str, Score]:
        return {s.name: self._score(s, block.weights[s.name].reader, evidence[s.name]) for s in block.sites}

    def _score(self, site: Site, reader_OC: Tensor, seen: RunningFluctuation) -> ColumnScores:
        metric_C = _FLAP_OFFICIAL[self.metric](_wide(reader_OC), seen)
        return _of_columns(site, metric_C**2 if site.kind == "attention" else metric_C)


def _wifn_C(reader_OC: Tensor, mean_square_C: Tensor) -> Tensor:
    # sqrt(mean_t x_tj^2) is the same for every row i, so that it leaves the mean
    return _powers_C(reader_OC, 1) / reader_OC.shape[0] * mean_square_C.sqrt()


_FLAP: dict[str, Callable[[Tensor, Moments], Tensor]] = {
    "WIFV": lambda reader_OC, moments: moments.variance_C * _powers_C(reader_OC, 2),
    "IFV": lambda reader_OC, moments: moments.variance_C,
    "WIFN": lambda reader_OC, moments: _wifn_C(reader_OC, moments.mean_square_C),
}

_FLAP_OFFICIAL: dict[str, Callable[[Tensor, RunningFluctuation], Tensor]] = {
    "WIFV": lambda reader_OC, seen: seen.fluctuation_C * reader_OC.square().sum(0),
    "IFV": lambda reader_OC, seen: seen.fluctuation_C,
    "WIFN": lambda reader_OC, seen: (reader_OC.abs() * seen.scaler_C.sqrt()).mean(0),
}


def _of_columns(site: Site, columns_C: Tensor) -> ColumnScores:
    return ColumnScores(columns_C.reshape(site.units, site.width).sum(1), columns_C)


def _powers_C(weight_OC: Tensor, p: int) -> Tensor:
    """sum_i |w_ij|^p, float64 [C]; float64 weights in float64, others in float32 within a chunk of rows."""
    total_C = torch.zeros(weight_OC.shape[1], dtype=torch.float64, device=weight_OC.device)
    for w_OC in weight_OC.split(max(1, _CHUNK // max(1, weight_OC.shape[1]))):
        w_OC = _wide(w_OC)
        total_C += (w_OC.abs() if p == 1 else w_OC.square()).sum(0)
    return total_C


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()

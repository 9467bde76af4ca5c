"""Importance from weights and what the out-projection is given: Wanda, FLAP, 2SSP and CFSP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from pruneexp.criterion.common import of_columns, powers_C, relative_C, wide, wifn_C
from pruneexp.evidence import Moments, RunningFluctuation, WindowNorms
from pruneexp.types import Block, ColumnScores, RunError, Score, Sequential, Site, SiteWeights


@dataclass(frozen=True)
class WandaSp:
    """Wanda made structured: channel j = mean_i |W_ij| * sqrt(mean_t x_tj^2), W [O,C] the out-projection, x its input.

    Element score of Wanda (Sun et al., ICLR 2024, eq. 1), averaged over the output rows i as FLAP's baseline wanda_sp
    does; a head is the `heads` = sum (FLAP) or mean (backprop-free pruning) of its channels. The released code takes
    the mean over sequences of ||x||_2^2, which differs by the factor T that no ranking sees.
    """

    evidence: ClassVar[type[Moments]] = Moments

    heads: Literal["sum", "mean"]
    sequential: Sequential

    def __call__(self, block: Block, evidence: Mapping[str, Moments]) -> dict[str, Score]:
        return {site.name: self._score(site, block.weights[site.name], evidence[site.name]) for site in block.sites}

    def _score(self, site: Site, weights: SiteWeights, moments: Moments) -> ColumnScores:
        scale = {"sum": 1.0, "mean": 1 / site.width}[self.heads]
        return of_columns(site, wifn_C(weights.out_projection, moments.mean_square_C) * scale)


@dataclass(frozen=True)
class Flap:
    """FLAP's fluctuation metrics as the paper means them (An et al., AAAI 2024).

    With W [O,C] the out-projection and x its input, channel j scores
        WIFV  var_t(x_tj) * sum_i W_ij^2      IFV  var_t(x_tj)      WIFN  mean_i |W_ij| * sqrt(mean_t x_tj^2)
    var_t is the unbiased variance over all calibration tokens; heads add up their channels. The paper's metric is per
    channel; the released code estimates the variance otherwise and squares the metric of attention: `FlapOfficial`.
    """

    evidence: ClassVar[type[Moments]] = Moments

    metric: Literal["WIFV", "IFV", "WIFN"]
    sequential: Sequential

    def __call__(self, block: Block, evidence: Mapping[str, Moments]) -> dict[str, Score]:
        metric = _FLAP[self.metric]
        return {
            s.name: of_columns(s, metric(block.weights[s.name].out_projection, evidence[s.name])) for s in block.sites
        }


@dataclass(frozen=True)
class FlapOfficial:
    """FLAP's metrics as the released code computes them (commit 3bb57db), in float32 and in its order of operations.

    `Flap`'s three formulas with the running fluctuation for the variance and the running squared norm for the mean
    square. Quirk: for attention the metric of each channel is squared before anything else. Departs: weights in half
    precision are widened to float32 first. That code knows LLaMA without grouped queries alone; elsewhere a unit is
    a KV group with all its query heads' channels. Raises RunError for a single window, whose fluctuation is 0.
    """

    evidence: ClassVar[type[RunningFluctuation]] = RunningFluctuation

    metric: Literal["WIFV", "IFV", "WIFN"]
    sequential: Sequential

    def __call__(self, block: Block, evidence: Mapping[str, RunningFluctuation]) -> dict[str, Score]:
        return {s.name: self._score(s, block.weights[s.name].out_projection, evidence[s.name]) for s in block.sites}

    def _score(self, site: Site, weight_OC: Tensor, seen: RunningFluctuation) -> ColumnScores:
        if seen.n < 2 and self.metric != "WIFN":
            raise RunError(f"{seen.n} calibration windows: expected at least 2, the first of which does not count")
        metric_C = _FLAP_OFFICIAL[self.metric](wide(weight_OC), seen)
        return of_columns(site, metric_C**2 if site.kind == "attention" else metric_C)


@dataclass(frozen=True)
class ActivationNorm:
    """Size of what a channel carries, alone or times its share of the out-projection's weights: 2SSP and CFSP.

    With W [O,C] the out-projection and x its input, channel j scores a_j (weights=none) or a_j sum_i r_ij (relative)
        average=windows  a_j = mean_w sqrt(sum_t x_wtj^2)     average=tokens  a_j = sqrt(mean_t x_tj^2)
        r_ij = |W_ij| / sum_k |W_ik|
    and heads add up their channels.

    2SSP (Sandri et al., 2025; released code): windows, none, of FFN channels.
    CFSP (Wang et al., COLING 2025): tokens. Its eq. 8, as others quote it (the paper itself could not be read), is
    relative: |W_down,ij| a_j / (||W_down,i*||_1 ||a||_1) summed over i, plus the like of W_up and W_gate, each over the
    channel's own weights, which is 1 for every channel. The released code divides each |W_ij| a_j, too, by its own
    channel's sum, so that all three terms are 1 and a factor a_j is all that is left: weights=none. Which of them is
    better was measured: tests/benchmarks/README.md.
    """

    average: Literal["windows", "tokens"]
    weights: Literal["none", "relative"]
    sequential: Sequential

    @property
    def evidence(self) -> type[Moments] | type[WindowNorms]:
        return WindowNorms if self.average == "windows" else Moments

    def __call__(self, block: Block, evidence: Mapping[str, Moments | WindowNorms]) -> dict[str, Score]:
        return {s.name: self._score(s, block.weights[s.name], evidence[s.name]) for s in block.sites}

    def _score(self, site: Site, weights: SiteWeights, seen: Moments | WindowNorms) -> ColumnScores:
        size_C = seen.mean_square_C.sqrt() if isinstance(seen, Moments) else seen.mean_C
        if self.weights == "relative":
            size_C = size_C.to(weights.out_projection.device) * relative_C(weights.out_projection)
        return of_columns(site, size_C)


_FLAP: dict[str, Callable[[Tensor, Moments], Tensor]] = {
    "WIFV": lambda weight_OC, moments: moments.variance_C * powers_C(weight_OC, 2),
    "IFV": lambda weight_OC, moments: moments.variance_C,
    "WIFN": lambda weight_OC, moments: wifn_C(weight_OC, moments.mean_square_C),
}

_FLAP_OFFICIAL: dict[str, Callable[[Tensor, RunningFluctuation], Tensor]] = {
    "WIFV": lambda weight_OC, seen: seen.fluctuation_C * weight_OC.square().sum(0),
    "IFV": lambda weight_OC, seen: seen.fluctuation_C,
    "WIFN": lambda weight_OC, seen: (weight_OC.abs() * seen.scaler_C.sqrt()).mean(0),
}

"""Weight times gradient times activation, the gradient from forward passes: MINI-LLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pruneexp.criterion.common import MEMBERS, with_settings
from pruneexp.evidence import DirectionalGradient, Gradient, InputMoments, Moments, Perturbation
from pruneexp.types import Block, Score, Site, SiteWeights


@dataclass(frozen=True)
class MiniLlm:
    """Feature-map sensitivity S = w g x of every weight (MINI-LLM, Cheng et al., 2024), from the paper, not from its
    authors' code; g is the loss gradient, estimated from forward passes (SPSA), x the activation that the weight meets.

    perturb=weights: element (i, j) of each of the unit's matrices gives |w_ij g_ij| a_j, added up over the unit's rows
    or columns, then reduced over the matrices by `members`.
    perturb=gates: one gate a unit scales what it hands to its out-projection; the unit scores |dL/dgate| a, with a over
    its channels. dL/dgate = sum w_ij g_ij over its out-projection columns: a signed sum with one estimate a unit, not a
    weight. On a small trained LLaMA, 32 directions of it scored worse than 32 directions of weights. bfloat16 wants an
    epsilon of 0.01 there: rounding hides a smaller one, which is refused.
    tokens: l2, a_j = sqrt(mean_t x_tj^2) as Wanda has it; mean, a_j = |mean_t x_tj|. The paper's reductions over tokens
    and matrices are not known; neither are epsilon and the number of directions.

    With one direction, and weights perturbed, g = slope * z: the slope is common to all weights, and the ranking is
    that of |w| |z| a, whatever the loss. gradient=exact takes backward passes instead, for comparison; the settings
    from `directions` on then say nothing.
    """

    gradient: Literal["spsa", "exact"]
    perturb: Literal["weights", "gates"]
    tokens: Literal["l2", "mean"]
    members: Literal["sum", "max", "mean"]
    directions: int
    epsilon: float
    distribution: Literal["gaussian", "rademacher"]
    estimate: Literal["multiply", "divide"]
    windows: int | None
    seed: int

    def __post_init__(self) -> None:
        with_settings(Perturbation, self)  # raises ConfigError for settings that cannot be

    @property
    def evidence(self) -> tuple[Any, ...]:
        gradient = Gradient if self.gradient == "exact" else with_settings(Perturbation, self)
        return (Moments, gradient) if self.perturb == "gates" else (Moments, gradient, InputMoments)

    def __call__(self, block: Block, evidence: Mapping[str, tuple[Any, ...]]) -> dict[str, Score]:
        score = self._of_gates if self.perturb == "gates" else self._of_weights
        return {site.name: score(site, block.weights[site.name], *evidence[site.name]) for site in block.sites}

    def _of_weights(
        self,
        site: Site,
        weights: SiteWeights,
        moments: Moments,
        gradient: Gradient | DirectionalGradient,
        inputs: InputMoments,
    ) -> Tensor:
        g, size_D, size_C = gradient.mean, self._size(inputs), self._size(moments)
        parts_U = []
        for role, w_URD in weights.in_projections.items():
            sensitivity_URD = (w_URD.to(g.in_projections[role]) * g.in_projections[role]).abs()
            parts_U.append(sensitivity_URD.sum(1, dtype=torch.float64) @ size_D.to(w_URD.device))
        columns_C = (weights.out_projection.to(g.out_projection) * g.out_projection).abs().sum(0, dtype=torch.float64)
        parts_U.append((columns_C * size_C.to(columns_C.device)).reshape(site.units, -1).sum(1))
        return MEMBERS[self.members](torch.stack(parts_U))

    def _of_gates(
        self, site: Site, weights: SiteWeights, moments: Moments, gradient: Gradient | DirectionalGradient
    ) -> Tensor:
        if isinstance(gradient, Gradient):
            g = gradient.mean.out_projection
            gates_U = (weights.out_projection.to(g) * g).sum(0, dtype=torch.float64).reshape(site.units, -1).sum(1)
        else:
            gates_U = gradient.gates_U.double()
        size_UW = self._size(moments).to(gates_U.device).reshape(site.units, -1)
        size_U = size_UW.square().mean(1).sqrt() if self.tokens == "l2" else size_UW.mean(1)
        return gates_U.abs() * size_U

    def _size(self, moments: Moments) -> Tensor:
        return moments.mean_square_C.sqrt() if self.tokens == "l2" else moments.mean_C.abs()

"""What the loss changes when a unit leaves and the survivors are tuned anew, by influence functions: IFSO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pruneexp.criterion.common import with_settings
from pruneexp.evidence import BatchDerivatives, GateDerivatives, Influence
from pruneexp.types import Block, Score


@dataclass(frozen=True)
class Ifso:
    """Influence function based second-order pruning (Cheng et al., TPAMI 2024; released code, commit 945a019), made for
    convolutional networks that are pruned while they train.

    Every unit has a gate m, at 1, on what it hands to its out-projection. With L*(m) = min_w L(m, w) and w at its
    minimum, a unit c that leaves changes the loss, to second order, by

        dL*_c = -dL/dm_c + [H_mm - Q]_cc / 2,    Q = H_mw (H_ww + lambda I)^-1 H_wm,   H the second derivatives of L

    score=retraining: mean over `batches` parts of the windows of |q_c|, q the row sums of Q (directions=together) or
    its diagonal (apart). The code's is together, with w all weights, finite differences (`step` = 1e-2), H_ww ~ 0 and
    lambda = 1e-4, the optimizer's weight decay (inverse=damping): four gradients for all units at once.
    score=loss: dL*_c, mean over the parts. Apart, w is the survivors' weights alone, and for a linear out-projection
    under a squared loss the score is the exact cost of removal, `Obs`'s; a conjugate gradient a unit, for small models
    or few windows. Together, q stands for the diagonal of Q and the empirical Fisher matrix's for that of H_mm.
    scale: scores over the root of what the unit costs in parameters or multiply-accumulates (the code's: over the root
    of activations or operations saved).

    Departs: one shot, on a model that is not trained on (the code takes the smallest channel every 10 training steps);
    w is the units' own matrices, or the out-projections; lambda is of no account to the ranking with inverse=damping.
    Passes and memory: `calibrate.influence_evidence`.
    """

    score: Literal["retraining", "loss"]
    directions: Literal["together", "apart"]
    weights: Literal["coupled", "readers"]
    hessian: Literal["finite_difference", "exact"]
    step: float
    inverse: Literal["damping", "conjugate_gradient"]
    damping: float
    steps: int
    windows: int | None
    batches: int
    scale: Literal["none", "params", "macs"]

    def __post_init__(self) -> None:
        _ = self.evidence  # raises ConfigError for settings that cannot be

    @property
    def evidence(self) -> Influence:
        return with_settings(Influence, self)

    def __call__(self, block: Block, evidence: Mapping[str, GateDerivatives]) -> dict[str, Score]:
        scores: dict[str, Score] = {}
        for site in block.sites:
            score_U = torch.stack([self._score_U(part) for part in evidence[site.name].batches]).mean(0)
            saved = {"none": 1, "params": site.cost.params, "macs": site.cost.macs}[self.scale]
            scores[site.name] = score_U / saved**0.5
        return scores

    def _score_U(self, part: BatchDerivatives) -> Tensor:
        if self.score == "retraining":
            return part.retraining_U.abs()
        return (part.curvature_U - part.retraining_U) / 2 - part.slope_U

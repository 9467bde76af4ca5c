"""What the loss would change were a unit's weights zero, by its Taylor series: LLM-Pruner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pruneexp.criterion.common import MEMBERS
from pruneexp.evidence import Gradient, PerSampleGradient
from pruneexp.types import Block, Score, SiteWeights


@dataclass(frozen=True)
class Taylor:
    """LLM-Pruner's importance (Ma et al., NeurIPS 2023; formulas of the released code, commit 128a07d).

    With weights w, g their gradient of the mean loss over all windows, and A the mean over windows of each window's
    squared gradient, every row of an in-projection and every column of the out-projection scores, summed over its
    elements:
        vectorize     |sum w g|            (the paper's Vector)
        param_first   sum |w g|            (Element^1)
        param_second  sum |w A w|          (Element^2)
        param_mix     sum |w g - w A w / 2|
    Coupled rows and columns are reduced by `members` over the matrices, then added up over the unit: sum, mean, max or
    prod of them, or the first or second alone. The first is the one that the code grows the group from: query (key
    where queries are grouped), gate (up without one); the second the next of query, key, value, out-projection or of
    gate, up, out-projection, where the code's is the next of its trace through the model. Biases are not counted.
    With grouped queries a KV group's query rows and out-projection columns are folded onto its key and value rows;
    query head h belongs to group h // G (as attention pairs them), not to h mod K, to which the released code's fold
    leads.
    """

    sequential: ClassVar[bool] = False

    element: Literal["vectorize", "param_first", "param_second", "param_mix"]
    members: Literal["sum", "mean", "max", "prod", "first", "second"]

    @property
    def evidence(self) -> type[Gradient] | type[PerSampleGradient]:
        return PerSampleGradient if self.element in ("param_second", "param_mix") else Gradient

    def __call__(self, block: Block, evidence: Mapping[str, Gradient | PerSampleGradient]) -> dict[str, Score]:
        return {site.name: self._score_U(block.weights[site.name], evidence[site.name]) for site in block.sites}

    def _score_U(self, weights: SiteWeights, seen: Gradient | PerSampleGradient) -> Tensor:
        gradient = seen.mean
        second = seen.mean_square if isinstance(seen, PerSampleGradient) else None
        units = len(next(iter(weights.in_projections.values())))
        parts_UR = []
        for role, w_URD in weights.in_projections.items():
            parts_UR.append(
                self._rows(
                    w_URD, gradient.in_projections[role], None if second is None else second.in_projections[role]
                )
            )
        columns_C = self._rows(
            weights.out_projection.T, gradient.out_projection.T, None if second is None else second.out_projection.T
        )
        parts_UR.append(columns_C.reshape(units, -1))
        parts_UR.sort(key=lambda part: part.shape[1])  # stable: a group's key stands before its many query rows
        shortest = parts_UR[0].shape[1]
        folded = torch.stack([part.reshape(units, -1, shortest).sum(1) for part in parts_UR])
        return MEMBERS[self.members](folded).sum(1)

    def _rows(self, w: Tensor, g: Tensor, a: Tensor | None) -> Tensor:
        """Scores of all rows: the last dimension is summed over, in float64."""
        w = w.to(g.dtype)
        if self.element == "vectorize":
            return (w * g).sum(-1, dtype=torch.float64).abs()
        if self.element == "param_first":
            return (w * g).abs().sum(-1, dtype=torch.float64)
        assert a is not None
        if self.element == "param_second":
            return (w * a * w).abs().sum(-1, dtype=torch.float64)
        return (w * g - 0.5 * w * a * w).abs().sum(-1, dtype=torch.float64)

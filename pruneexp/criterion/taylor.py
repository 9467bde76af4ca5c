"""What the loss would change were a unit's weights zero, by its Taylor series: LLM-Pruner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pruneexp.criterion.common import MEMBERS
from pruneexp.evidence import Gradient, PerSampleGradient
from pruneexp.types import Block, Score, Site, SiteWeights


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
    where queries are grouped), gate (up without one). Biases are not counted.
    With grouped queries a KV group's query rows and out-projection columns are folded onto its key and value rows.

    `coupling`: what goes together. attention: query head h of G in each of K groups with group h // G, as attention
    pairs them; the second matrix is the next of query, key, value, out-projection (of key, value, query where queries
    are grouped). released, two quirks of that code: its fold adds query head h to group h mod K, so that other groups'
    query heads are in a group's score, though its own leave with it; and the second matrix of its trace through
    attention is the out-projection. FFNs, and sums over as many heads as groups, are the same in both. With
    search=llm_pruner_official, that code's units leave, to the last one, of SmolLM2-135M and two models without groups.
    """

    element: Literal["vectorize", "param_first", "param_second", "param_mix"]
    members: Literal["sum", "mean", "max", "prod", "first", "second"]
    coupling: Literal["attention", "released"]

    @property
    def evidence(self) -> type[Gradient] | type[PerSampleGradient]:
        return PerSampleGradient if self.element in ("param_second", "param_mix") else Gradient

    def __call__(self, block: Block, evidence: Mapping[str, Gradient | PerSampleGradient]) -> dict[str, Score]:
        return {s.name: self._score_U(s, block.weights[s.name], evidence[s.name]) for s in block.sites}

    def _score_U(self, site: Site, weights: SiteWeights, seen: Gradient | PerSampleGradient) -> Tensor:
        moments = (seen.mean, seen.mean_square) if isinstance(seen, PerSampleGradient) else (seen.mean,)
        parts_UR = [
            self._rows(w_URD, *(each.in_projections[role] for each in moments))
            for role, w_URD in weights.in_projections.items()
        ]
        columns_C = self._rows(weights.out_projection.T, *(each.out_projection.T for each in moments))
        columns_UR = columns_C.reshape(site.units, -1)
        parts_UR.sort(key=lambda part: part.shape[1])  # stable: a group's key stands before its many query rows
        shortest = parts_UR[0].shape[1]
        if self.coupling == "released" and site.kind == "attention":
            parts_UR.insert(1, columns_UR)
            folded = [part.reshape(-1, site.units, shortest).sum(0) for part in parts_UR]
        else:
            parts_UR.append(columns_UR)
            folded = [part.reshape(site.units, -1, shortest).sum(1) for part in parts_UR]
        return MEMBERS[self.members](torch.stack(folded)).sum(1)

    def _rows(self, w: Tensor, g: Tensor, a: Tensor | None = None) -> Tensor:
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

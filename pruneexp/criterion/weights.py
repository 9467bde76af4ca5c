"""Importance without data: chance, and the size of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pruneexp.criterion.common import of_columns, powers_C
from pruneexp.types import Block, ColumnScores, Score, Site, SiteWeights


@dataclass(frozen=True)
class Random:
    """Uniform draws from [0, 1): the floor that every criterion has to beat.

    A site's draws depend on `seed` and the site's name alone, not on which other sites there are.
    """

    evidence: ClassVar[None] = None
    judges: ClassVar[tuple[str, ...]] = ("attention", "mlp", "sublayer", "block")

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

    members=reader: the sum over the unit's channels j of (sum_i |W_ij|^p)^(1/p), with W [O,C] the out-projection and
    p = `norm`. p = 2 is FLAP's baseline mag_sp (released code, commit 3bb57db).
    members=coupled: the mean over the site's matrices of sum |w|^p, without a root, over the unit's rows
    (in-projections) or columns (out-projection): the L1 and L2 baselines of LLM-Pruner (Ma et al., NeurIPS 2023).
    Biases are not counted.

    It may be worse than random. In small trained models the norms of FFN channels differ by 6 to 9 %, the activations
    that they carry by 20 to 50 %, and the latter decide. The product of the in-projection's and the out-projection's
    norms does no better.
    """

    evidence: ClassVar[None] = None

    members: Literal["reader", "coupled"]
    norm: Literal[1, 2]

    def __call__(self, block: Block, evidence: Mapping[str, object]) -> dict[str, Score]:
        score = {"reader": self._of_out_projection, "coupled": self._coupled}[self.members]
        return {site.name: score(site, block.weights[site.name]) for site in block.sites}

    def _of_out_projection(self, site: Site, weights: SiteWeights) -> ColumnScores:
        return of_columns(site, powers_C(weights.out_projection, self.norm) ** (1 / self.norm))

    def _coupled(self, site: Site, weights: SiteWeights) -> Tensor:
        rows = [powers_C(w_URD.reshape(site.units, -1).T, self.norm) for w_URD in weights.in_projections.values()]
        columns_U = powers_C(weights.out_projection, self.norm).reshape(site.units, -1).sum(1)
        return torch.stack([*rows, columns_U]).mean(0)

"""The evolutionary search rehearsed on losses that say nothing: which readers it would have fitted anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pruneexp.search import Evolutionary
from pruneexp.search.evolutionary import Evolution
from pruneexp.search.levels import Levels, Structures
from pruneexp.types import Budget, Site


def refits(
    search: Evolutionary, sites: Sequence[Site], budget: Budget, batches: int, held: int
) -> list[tuple[Site, int]]:
    """About the readers that a search by removal paths asks for: site and units removed, each as often as it is fitted.
    `batches`: of calibration windows; `held`: fitted readers that a path keeps for a site, the last ones."""
    scores = {site.name: torch.arange(site.units, dtype=torch.float64) for site in sites}
    structures = search.structures(scores, sites, budget)
    rehearsal = _Rehearsal(structures, batches, held)
    evolution = Evolution(search, structures, rehearsal, torch.Generator().manual_seed(0), rehearsal.candidate)
    evolution.evolved(evolution.descended(evolution.start()))
    return rehearsal.fitted


class _Rehearsal:
    """Stands for removal paths and for the oracle: notes what would be fitted, and counts passes as probes do."""

    def __init__(self, structures: Structures, batches: int, held: int):
        self.structures, self.batches, self.held = structures, batches, held
        self.passes = 0.0
        self.fitted: list[tuple[Site, int]] = []
        self.kept: dict[str, dict[int, None]] = {site.name: {} for site in structures.chosen}
        self.rng = torch.Generator().manual_seed(0)

    def candidate(self, levels: Levels) -> Levels:
        units = self.structures.units(levels)
        for site in self.structures.chosen:
            removed, kept = units[site.name], self.kept[site.name]
            if removed and removed not in kept:
                self.fitted.append((site, removed))
                kept[removed] = None
                if len(kept) > self.held:
                    kept.pop(next(iter(kept)))
        return levels

    def losses(self, candidates: Sequence[Any], batch: int | None = None) -> Tensor:
        """Of levels, not of structures. Those that begin alike share the layers that they have in common."""
        alike = [0] * len(candidates)
        layers = sorted({site.layer for site in self.structures.chosen})
        for layer in layers:
            names = [site.name for site in self.structures.chosen if site.layer == layer]
            groups: dict[tuple[int, ...], int] = {}
            for number, levels in enumerate(candidates):
                key = (alike[number], *(levels[name] for name in names))
                alike[number] = groups.setdefault(key, len(groups))
            self.passes += len(groups) / len(layers) / (1 if batch is None else self.batches)
        return torch.rand(len(candidates), generator=self.rng, dtype=torch.float64)

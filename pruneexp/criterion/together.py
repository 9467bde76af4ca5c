"""A criterion beside others, whose scores a search starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pruneexp.types import Block, Criterion, Score, Scores, Sequential, Site, evidence_kinds, own_scores, start_name


@dataclass(frozen=True)
class Together:
    """A criterion and `starts`, others by name, whose evidence comes from the same pass. It stands in the place of
    `criterion`; scores of a start have its name in front: "flap:model.layers.0.mlp"."""

    criterion: Criterion
    starts: Mapping[str, Criterion]

    @property
    def all(self) -> tuple[Criterion, ...]:
        return (self.criterion, *self.starts.values())

    @property
    def evidence(self) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(kind for each in self.all for kind in evidence_kinds(each.evidence)))

    @property
    def sequential(self) -> Sequential:
        return self.criterion.sequential

    @property
    def few_tokens(self) -> bool:
        return all(each.few_tokens or not any(k.fits for k in evidence_kinds(each.evidence)) for each in self.all)

    @property
    def judges(self) -> Any:
        return self.criterion.judges

    def lost(self, scores: Scores, /) -> int:
        return self.criterion.lost(own_scores(scores))

    def working_bytes(self, site: Site, outputs: int, /) -> int:
        """One works after the other."""
        return max(each.working_bytes(site, outputs) for each in self.all)

    def kept_bytes(self, sites: Sequence[Site], outputs: int, itemsize: int, refits: float, /) -> tuple[int, int]:
        kept = [each.kept_bytes(sites, outputs, itemsize, refits) for each in self.all]
        return sum(held for held, _ in kept), sum(files for _, files in kept)

    def __call__(self, block: Block, evidence: Mapping[str, Any]) -> dict[str, Score]:
        scores = dict(self._of(self.criterion, block, evidence))
        for name, each in self.starts.items():
            scores |= {start_name(name, site): score for site, score in self._of(each, block, evidence).items()}
        return scores

    def _of(self, criterion: Criterion, block: Block, evidence: Mapping[str, Any]) -> Scores:
        places = [self.evidence.index(kind) for kind in evidence_kinds(criterion.evidence)]
        several = isinstance(criterion.evidence, tuple)
        own = {site: tuple(seen[place] for place in places) for site, seen in evidence.items()}
        return criterion(block, own if several else {site: seen[0] for site, seen in own.items() if seen})


def each_of(criterion: Criterion) -> tuple[Criterion, ...]:
    """A criterion, and the starts that it is together with."""
    return criterion.all if isinstance(criterion, Together) else (criterion,)

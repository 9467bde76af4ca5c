"""What is pruned with: a choice of methods, one round's parts, and which way the walk goes for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from pruneexp.model import Model
from pruneexp.pruning.record import Record
from pruneexp.search import KIND, scored_as
from pruneexp.types import (
    ALWAYS,
    QUERY_HEADS,
    Compensator,
    Criterion,
    Plan,
    Score,
    Search,
    Site,
    Sparsity,
    collected_by,
    evidence_kinds,
    filled,
)
from pruneexp.types.defaults import COMPENSATOR, CRITERION, SEARCH, SPARSITY


@dataclass(frozen=True)
class Method:
    """What decides which units leave, and what makes up for them."""

    criterion: Criterion
    sparsity: Sparsity
    search: Search
    compensator: Compensator

    def __post_init__(self) -> None:
        filled(self.criterion, CRITERION)
        filled(self.search, SEARCH)
        filled(self.sparsity, SPARSITY)
        filled(self.compensator, COMPENSATOR)
        evidence_kinds(self.criterion.evidence)
        evidence_kinds(self.compensator.evidence)


@dataclass(frozen=True)
class Pruned:
    """What pruning decided, and on what grounds."""

    plan: Plan
    scores: Mapping[str, Score]
    sites: tuple[Site, ...]  # of the model before
    counted: int  # what the ratio is a share of, in the model before
    chosen: Mapping[str, Mapping[str, float]]  # what compensation chose for a site by itself, by site name


@dataclass
class Pruning:
    """One round of pruning: the parts it needs at every step."""

    model: Model
    tokens_NT: Tensor | None
    method: Method
    ratio: float
    record: Record
    scores: dict[str, Score] = field(default_factory=dict)
    chosen: dict[str, Mapping[str, float]] = field(default_factory=dict)  # by compensation, by site name
    given: dict[str, tuple[Tensor, Tensor | None]] | None = None  # out-projections of compensation, where they are kept


def goes_layer_by_layer(method: Method) -> bool:
    """Whether each layer is scored and decided on what the pruned layers before it produce."""
    return method.search.local and method.criterion.sequential and method.criterion.evidence is not None


def scores_behind_masks(method: Method) -> bool:
    """Whether a search over all layers goes by scores behind layers masked one after the other."""
    return not method.search.local and method.criterion.sequential == ALWAYS and method.criterion.evidence is not None


def shown_to(method: Method) -> tuple[str, ...]:
    """What the criterion judges beside units: kinds of sites as wholes (sublayers, layers) in their place, or query
    heads."""
    granularity = method.search.granularity
    judges = method.criterion.judges
    if scored_as(granularity, judges) == "wholes":
        return tuple(KIND[name] for name in granularity)
    return (QUERY_HEADS,) if QUERY_HEADS in granularity else ()


def walks_by_sites(compensator: Compensator) -> bool:
    """Whether its statistics are those of a walk sublayer by sublayer."""
    return bool(collected_by("site_walk", evidence_kinds(compensator.evidence)))


def by_site(compensator: Compensator) -> bool:
    """Whether each sublayer is compensated on what the pruned sublayers before it produce."""
    return compensator.sequential and walks_by_sites(compensator)

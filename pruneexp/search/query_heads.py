"""Query heads leave in turns: a turn takes one of every KV group of a layer, from each group its own weakest.

To a search, a turn is a unit like others: a layer of G groups of q query heads has a site of q units, each of which
takes G query heads. The criterion scores each of the H = G q heads; a turn's score is that of the heads that it takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pruneexp.search.removable import losses_in_order, unit_order
from pruneexp.types import (
    QUERY_HEADS,
    Candidate,
    ColumnScores,
    Cost,
    Oracle,
    Plan,
    RemovalPath,
    Reorderable,
    Score,
    Scores,
    Site,
    SitePlan,
    unit_scores,
)


def in_turns(site: Site) -> Site | None:
    """The turns of an attention site, one of which stays; None where groups hold a single query head."""
    if site.kind != "attention" or site.head_cost is None:
        return None
    cost = Cost(**{each.name: site.units * getattr(site.head_cost, each.name) for each in fields(Cost)})
    width = site.units * (site.width // site.group)
    return Site(f"{site.name}.{QUERY_HEADS}", QUERY_HEADS, site.layer, site.group, width, cost, least=1)


class Turns:
    """The turns of all attention sites whose query heads have scores, [H] each: which heads leave in which turn."""

    def __init__(self, sites: Sequence[Site], scores: Scores):
        self.scores, self.sites, self.heads = scores, {}, {}
        for site in sites:
            own = in_turns(site)
            if own is not None and own.name in scores:
                self.sites[own.name] = site
                self.heads[own.name] = _heads_by_turn(scores[own.name], site)  # [q, G], the weakest first

    def scored(self) -> dict[str, Score]:
        """All scores, those of query heads by turn. Those of a search's starts go by the criterion's turns, too."""
        return {name: self._by_turn(name.rpartition(":")[2], score) for name, score in self.scores.items()}

    def _by_turn(self, name: str, score: Score) -> Score:
        """Sums over the heads of a turn; of a removal path, of what each adds to the cost."""
        if name not in self.heads:
            return score
        heads, site = self.heads[name], self.sites[name]
        if isinstance(score, ColumnScores):
            size = site.width // site.group
            columns_C = score.columns_C.reshape(-1, size)[heads.flatten().to(score.columns_C.device)].flatten()
            return ColumnScores(unit_scores(score).cpu()[heads].sum(1), columns_C)
        if not isinstance(score, RemovalPath):
            return unit_scores(score).cpu()[heads].sum(1)
        lost_H = torch.empty(heads.numel(), dtype=torch.float64)
        lost_H[unit_order(score, heads.numel())] = losses_in_order(score, heads.numel())
        refits = score.out_projections
        by_turn = _RefitsByTurn(refits, heads) if isinstance(refits, Reorderable) else {}
        return RemovalPath(torch.arange(len(heads)), lost_H[heads].sum(1).cumsum(0), by_turn)

    def resolved(self, plan: Plan) -> Plan:
        """The plan with query heads in the place of turns."""
        sites = {}
        for name, own in plan.sites.items():
            site = self.sites.get(name)
            if site is None:
                sites[name] = own
            else:
                sites[site.name] = _without(site, self.heads[name][list(own.kept)])
        return Plan(sites, plan.budget)

    def oracle(self, oracle: Oracle) -> Oracle:
        """The same, asked of structures in turns."""
        return _InTurns(oracle, self)


def _heads_by_turn(score: Score, site: Site) -> Tensor:
    heads = site.units * site.group
    place_GQ = unit_order(score, heads).argsort().view(site.units, site.group)
    return (place_GQ.argsort(1) + torch.arange(site.units)[:, None] * site.group).T.contiguous()


def _without(site: Site, kept: Tensor) -> SitePlan:
    """The attention site's plan, of heads by turn that stay."""
    units = tuple(range(site.units))
    if len(kept) == site.group:
        return SitePlan(site.kind, site.units, units)
    heads = tuple(sorted(kept.flatten().tolist()))
    return SitePlan(site.kind, site.units, units, site.units * site.group, heads)


@dataclass(frozen=True)
class _InTurns:
    """An oracle that translates what it is asked."""

    of: Oracle
    turns: Turns

    @property
    def passes(self) -> float:
        return self.of.passes

    @property
    def batches(self) -> int:
        return self.of.batches

    def losses(self, candidates: Sequence[Candidate], batch: int | None = None) -> Tensor:
        named = {name: site.name for name, site in self.turns.sites.items()}
        resolved = [
            replace(
                candidate,
                plan=self.turns.resolved(candidate.plan),
                out_projections={named.get(name, name): own for name, own in candidate.out_projections.items()},
            )
            for candidate in candidates
        ]
        return self.of.losses(resolved, batch)

    def trial(self, plan: Plan, share: float) -> Candidate:
        named = {site.name: name for name, site in self.turns.sites.items()}
        out_projections = self.of.trial(self.turns.resolved(plan), share).out_projections
        return Candidate(plan, {named.get(name, name): own for name, own in out_projections.items()})


class _RefitsByTurn(Mapping[int, tuple[Tensor, "Tensor | None"]]):
    """Out-projections fitted anew once the first 1, 2, ... turns have left."""

    def __init__(self, refits: Reorderable, heads: Tensor):
        self.refits, self.heads = refits, heads  # [q, G]
        self.by_head = refits.in_order(heads.flatten())

    def in_order(self, order_U: Tensor) -> _RefitsByTurn:
        return _RefitsByTurn(self.refits, self.heads[order_U.to(self.heads.device)])

    def __getitem__(self, turns: int) -> tuple[Tensor, Tensor | None]:
        if turns not in self:
            raise KeyError(turns)
        return self.by_head[turns * self.heads.shape[1]]

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, len(self)))

    def __len__(self) -> int:
        return len(self.heads)

    def __contains__(self, turns: object) -> bool:
        return isinstance(turns, int) and 0 <= turns < len(self.heads)

"""The evolutionary search under way: where to start, sensitivities, evolution."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pruneexp.search.choice import distinct, least
from pruneexp.search.judging import Judge, Tried
from pruneexp.search.levels import Levels, Structures, parabola
from pruneexp.search.mutation import mutated
from pruneexp.search.starts import (
    AL_AM,
    HEAD_SHARES,
    RAMPS,
    begun_with,
    by_score_over_cost,
    cheapest,
    same_share,
    standardised_share,
)
from pruneexp.types import Candidate, Plan, RemovalPath, Scores, start_name

log = logging.getLogger("pruneexp")

_SENSITIVITIES = 0.7  # of the effort: what two rounds of sensitivities may cost at most, on fewer tokens if need be
_STARTS = 0.6  # of the effort: what choosing where to start, and the orders, may each cost at most
_STEPS = 4  # structures that a round of sensitivities proposes, the one it began with among them


@dataclass
class Evolution:
    """One search under way. `structures`: with the order of units in each site that is the best so far."""

    method: Any  # an `Evolutionary`, which says what each setting means
    structures: Structures
    judge: Judge
    began: str = ""  # the start's name
    tried: Tried | None = None  # where it begins, compensated

    def decide(self) -> Plan:
        """The structure found, or the one it began with where that is as good. Both are judged as the run will
        compensate them: fits at other sites make up for much that a probe's fits do not."""
        levels, share = self.start(), self.method.tokens
        if self.tried is not None and not self.judge.trials:
            return self.tried[0]  # nothing is left to try what would be found
        plan = self.structures.plan(self.evolve(self.descend(levels)))
        began = self.tried[0] if self.tried is not None else begun_with(self.structures.plan(levels), self.began)
        if plan.sites == began.sites:
            return began
        if not self.judge.trials:
            return plan
        if self.tried is None:
            self.tried = self.judge.try_compensated({"where it began": began}, self.judge.draw(share))[0]
        _, batches, loss = self.tried
        both = torch.cat([loss, self.judge.try_compensated({"found": plan}, batches)[0][2]], 1)
        return (began, plan)[least(both)]

    def losses(self, population: Iterable[Levels], batches: Sequence[int]) -> Tensor:
        """Loss of each on each of the batches: float64 [batches, len(population)]."""
        return self.judge.measure([self.structures.candidate(levels) for levels in population], batches)

    # ---- 1: where to start

    def start(self) -> Levels:
        structures, method = self.structures, self.method
        starts = [same_share(structures, share) for share in HEAD_SHARES]
        scores = [structures.scores[site.name] for site in structures.chosen]
        if all(isinstance(path, RemovalPath) for path in scores):
            starts.append(cheapest(structures))
        if structures.composites:
            starts.append(by_score_over_cost(structures, method))
        others = {start: own for start in method.starts if (own := self._scores_of(start))}
        if others:
            return self._among_criteria(starts, others)
        last, starts = starts[-1], distinct(starts)
        if self.judge.left < self.judge.price(len(starts), method.tokens):
            return last
        return starts[int(self.losses(starts, self.judge.draw(method.tokens)).mean(0).argmin())]

    def _among_criteria(self, shares: list[Levels], others: Mapping[str, Scores]) -> Levels:
        """The best of the levels so far and of those that other criteria give, then the best order of units."""
        structures = self.structures
        criteria: dict[str, Scores] = {"criterion": {s.name: structures.scores[s.name] for s in structures.chosen}}
        criteria |= others
        starts = {f"shares {number}": levels for number, levels in enumerate(shares)}
        starts |= {f"ramp {ramp:+g}": same_share(structures, 1.0, ramp) for ramp in RAMPS}
        if not structures.composites:
            starts |= {f"{AL_AM}{name}": standardised_share(structures, own) for name, own in criteria.items()}
        orders = {name: structures.ordered(own) if name in others else structures for name, own in criteria.items()}
        share = self.judge.affordable(len(starts), _STARTS) or self.judge.affordable(len(starts), 1.0)
        if share is None:
            first = f"{AL_AM}{next(iter(others))}"
            chosen = first if first in starts else f"shares {len(shares) - 1}"
        else:
            ranking = self._ranked({name: partial(structures.candidate, own) for name, own in starts.items()}, share)
            chosen = self._best_compensated(ranking, starts, orders)
        levels, own, self.began = starts[chosen], chosen.removeprefix(AL_AM), chosen
        if own in orders:  # it stays with the order that its levels are made for, unless another is clearly better
            self.structures, orders = orders[own], {own: orders.pop(own), **orders}
        if share is None or (self.tried is not None and not self.judge.trials):
            return levels
        if self.judge.left >= self.judge.price(len(orders), share):
            candidates = {name: partial(each.candidate, levels) for name, each in orders.items()}
            self.structures = orders[self._ranked(candidates, share)[0]]
        self._order_each(list(criteria.values()), levels)
        return levels

    def _best_compensated(
        self, ranking: Sequence[str], starts: Mapping[str, Levels], orders: Mapping[str, Structures]
    ) -> str:
        """The best once compensated, of the first and of what AL-AM removes by each criterion. As many are tried as
        there are trials, none twice; of more than two, one is left for what the search finds."""
        plans: dict[str, Plan] = {}
        for name in [ranking[0], *(name for name in ranking[1:] if name.startswith(AL_AM))]:
            plan = orders.get(name.removeprefix(AL_AM), self.structures).plan(starts[name])
            if all(plan.sites != known.sites for known in plans.values()):
                plans[name] = begun_with(plan, name)
        names = list(plans)[: self.method.trials - (self.method.trials > 2)]
        if len(names) < 2:
            return ranking[0]
        tried = self.judge.try_compensated({name: plans[name] for name in names}, self.judge.draw(self.method.tokens))
        best = least(torch.cat([loss for _, _, loss in tried], 1))
        self.tried = tried[best]
        return names[best]

    def _ranked(self, candidates: Mapping[str, Callable[[], Candidate]], share: float) -> list[str]:
        """The names of the structures, that of least loss first."""
        losses = self.judge.in_parts(list(candidates.values()), self.judge.draw(share))
        named = dict(zip(candidates, losses.mean(0).tolist(), strict=True))
        names = sorted(named, key=named.__getitem__)
        log.info("search: %s", ", ".join(f"{name} {named[name]:.4f}" for name in names))
        best = list(candidates)[least(losses)]
        return [best, *(name for name in names if name != best)]

    def _scores_of(self, start: str) -> Scores:
        named = {site.name: start_name(start, site.name) for site in self.structures.chosen}
        return {site: self.structures.scores[name] for site, name in named.items() if name in self.structures.scores}

    def _order_each(self, orders: Sequence[Scores], levels: Levels) -> None:
        """Gives each site the order of units by which its loss is lowest, where all these orders together are better,
        too."""
        there = self.structures
        now = there.plan(levels).sites
        owns = [{name: scores[name]} for name, level in levels.items() if level for scores in orders if name in scores]
        tried = [(own, there.ordered(own)) for own in owns]
        tried = [each for each in tried if each[1].plan(levels).sites != now]
        spare = self.judge.left / self.method.effort - _SENSITIVITIES  # these come first
        share = self.judge.affordable(len(tried) + 1, min(_STARTS / 2, spare)) if tried else None
        if share is None:
            return
        candidates = [there.candidate(levels), *(structures.candidate(levels) for _, structures in tried)]
        losses = self.judge.measure(candidates, self.judge.draw(share)).mean(0)
        best: dict[str, tuple[float, Scores]] = {}
        for (own, _), loss in zip(tried, (losses[1:] - losses[0]).tolist(), strict=True):
            for name in own:
                best[name] = min(best.get(name, (0.0, {})), (loss, own), key=lambda pair: pair[0])
        mixed = there.ordered({name: score for _, own in best.values() for name, score in own.items()})
        share = max(share, min(self.method.tokens, self.judge.left / 4))
        judged = self.judge.measure([there.candidate(levels), mixed.candidate(levels)], self.judge.draw(share))
        self.structures = (there, mixed)[least(judged)]
        before, after = judged.mean(0).tolist()
        own = sum(loss < 0 for loss, _ in best.values())
        log.info("search: with orders of their own at %d sites %.4f, without %.4f", own, after, before)

    # ---- 2: sensitivities

    def descend(self, levels: Levels) -> Levels:
        distance = self.method.distance
        for _ in range(self.method.rounds):
            around = self._around(levels, distance)
            structures = 1 + len(around) + _STEPS
            whole = 2 * structures * self.method.deciding
            share = min(self.method.tokens, _SENSITIVITIES * self.method.effort / whole)
            if self.judge.left < self.judge.price(structures, share):
                break
            step = self._step(levels, around, share)
            if step == levels:
                distance /= 2
            levels = step
        return levels

    def _around(self, levels: Levels, distance: float) -> list[tuple[str, int]]:
        """Every site's levels at a distance below and above, where they are possible."""
        around = []
        for site in self.structures.chosen:
            step = max(1, round(distance * self.structures.size[site.name]))
            most = self.structures.most[site.name]
            beside = {max(0, levels[site.name] - step), min(most, levels[site.name] + step)}
            around += [(site.name, level) for level in sorted(beside - {levels[site.name]})]
        return around

    def _step(self, levels: Levels, around: list[tuple[str, int]], share: float) -> Levels:
        population = [levels, *({**levels, name: level} for name, level in around)]
        losses = self.losses(population, self.judge.draw(share)).mean(0)
        if not losses[0].isfinite():
            return levels
        points: dict[str, dict[int, float]] = {name: {} for name in levels}
        for (name, level), loss in zip(around, losses[1:], strict=True):
            if loss.isfinite():
                points[name][level] = float(loss - losses[0])
        full = self._allotted(levels, points)
        half = {name: round((levels[name] + full[name]) / 2) for name in levels}
        heads = {site.name for site in self.structures.dear}
        spared = self._allotted(levels, {name: {} if name in heads else own for name, own in points.items()})
        steps = distinct([levels, full, self.structures.balanced(half), spared])
        share = max(share, min(self.method.tokens, self.judge.left / 4 / self.judge.price(len(steps), 1.0)))
        return steps[least(self.losses(steps, self.judge.draw(share)))]

    def _allotted(self, levels: Levels, points: dict[str, dict[int, float]]) -> Levels:
        curves = {}
        for name, own in points.items():
            base = levels[name]
            possible = range(min([base, *own]), max([base, *own]) + 1)
            curves[name] = (possible, parabola(base, own)) if own else ([base], lambda n: 0.0)
        return self.structures.allotted(curves)

    # ---- 3: evolution

    def evolve(self, parent: Levels) -> Levels:
        method, generation = self.method, 0
        first, finalists = method.tokens / 4, max(1, method.offspring // 4)
        price = self.judge.price(method.offspring, first) + self.judge.price(finalists + 1, method.tokens)
        while self.judge.left >= price and (method.steps is None or generation < method.steps):
            generation += 1
            children = distinct(
                [mutated(self.structures, parent, method.distance, self.judge.rng) for _ in range(method.offspring)]
            )
            made = [partial(self.structures.candidate, child) for child in children]
            losses = self.judge.in_parts(made, self.judge.draw(first)).mean(0)
            final = [parent, *(children[i] for i in losses.sort(stable=True).indices[:finalists].tolist())]
            parent = final[least(self.losses(final, self.judge.draw(method.tokens)))]
        return parent

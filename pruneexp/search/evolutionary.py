"""How many units leave each site, found by the calibration loss: sensitivities first, then evolution."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pruneexp.search.budgeted import Global
from pruneexp.search.common import prunable, require
from pruneexp.search.granularity import Granularity, check_settings, chosen_sites, is_plain
from pruneexp.search.levels import Levels, Structures, parabola
from pruneexp.search.removable import Removable, within_reach
from pruneexp.types import Budget, ConfigError, Oracle, Plan, RemovalPath, RunError, Scores, Site, require_least

log = logging.getLogger(__name__)

_SENSITIVITIES = 0.7  # of the effort: what two rounds of sensitivities may cost at most, on fewer tokens if need be
_STEPS = 4  # structures that a round of sensitivities proposes, the one it began with among them
_HEAD_SHARES = (0.0, 0.5, 1.5, 1.0)  # of the uniform share: heads that leave, in the structures to start from


@dataclass(frozen=True)
class Evolutionary:
    """Levels of least calibration loss: how many units leave each site, which ones being the criterion's order.

    A structure is judged with the out-projections of its removal paths, fitted anew, where the criterion gives any. All
    structures meet the budget to the nearest FFN channel (to `multiple` of them, of which FFN widths that shrink become
    multiples). With attention or ffn in `granularity`, a level may also be all units of such a site (`Removable` says
    what stays); blocks only leave alone. For `effort` plain passes over the calibration tokens:

    1. The best of some starts: the same share everywhere, heads spared or charged more, the allotment of least
       summed removal cost, and, with whole sublayers, what `Global` removes by score over cost. Where the effort is too
       little to tell, the last of these that there is; without removal paths or whole sublayers, the same share.
    2. `rounds` rounds of sensitivities: every site's level is moved up and down by itself; the parabolas through the
       losses, taken to add up, give the levels of least loss at the budget within that distance. The step (or half of
       it, or the one that leaves heads alone) is taken if its loss is lower; else the distance is halved.
    3. Evolution, as in EvoPress (Sieberling et al., 2024), with what is left: `offspring` copies of the best structure
       with parameters moved from some sites to others (or a whole sublayer gone, or back) are judged on a few batches,
       the best quarter on four times as many, together with the parent, which the best one replaces. At most `steps`
       generations (null: what `effort` pays for).

    `tokens` is the share of the calibration windows that decides between structures in 1 and 2 (less of them where the
    effort would not pay for two rounds of 2) and in the last turn of 3. Losses that are not finite are skipped and
    counted.

    Raises:
        RunError: no loss is finite.
    """

    local: ClassVar[bool] = False
    probes: ClassVar[bool] = True

    min_units: int
    granularity: Granularity
    effort: float
    tokens: float
    rounds: int
    distance: float
    offspring: int
    steps: int | None
    multiple: int

    def __post_init__(self) -> None:
        check_settings(self)
        if "blocks" in self.granularity and len(self.granularity) > 1:
            raise ConfigError(
                f"granularity={self.granularity!r}: expected blocks alone, or without them; search=evolutionary "
                "chooses how much leaves each sublayer, search=global, greedy and policy_gradient mix blocks in"
            )
        require_least(self, 0, "rounds")
        require_least(self, 1, "offspring")
        require_least(self, 0, "steps", besides=", or null for what `effort` pays for")
        for name, value in (("tokens", self.tokens), ("distance", self.distance)):
            if not 0 < value <= 1:
                raise ConfigError(f"{name}={value!r}: expected a number in (0, 1]")
        if not (self.effort > 0 and math.isfinite(self.effort)):
            raise ConfigError(f"effort={self.effort!r}: expected a number above 0")

    def rebalanced(self, plan: Plan, scores: Scores, sites: Sequence[Site], budget: Budget) -> Plan:
        """The plan at a budget that differs a little (biases that nothing has to pay for), without a probe."""
        structures = self.structures(scores, sites, budget)
        return structures.plan(structures.balanced(structures.levels(plan)))

    def structures(self, scores: Scores, sites: Sequence[Site], budget: Budget) -> Structures:
        """Those that it may choose from."""
        chosen = chosen_sites(sites, self.granularity, budget)
        plain = is_plain(self.granularity, self.multiple)
        removable = None if plain else Removable(self, scores, sites, budget)
        return Structures(scores, sites, chosen, budget, self.min_units, removable)

    def __call__(
        self, scores: Scores, sites: Sequence[Site], budget: Budget, oracle: Oracle | None, rng: torch.Generator
    ) -> Plan:
        structures = self.structures(scores, sites, budget)
        require(budget, structures.removable)
        if budget.remove <= 0:
            return structures.plan({site.name: 0 for site in structures.chosen})
        if oracle is None:
            raise ConfigError("search=evolutionary: needs the whole model in memory; expected model.stream=false")
        work = Evolution(self, structures, oracle, rng, structures.candidate)
        best = work.evolved(work.descended(work.start()))
        if work.skipped:
            log.warning("search: %d of %d losses were not finite and were skipped", work.skipped, work.asked)
        return structures.plan(best)

    def spends(self, sites: Sequence[Site], budget: Budget, batches: int) -> float:
        """Plain passes over the calibration windows, at most."""
        return self.effort

    @property
    def refits(self) -> float:
        """About those of the structures to start from, and one more for every pass: a pass judges many structures, most
        of which differ in few sites."""
        return len(_HEAD_SHARES) + 1 + self.effort

    def check(self, sites: Sequence[Site], budget: Budget) -> None:
        within_reach(self, sites, budget)


@dataclass
class Evolution:
    """One search under way."""

    method: Evolutionary
    structures: Structures
    oracle: Oracle
    rng: torch.Generator
    candidate: Callable[[Levels], Any]  # what the oracle is shown of a structure
    asked: int = 0
    skipped: int = 0
    spent_before: float = field(init=False)

    def __post_init__(self) -> None:
        self.spent_before = self.oracle.passes

    @property
    def left(self) -> float:
        """Passes that may still be spent."""
        return self.method.effort - (self.oracle.passes - self.spent_before)

    def count(self, share: float) -> int:
        """Batches that hold about a share of the calibration windows: at least one."""
        return max(1, round(share * self.oracle.batches))

    def price(self, structures: int, share: float) -> float:
        """Passes that judging so many structures costs at most: those that begin alike share layers."""
        return structures * self.count(share) / self.oracle.batches

    def drawn(self, share: float) -> list[int]:
        """Numbers of batches drawn at random."""
        return torch.randperm(self.oracle.batches, generator=self.rng)[: self.count(share)].tolist()

    def losses(self, population: Sequence[Levels], batches: Sequence[int]) -> Tensor:
        """Mean loss of each over the batches, Inf where it is not finite: float64."""
        candidates = [self.candidate(levels) for levels in population]
        total = torch.stack([self.oracle.losses(candidates, batch) for batch in batches]).mean(0)
        broken = ~total.isfinite()
        self.asked += len(population)
        self.skipped += int(broken.sum())
        if self.skipped == self.asked:
            raise RunError(f"search: none of {self.asked} calibration losses is finite")
        return total.masked_fill(broken, math.inf)

    # ---- 1: where to start

    def start(self) -> Levels:
        structures = self.structures
        starts = [self._uniform(share) for share in _HEAD_SHARES]
        paths = [structures.scores[site.name] for site in structures.chosen]
        if all(isinstance(path, RemovalPath) for path in paths):
            starts.append(self._cheapest())
        if structures.composites:
            starts.append(self._ranked())
        last, starts = starts[-1], _distinct(starts)
        if self.left < self.price(len(starts), self.method.tokens):
            return last
        return starts[int(self.losses(starts, self.drawn(self.method.tokens)).argmin())]

    def _uniform(self, head_share: float) -> Levels:
        """The same share of every cheap site, of the dearer ones `head_share` times the overall share."""
        structures = self.structures
        share = structures.budget.remove / prunable(structures.chosen, structures.budget)
        dear = {s.name: round(min(1.0, share * head_share) * structures.size[s.name]) for s in structures.dear}
        return structures.balanced({**{site.name: 0 for site in structures.cheap}, **dear})

    def _ranked(self) -> Levels:
        """By the scores alone, whole sublayers among the units."""
        method, structures = self.method, self.structures
        search = Global(method.min_units, method.granularity, "per_parameter", method.multiple)
        plan = search(structures.scores, structures.sites, structures.budget, None, self.rng)
        return structures.balanced(structures.levels(plan))

    def _cheapest(self) -> Levels:
        """Least sum of removal costs."""
        curves = {}
        for site in self.structures.chosen:
            path = self.structures.scores[site.name]
            assert isinstance(path, RemovalPath)
            costs, steps = [0.0, *path.cost_U.tolist()], self.structures.steps[site.name]
            curves[site.name] = (range(len(steps)), [costs[units] for units in steps].__getitem__)
        return self.structures.allotted(curves)

    # ---- 2: sensitivities

    def descended(self, levels: Levels) -> Levels:
        distance = self.method.distance
        for _ in range(self.method.rounds):
            around = self._around(levels, distance)
            structures = 1 + len(around) + _STEPS
            share = min(self.method.tokens, _SENSITIVITIES * self.method.effort / (2 * structures))
            if self.left < self.price(structures, share):
                break
            found = self._step(levels, around, share)
            if found == levels:
                distance /= 2
            levels = found
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
        losses = self.losses(population, self.drawn(share))
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
        steps = _distinct([levels, full, self.structures.balanced(half), spared])
        return steps[int(self.losses(steps, self.drawn(share)).argmin())]

    def _allotted(self, levels: Levels, points: dict[str, dict[int, float]]) -> Levels:
        curves = {}
        for name, own in points.items():
            base = levels[name]
            possible = range(min([base, *own]), max([base, *own]) + 1)
            curves[name] = (possible, parabola(base, own)) if own else ([base], lambda n: 0.0)
        return self.structures.allotted(curves)

    # ---- 3: evolution

    def evolved(self, parent: Levels) -> Levels:
        method, generation = self.method, 0
        first = method.tokens / 4
        finalists = max(1, method.offspring // 4)
        price = self.price(method.offspring, first) + self.price(finalists + 1, method.tokens)
        while self.left >= price and (method.steps is None or generation < method.steps):
            generation += 1
            children = _distinct([self._mutated(parent) for _ in range(method.offspring)])
            losses = self.losses(children, self.drawn(first))
            final = [parent, *(children[i] for i in losses.sort(stable=True).indices[:finalists].tolist())]
            parent = final[int(self.losses(final, self.drawn(method.tokens)).argmin())]
        return parent

    def _mutated(self, levels: Levels) -> Levels:
        """Parameters moved between one, two or three pairs of sites; the amount is drawn on a logarithmic scale. Where
        whole sublayers may leave, one time in two one of them does, or comes back."""
        structures, sites, child = self.structures, self.structures.chosen, dict(levels)
        if structures.wholes and self._draw(2):
            name = structures.wholes[self._draw(len(structures.wholes))].name
            child[name] = 0 if child[name] == structures.most[name] else structures.most[name]
            return structures.balanced(child)
        for _ in range(1 + self._draw(3)):
            loses, gains = sites[self._draw(len(sites))], sites[self._draw(len(sites))]
            largest = self.method.distance * max(site.units * structures.budget.price(site) for site in (loses, gains))
            amount = largest * 2.0 ** -self._draw(5)
            for site, sign in ((loses, 1), (gains, -1)):
                units = max(1, round(amount / structures.cost[site.name])) * sign
                child[site.name] = min(max(child[site.name] + units, 0), structures.most[site.name])
        return structures.balanced(child)

    def _draw(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.rng))


def _distinct(population: Sequence[Levels]) -> list[Levels]:
    return list({tuple(levels.items()): levels for levels in population}.values())

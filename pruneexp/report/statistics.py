"""Means with intervals, Pareto fronts and main effects: pure functions of numbers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Interval:
    """A mean of `n` values with its 95 % interval, mean -+ half; `half` is None for n = 1."""

    mean: float
    half: float | None
    n: int


def t_quantile(degrees: int) -> float:
    """The t that a Student variable of so many degrees of freedom stays below with probability 0.975."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def interval(values: Sequence[float]) -> Interval:
    """Mean and t-interval, half = t(n-1) s / sqrt(n), s with divisor n-1."""
    n, deviation = len(values), spread(values)
    return Interval(fmean(values), None if deviation is None else t_quantile(n - 1) * deviation / math.sqrt(n), n)


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation, divisor n-1; None for one value."""
    return stdev(values) if len(values) > 1 else None


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices, by the first coordinate, of the points that none beats: lower is better in both, and a point is beaten
    by one that is nowhere worse and somewhere better."""

    def beaten(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)

    front = [index for index, point in enumerate(points) if not beaten(point)]
    return sorted(front, key=lambda index: points[index])


@dataclass(frozen=True)
class Effect:
    """One level of one factor: its runs' mean response, their standard deviation, and the mean's distance from the mean
    of all runs. `half`: of the distance's 95 % interval over seeds, None where that cannot be given."""

    factor: str
    level: str
    n: int
    mean: float
    spread: float | None
    effect: float
    half: float | None


def balanced(cells: Sequence[tuple[Hashable, ...]]) -> bool:
    """Whether every combination of the factors' levels is there, each equally often."""
    counts = Counter(cells)
    levels = [{cell[k] for cell in counts} for k in range(len(cells[0]))] if cells else []
    return len(counts) == math.prod(map(len, levels)) and len(set(counts.values())) == 1


def main_effects(
    factors: Mapping[str, Sequence[str]], responses: Sequence[float], seeds: Sequence[Hashable]
) -> list[Effect]:
    """Main effects: the mean response at each level of each factor, over whatever the other factors are.

    Args:
        factors: name -> the level of each run.
        responses: one number a run.
        seeds: the seed of each run. Where there are several, each with the same balanced design, an effect is worked
            out for each and its interval is the t-interval over them.
    """
    found = []
    total = fmean(responses)
    by_seed = _by_seed(factors, seeds)
    for factor, levels in factors.items():
        for level in dict.fromkeys(levels):
            here = [response for response, at in zip(responses, levels, strict=True) if at == level]
            mean = fmean(here)
            half = None
            if by_seed is not None:
                half = interval([_effect(levels, level, responses, runs) for runs in by_seed]).half
            found.append(Effect(factor, level, len(here), mean, spread(here), mean - total, half))
    return found


def _by_seed(factors: Mapping[str, Sequence[str]], seeds: Sequence[Hashable]) -> list[list[int]] | None:
    """The runs of each seed; None for a single seed, or where the seeds' designs are not the same, balanced one."""
    runs = {seed: [index for index, at in enumerate(seeds) if at == seed] for seed in dict.fromkeys(seeds)}
    cells = list(zip(*factors.values(), strict=True))
    designs = [sorted(cells[index] for index in indices) for indices in runs.values()]
    same = all(design == designs[0] for design in designs)
    return list(runs.values()) if len(runs) > 1 and same and balanced(designs[0]) else None


def _effect(levels: Sequence[str], level: str, responses: Sequence[float], runs: Sequence[int]) -> float:
    here = [responses[index] for index in runs if levels[index] == level]
    return fmean(here) - fmean(responses[index] for index in runs)


def crossed(groups: Sequence[tuple[Hashable, ...]]) -> bool:
    """Whether every combination of the values that occur in each place occurs."""
    if not groups:
        return True
    places = [dict.fromkeys(group[k] for group in groups) for k in range(len(groups[0]))]
    return set(itertools.product(*places)) == set(groups)

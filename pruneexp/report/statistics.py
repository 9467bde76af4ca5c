"""Means with intervals, Pareto fronts and main effects: pure functions of numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeVar

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items of each key; keys and items in the order in which they come."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


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
    """Indices of the points that no other beats, in the order of the first coordinate. Lower is better in both; a point
    is beaten by one that is nowhere worse and somewhere better."""

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
    return crossed(cells) and len(set(Counter(cells).values())) == 1


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
    effects = []
    everyone = range(len(responses))
    by_seed = list(grouped(everyone, lambda run: seeds[run]).values())
    cells = list(zip(*factors.values(), strict=True))
    designs = [sorted(cells[run] for run in runs) for runs in by_seed]
    repeated = len(by_seed) > 1 and all(design == designs[0] for design in designs) and balanced(designs[0])
    for factor, levels in factors.items():
        for level, here in grouped(everyone, lambda run, levels=levels: levels[run]).items():
            values = [responses[run] for run in here]
            of_seeds = [
                fmean(responses[run] for run in runs if levels[run] == level) - fmean(responses[run] for run in runs)
                for runs in (by_seed if repeated else ())
            ]
            half = interval(of_seeds).half if repeated else None
            mean = fmean(values)
            effects.append(Effect(factor, level, len(here), mean, spread(values), mean - fmean(responses), half))
    return effects


def crossed(groups: Sequence[tuple[Hashable, ...]]) -> bool:
    """Whether every combination of the values that occur in each place occurs."""
    return not groups or math.prod(len(set(place)) for place in zip(*groups, strict=True)) == len(set(groups))

"""Means, intervals, fronts and main effects against closed forms and published tables of t."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from pruneexp.report.points import aliases_joined, kept_shares
from pruneexp.report.statistics import balanced, crossed, interval, main_effects, pareto_front, spread, t_quantile
from pruneexp.types import Plan, SitePlan


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (30, 2.04227), (200, 1.97190)],
)
def test_t_quantiles(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, abs=1e-5)


def test_t_quantile_has_the_closed_forms_of_one_and_two_degrees() -> None:
    assert t_quantile(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-12)
    assert t_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-12)


def test_interval_of_three() -> None:
    estimate = interval([1.0, 2.0, 6.0])  # mean 3, variance (4 + 1 + 9) / 2 = 7
    assert (estimate.mean, estimate.n) == (3.0, 3)
    assert estimate.half == pytest.approx(t_quantile(2) * math.sqrt(7 / 3))
    assert spread([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt(7))


def test_one_value_has_no_interval_and_equal_ones_have_none_to_speak_of() -> None:
    assert interval([2.5]).half is None and spread([2.5]) is None
    assert interval([2.5, 2.5]).half == 0.0


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    draw = random.Random(0)
    inside = 0
    for _ in range(2000):
        estimate = interval([draw.gauss(0, 1) for _ in range(4)])
        inside += abs(estimate.mean) <= (estimate.half or 0)
    assert 0.935 < inside / 2000 < 0.965


def test_pareto_front() -> None:
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.0, 2.5), (3.0, 3.0), (2.0, 2.0), (4.0, 1.0)]
    assert pareto_front(points) == [1, 2, 5, 0]
    assert pareto_front([(1.0, 1.0)]) == [0]
    assert pareto_front([]) == []


def test_pareto_front_is_what_its_definition_says() -> None:
    draw = random.Random(1)
    points = [(draw.randint(0, 9), draw.randint(0, 9)) for _ in range(60)]
    front = set(pareto_front(points))
    for index, (x, y) in enumerate(points):
        beaten = any((a <= x and b <= y) and (a < x or b < y) for a, b in points)
        assert (index not in front) == beaten


def design(seeds: int) -> tuple[dict[str, list[str]], list[float], list[int]]:
    """A full crossing of three levels and two, response = a + b + seed's offset: effects in closed form."""
    a, b = {"x": 0.0, "y": 1.0, "z": 5.0}, {"p": -1.0, "q": 1.0}
    cells = list(itertools.product(a, b, range(seeds)))
    responses = [a[i] + b[j] + 10.0 * s for i, j, s in cells]
    return {"A": [i for i, _, _ in cells], "B": [j for _, j, _ in cells]}, responses, [s for _, _, s in cells]


def test_main_effects_of_an_additive_response_are_its_parts() -> None:
    factors, responses, seeds = design(3)
    effects = {(one.factor, one.level): one for one in main_effects(factors, responses, seeds)}
    # The mean of all is 2 + 0 + 10.
    assert {key: round(one.effect, 12) for key, one in effects.items()} == {
        ("A", "x"): -2.0,
        ("A", "y"): -1.0,
        ("A", "z"): 3.0,
        ("B", "p"): -1.0,
        ("B", "q"): 1.0,
    }
    assert effects["A", "z"].mean == 15.0 and effects["A", "z"].n == 6
    assert effects["A", "z"].spread == spread([4.0, 14.0, 24.0, 6.0, 16.0, 26.0])
    # Offsets of seeds leave an effect alone, so that it is the same under each of them.
    assert all(one.half == pytest.approx(0.0, abs=1e-12) for one in effects.values())


def test_intervals_of_effects_are_over_seeds() -> None:
    factors = {"A": ["x", "y"] * 3}
    responses = [0.0, 2.0, 0.0, 4.0, 0.0, 12.0]  # y's effect: 1, 2 and 6
    effects = {one.level: one for one in main_effects(factors, responses, [0, 0, 1, 1, 2, 2])}
    assert effects["y"].effect == 3.0 and effects["y"].half == pytest.approx(interval([1.0, 2.0, 6.0]).half)


def test_no_interval_for_one_seed_or_designs_that_differ() -> None:
    factors, responses, seeds = design(1)
    assert all(one.half is None for one in main_effects(factors, responses, seeds))
    factors, responses, seeds = design(2)
    cut = {name: levels[:-1] for name, levels in factors.items()}
    assert all(one.half is None for one in main_effects(cut, responses[:-1], seeds[:-1]))


def test_balanced_and_crossed() -> None:
    full = list(itertools.product("xyz", "pq"))
    assert balanced(full) and balanced(full * 2) and crossed(full)
    assert not balanced(full[:-1]) and not crossed(full[:-1])
    assert not balanced([*full, full[0]]) and crossed([*full, full[0]])
    assert not balanced([("x", "p"), ("y", "q")])


def test_factors_that_change_together_are_one() -> None:
    factors = aliases_joined({"a": ["1", "1", "2"], "b": ["u", "u", "v"], "c": ["p", "q", "p"], "d": ["k", "k", "k"]})
    assert factors == {"a, b": ["1, u", "1, u", "2, v"], "c": ["p", "q", "p"]}


def test_kept_shares() -> None:
    plan = Plan(
        {
            "model.decoder.layers.0.fc2": SitePlan("mlp", 10, (0, 1)),
            "model.decoder.layers.1.fc2": SitePlan("mlp", 10, tuple(range(10))),
            "model.decoder.layers.0.self_attn": SitePlan("attention", 4, ()),
            "model.decoder.layers.12": SitePlan("block", 1, ()),
        }
    )
    assert kept_shares(plan) == {"mlp": {0: 0.2, 1: 1.0, 12: 0.0}, "attention": {0: 0.0, 12: 0.0}}
    blocks = Plan({"model.layers.0": SitePlan("block", 1, (0,)), "model.layers.1": SitePlan("block", 1, ())})
    assert kept_shares(blocks) == {"block": {0: 1.0, 1: 0.0}}
    experts = {f"h.3.expert.{k}": SitePlan("mlp", 4, tuple(range(k))) for k in (1, 3)}
    assert kept_shares(Plan(experts)) == {"mlp": {3: 0.5}}

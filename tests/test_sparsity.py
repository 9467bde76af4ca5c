import itertools
import math

import pytest

from pruneexp.sparsity import Cubic, Linear, OneShot
from pruneexp.types import ConfigError
from tests.cases import UNTIMED, each


@each("ratio", [0.0, 0.2, 0.999])
def test_one_round(ratio):
    assert OneShot(ratio, "decoder", 0, *UNTIMED).shares() == (ratio,)
    assert (
        Linear(ratio, "decoder", 0, 1, *UNTIMED).shares()
        == Cubic(ratio, "decoder", 0, 1, *UNTIMED).shares()
        == (ratio,)
    )


def test_linear():
    assert Linear(0.4, "decoder", 0, 4, *UNTIMED).shares() == pytest.approx((0.1, 0.2, 0.3, 0.4))


def test_cubic():
    # 1 - (3/4)^3 = 37/64, 1 - (2/4)^3 = 56/64, 1 - (1/4)^3 = 63/64
    assert Cubic(0.64, "decoder", 0, 4, *UNTIMED).shares() == pytest.approx((0.37, 0.56, 0.63, 0.64))


@each("schedule, rounds", itertools.product([Linear, Cubic], [2, 3, 7, 10]))
def test_shares_grow_to_the_very_ratio(schedule, rounds):
    shares = schedule(0.3, "prunable", 0, rounds, *UNTIMED).shares()
    assert len(shares) == rounds and shares[-1] == 0.3
    assert list(shares) == sorted(set(shares)) and shares[0] > 0
    assert set(schedule(0.0, "decoder", 0, rounds, *UNTIMED).shares()) == {0.0}


@each(
    "ratio, schedule",
    itertools.product(
        [-0.1, 1.0, 20.0, math.nan, math.inf],
        [OneShot, lambda *a: Linear(*a[:3], 2, *UNTIMED), lambda *a: Cubic(*a[:3], 2, *UNTIMED)],
    ),
)
def test_ratio_is_a_share(schedule, ratio):
    with pytest.raises(ConfigError, match=r"^ratio=.*: expected a number in \[0, 1\)"):
        schedule(ratio, "decoder", 0, *UNTIMED)


@each("schedule, rounds", itertools.product([Linear, Cubic], [0, -3]))
def test_rounds_are_counted_from_1(schedule, rounds):
    with pytest.raises(ConfigError, match=rf"^rounds={rounds}: expected an integer >= 1$"):
        schedule(0.2, "decoder", 0, rounds, *UNTIMED)

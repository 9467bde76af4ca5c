import math

import pytest

from pruneexp.sparsity import OneShot
from pruneexp.types import ConfigError


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.999])
def test_one_shot_has_one_round(ratio):
    assert OneShot(ratio, "decoder", 0).rounds() == (ratio,)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 20.0, math.nan, math.inf])
def test_ratio_is_a_share(ratio):
    with pytest.raises(ConfigError, match=r"^ratio=.*: expected a number in \[0, 1\)"):
        OneShot(ratio, "decoder", 0)

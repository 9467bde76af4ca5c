"""One width for all layers on request: the family's own class holds the model, whatever the rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pruneexp.model import Model
from pruneexp.search import Uniform
from pruneexp.surgery import save, shrink_
from pruneexp.types import Budget
from tests.cases import each
from tests.tiny_families import of_every_family, others, says_heads

BOTH, CHANNELS = ["heads", "channels"], ["channels"]
# one of each family that has a stock form, and a variant whose config can say less
NAMES = (*others(of_every_family(), {"bloom"}), "phi4_mini")
TOKENS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def pruned_(model: Model, granularity: list[Any], ratio: float, alike: bool = True, multiple: int = 1) -> float:
    """Prunes by random scores; the share that left the decoder."""
    before, sites = model.decoder_params, model.sites()
    rng = torch.Generator().manual_seed(1)
    scores = {site.name: torch.rand(site.units, generator=rng) for site in sites}
    budget = Budget(ratio, before)
    search = Uniform(1, granularity, 0.0, 0.0, multiple, alike, remainder="nearest")
    shrink_(model, search(scores, sites, budget, None, rng))
    return 1 - model.decoder_params / before


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@each("ratio", [0.1, 0.4])
def test_it_is_stock(name: str, ratio: float, loaded: Callable[..., Model], tmp_path: Path) -> None:
    model = loaded(name)
    granularity = BOTH if says_heads(name) else CHANNELS
    ratio = ratio if says_heads(name) else ratio / 3  # of so narrow FFNs
    step = max(
        sum(s.cost.params for s in model.sites() if s.kind == "mlp" and (s.expert is None) == plain)
        for plain in (True, False)
    )
    multiple = 8 if model.mixture else 1  # the stock class of a mixture runs no other widths
    gone = pruned_(model, granularity, ratio, multiple=multiple)
    assert abs(gone - ratio) * model.decoder_params < step * multiple
    assert save(model, tmp_path / "model").kind == "stock"
    with torch.no_grad():
        expected = model.module(TOKENS).logits
        actual = loaded(name, tmp_path / "model").module(TOKENS).logits
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_without_it_rounding_makes_layers_differ(loaded: Callable[..., Model], tmp_path: Path) -> None:
    model = loaded("llama")
    pruned_(model, BOTH, 0.13, alike=False)
    assert save(model, tmp_path / "model").kind == "remote_code"

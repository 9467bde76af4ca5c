from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from pruneexp.model import divergences, losses, next_token_losses
from pruneexp.model.losses import mean_next_token_loss

VOCABULARY = 11


def logits(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(params=[1, VOCABULARY, 3 * VOCABULARY + 1, 10**6], ids=["1", "one", "three", "all"])
def at_once(request, monkeypatch):
    monkeypatch.setattr(losses, "_AT_ONCE", request.param)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_losses_are_what_they_are_at_once(dtype):
    tokens = torch.randint(VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(1))
    own, wide = logits(3, 8, dtype=dtype), torch.promote_types(dtype, torch.float32)
    token_losses = next_token_losses(own, tokens)
    expected = functional.cross_entropy(own[:, :-1].to(wide).mT, tokens[:, 1:], reduction="none")
    assert token_losses.dtype == torch.float64 and torch.allclose(token_losses, expected.double(), rtol=1e-6)
    assert float(mean_next_token_loss(own, tokens)) == pytest.approx(float(token_losses.mean()), rel=1e-6)


@pytest.mark.usefixtures("at_once")
def test_divergences_by_their_formula():
    q, p = logits(8), logits(8, seed=1)
    expected = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    assert torch.allclose(divergences(q, p), expected, rtol=1e-12)
    assert float(divergences(p, p).abs().max()) < 1e-15
    uniform = torch.zeros(1, VOCABULARY, dtype=torch.float64)
    certain = torch.full((1, VOCABULARY), -1e9, dtype=torch.float64).index_fill(1, torch.tensor([2]), 0.0)
    assert float(divergences(uniform, certain)) == pytest.approx(math.log(VOCABULARY))


def test_a_gpu_is_given_more_at_once():
    assert losses._rows(torch.empty(8, 2**17)) == 4
    assert losses._rows(torch.empty(8, 2**17, device="meta")) == 256  # any other device


def test_what_predicts_nothing_has_no_losses():
    assert next_token_losses(logits(2, 1), torch.zeros(2, 1, dtype=torch.int64)).shape == (2, 0)

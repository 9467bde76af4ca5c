from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pruneexp.evidence import AbsoluteMoments, Gram, Moments, RunningFluctuation
from pruneexp.types import Cost, Evidence, RunError, Site
from tests.cases import each
from tests.toy_sites import activations, layer_sites

ATTENTION, MLP = layer_sites(0)


def site_of(channels: int) -> Site:
    return Site("model.layers.0.mlp", "mlp", 0, channels, 1, Cost(1, 1, 0))


def fed(kind: type, site: Site, *batches: Tensor):
    evidence = kind.empty(site)
    for x_BTC in batches:
        evidence = evidence.update_(x_BTC)
    return evidence


def test_a_gram_satisfies_the_protocol():
    assert isinstance(Gram.empty(MLP), Evidence) and Gram.source == "reader"


@each("kind", [Moments, AbsoluteMoments, RunningFluctuation])
def test_satisfies_the_protocol_and_never_changes(kind):
    empty = kind.empty(MLP)
    assert isinstance(empty, Evidence) and empty.source == "reader"
    first = empty.update_(activations(MLP, 2, 5))
    before = [v.clone() if isinstance(v, Tensor) else v for v in vars(first).values()]
    first.update_(activations(MLP, 3, 5, seed=1))
    assert empty.n == 0 and all(torch.count_nonzero(v) == 0 for v in vars(empty).values() if isinstance(v, Tensor))
    for old, new in zip(before, vars(first).values(), strict=True):
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new


def test_moments_are_the_mean_the_variance_and_the_mean_square():
    x = activations(ATTENTION, 6, 11)
    moments = fed(Moments, ATTENTION, x)
    flat = x.reshape(-1, ATTENTION.channels)
    assert moments.n == 66
    torch.testing.assert_close(moments.mean_C, flat.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.variance_C, flat.var(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.mean_square_C, flat.square().mean(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [Moments, AbsoluteMoments, Gram])
def test_chunks_and_merges_make_no_difference_in_float64(kind):
    x = activations(MLP, 12, 7)
    whole = fed(kind, MLP, x)
    for sizes in ([1] * 12, [5, 7], [2, 9, 1]):
        parts = x.split(sizes)
        merged = kind.empty(MLP)
        for part in parts:
            merged = merged.merge(fed(kind, MLP, part))
        for other in (fed(kind, MLP, *parts), merged, fed(kind, MLP, x.reshape(1, -1, MLP.channels))):
            assert other.n == whole.n == 84
            for name in vars(whole):
                torch.testing.assert_close(getattr(other, name), getattr(whole, name), rtol=1e-12, atol=1e-12)


def test_one_update_may_be_many_chunks(monkeypatch):
    x = activations(MLP, 12, 7)
    whole, gram = fed(Moments, MLP, x), fed(Gram, MLP, x)
    monkeypatch.setattr("pruneexp.evidence.statistics._CPU_CHUNK", 3 * MLP.channels)
    torch.testing.assert_close(fed(Moments, MLP, x).m2_C, whole.m2_C, rtol=1e-12, atol=0)
    torch.testing.assert_close(fed(Gram, MLP, x).gram_CC, gram.gram_CC, rtol=1e-12, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e3])
def test_float32_moments_survive_an_offset(offset):
    site = site_of(64)
    x = (torch.randn(16, 128, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + offset).float()
    exact = x.double().reshape(-1, 64)
    moments = fed(Moments, site, *x.split(3))
    assert moments.mean_C.dtype == moments.m2_C.dtype == torch.float64
    torch.testing.assert_close(moments.variance_C, exact.var(0), rtol=2e-6, atol=0)
    torch.testing.assert_close(moments.mean_C, exact.mean(0), rtol=2e-7, atol=1e-6)


def test_moments_survive_a_first_token_unlike_all_others():
    x = torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(0)) * 1e-2
    x[0, 0] = 3e3
    moments = fed(Moments, site_of(8), x[:1, :1], x[:1, 1:], x[1:])
    torch.testing.assert_close(moments.variance_C, x.double().reshape(-1, 8).var(0), rtol=1e-6, atol=0)
    rest = fed(Moments, site_of(8), x[1:])
    torch.testing.assert_close(rest.variance_C, x[1:].double().reshape(-1, 8).var(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_reduced_in_float32(dtype):
    x = activations(MLP, 8, 64, dtype=dtype)
    exact = x.double().reshape(-1, MLP.channels)
    moments, gram = fed(Moments, MLP, *x.split(3)), fed(Gram, MLP, x)
    torch.testing.assert_close(moments.variance_C, exact.var(0), rtol=2e-6, atol=0)
    torch.testing.assert_close(moments.mean_C, exact.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gram.gram_CC, exact.T @ exact, rtol=1e-12, atol=1e-12)
    assert fed(RunningFluctuation, MLP, x).mean_C.dtype == torch.float32


def test_a_constant_channel_has_no_variance():
    x = torch.full((3, 50, 1), 0.1)
    moments = fed(Moments, site_of(1), x)
    assert moments.variance_C.item() < 1e-14


def test_gram_is_the_sum_of_outer_products():
    x = activations(ATTENTION, 3, 20, dtype=torch.float32)
    flat = x.double().reshape(-1, ATTENTION.channels)
    gram = fed(Gram, ATTENTION, *x)
    torch.testing.assert_close(gram.gram_CC, flat.T @ flat, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram.mean_C, flat.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(gram.covariance_CC, flat.T.cov(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [Moments, Gram])
def test_too_few_tokens_are_an_error(kind):
    spread = "variance_C" if kind is Moments else "covariance_CC"
    one = fed(kind, site_of(2), torch.ones(1, 1, 2))
    with pytest.raises(RunError, match="1 calibration tokens were seen: expected at least 2"):
        getattr(one, spread)
    with pytest.raises(RunError, match="0 calibration tokens were seen: expected at least 1"):
        _ = fed(kind, site_of(2), torch.ones(0, 5, 2)).mean_C if kind is Gram else kind.empty(MLP).mean_square_C


def released_estimator(x_STC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """FLAP's released updates, written out on one sequence at a time, the alias included."""
    mean = torch.zeros(x_STC.shape[2])
    scaler, fluctuation = mean.clone(), mean.clone()
    for s, x in enumerate(x_STC):
        mean *= s / (s + 1)
        mean += torch.mean(x.T, dim=1) / (s + 1)
        scaler *= s / (s + 1)
        scaler += torch.norm(x.T, p=2, dim=1) ** 2 / (s + 1)
        if s > 0:
            fluctuation *= (s - 1) / s
            fluctuation += torch.sum((x.T - mean[:, None]) * (x.T - mean[:, None]), dim=1) / (s + 1)
    return mean, scaler, fluctuation


@pytest.mark.parametrize("batch", [1, 4, 9])
def test_running_fluctuation_is_bitwise_that_of_the_released_code(batch):
    x = activations(MLP, 9, 32, dtype=torch.float32)
    mean, scaler, fluctuation = released_estimator(x)
    seen = fed(RunningFluctuation, MLP, *x.split(batch))
    assert seen.n == 9
    assert torch.equal(seen.mean_C, mean)
    assert torch.equal(seen.scaler_C, scaler)
    assert torch.equal(seen.fluctuation_C, fluctuation)


def test_running_fluctuation_is_about_tokens_times_variance():
    x = torch.randn(200, 32, 4, generator=torch.Generator().manual_seed(0))
    seen = fed(RunningFluctuation, site_of(4), x)
    torch.testing.assert_close(seen.fluctuation_C / 32, x.reshape(-1, 4).var(0), rtol=0.05, atol=0)


def test_running_fluctuation_ignores_the_first_sequence():
    x = activations(MLP, 1, 32, dtype=torch.float32)
    assert torch.count_nonzero(fed(RunningFluctuation, MLP, x).fluctuation_C) == 0


def test_running_fluctuation_cannot_be_merged():
    seen = fed(RunningFluctuation, MLP, activations(MLP, 2, 8))
    with pytest.raises(RunError, match="depends on the order of the sequences and cannot be merged"):
        seen.merge(seen)

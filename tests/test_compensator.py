from __future__ import annotations

import pytest
import torch

from pruneexp.compensator import Bias, BiasOfficial, NoCompensation
from pruneexp.evidence import Moments, RunningFluctuation
from tests.toy_sites import activations, layer_sites

_, MLP = layer_sites(0)
BIASES = [(Bias, Moments), (BiasOfficial, RunningFluctuation)]


def out_projection(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(9, MLP.channels, generator=generator, dtype=torch.float64)
    return weight.to(dtype), torch.randn(9, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("compensator", "evidence"), BIASES)
def test_removing_constant_channels_loses_nothing(compensator, evidence):
    x = activations(MLP, 5, 16)
    gone = [0, 7, 8, MLP.channels - 1]
    x[..., gone] = torch.tensor([2.0, -1.0, 0.0, 30.0], dtype=x.dtype)
    weight, bias = out_projection()
    keep = torch.tensor([c for c in range(MLP.channels) if c not in gone])
    for old in (bias, None):
        pruned, added = compensator(False)(weight, old, evidence.empty(MLP).update_(x), keep)
        dense = x @ weight.T + (0 if old is None else old)
        torch.testing.assert_close(x[..., keep] @ pruned.T + added, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bias_is_the_mean_of_what_leaves_rounded_once(dtype):
    weight, bias = out_projection(dtype)
    x = activations(MLP, 5, 16)
    moments = Moments.empty(MLP).update_(x)
    keep = torch.arange(0, MLP.channels, 3)
    pruned, added = Bias(False)(weight, bias, moments, keep)
    gone = [c for c in range(MLP.channels) if c % 3]
    expected = bias.double() + weight.double()[:, gone] @ x.reshape(-1, MLP.channels).mean(0)[gone]
    assert torch.equal(pruned, weight[:, ::3]) and pruned.dtype == added.dtype == dtype
    torch.testing.assert_close(added.double(), expected.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=1e-12)


@pytest.mark.parametrize(("compensator", "evidence"), [*BIASES, (NoCompensation, Moments)])
@pytest.mark.parametrize("biased", [True, False])
def test_keep_all_is_the_identity(compensator, evidence, biased):
    weight, bias = out_projection()
    bias = bias if biased else None
    seen = evidence.empty(MLP).update_(activations(MLP, 2, 8))
    kept, same = compensator(False)(weight, bias, seen, torch.arange(MLP.channels))
    assert kept is weight and same is bias


@pytest.mark.parametrize(("compensator", "evidence"), BIASES)
def test_a_reader_that_loses_everything_is_its_mean_output(compensator, evidence):
    weight, bias = out_projection()
    x = activations(MLP, 4, 8)
    seen, none = evidence.empty(MLP).update_(x), torch.tensor([], dtype=torch.int64)
    pruned, added = compensator(False)(weight, bias, seen, none)
    assert pruned.shape == (9, 0)
    torch.testing.assert_close(added, (x @ weight.T + bias).mean((0, 1)), rtol=1e-12, atol=1e-12)


def test_no_compensation_leaves_the_bias_and_the_arguments_alone():
    weight, bias = out_projection()
    before = weight.clone(), bias.clone()
    pruned, same = NoCompensation(False)(weight, bias, None, torch.tensor([1, 4]))
    assert torch.equal(pruned, weight[:, [1, 4]]) and same is bias
    Bias(False)(weight, bias, Moments.empty(MLP).update_(activations(MLP, 2, 8)), torch.tensor([1, 4]))
    assert torch.equal(weight, before[0]) and torch.equal(bias, before[1])


def test_what_they_ask_for():
    assert NoCompensation.evidence is None and not NoCompensation.adds_bias
    assert Bias.evidence is Moments and BiasOfficial.evidence is RunningFluctuation
    assert Bias.adds_bias and BiasOfficial.adds_bias
    assert Bias(sequential=True).sequential

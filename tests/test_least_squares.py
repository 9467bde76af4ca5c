from __future__ import annotations

import math

import pytest
import torch

from pruneexp.compensator import LeastSquares
from pruneexp.evidence import Gram, WantedOutput
from pruneexp.types import ConfigError, RunError
from tests.toy_sites import activations, layer_sites

_, MLP = layer_sites(0)
C = MLP.channels


def out_projection(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(9, C, generator=generator, dtype=torch.float64)
    return weight.to(dtype), torch.randn(9, generator=generator, dtype=torch.float64).to(dtype)


def mixed(seed: int = 0) -> torch.Tensor:
    """Inputs that tell about each other."""
    x = activations(MLP, 8, 64, seed)
    mix = torch.randn(C, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / C**0.5
    return x @ (torch.eye(C, dtype=torch.float64) + mix)


def gram(x: torch.Tensor) -> Gram:
    return Gram.empty(MLP).update_(x)


@pytest.mark.parametrize("biased", [True, False])
def test_without_ridge_it_is_the_least_squares_solution_on_the_raw_data(biased):
    weight, bias = out_projection()
    x, keep = mixed(), torch.arange(0, C, 3)
    pruned, added = LeastSquares(0.0, "pruned", True, "site")(weight, bias if biased else None, gram(x), keep)
    flat = x.reshape(-1, C)
    dense = flat @ weight.T + (bias if biased else 0)
    design = torch.cat([flat[:, keep], torch.ones(len(flat), 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(design, dense).solution
    torch.testing.assert_close(pruned, solution[:-1].T, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(added, solution[-1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("per", ["site", "channel"])
def test_ridge_is_the_solution_of_its_own_objective(per):
    weight, bias = out_projection()
    x, keep, ridge = mixed(), torch.arange(1, C, 2), 0.3
    pruned, added = LeastSquares(ridge, "pruned", True, per)(weight, bias, gram(x), keep)
    flat = x.reshape(-1, C)
    variance_K = flat.var(0)[keep] if per == "channel" else flat.var(0).mean().expand(len(keep))
    strength = torch.diag((ridge * variance_K * (len(flat) - 1)).sqrt())
    centred = flat - flat.mean(0)
    rows = torch.cat([centred[:, keep], strength])
    aim = torch.cat([centred @ weight.T, strength @ weight[:, keep].T])
    torch.testing.assert_close(pruned, torch.linalg.lstsq(rows, aim).solution.T, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(added, bias + weight @ flat.mean(0) - pruned @ flat.mean(0)[keep])


@pytest.mark.parametrize("target", ["pruned", "dense"])
def test_a_ridge_per_channel_does_not_see_how_channels_are_scaled(target):
    weight, _ = out_projection()
    x, keep, seen = mixed(), torch.arange(1, C, 2), Gram if target == "pruned" else WantedOutput
    scale_C = 2.0 ** torch.randint(-3, 4, (C,), generator=torch.Generator().manual_seed(1)).double()

    def given(per, scale_C):
        shown = (x * scale_C,) if target == "pruned" else (x * scale_C, mixed(1)[..., :9])
        compensator = LeastSquares(0.3, target, True, per)
        pruned, added = compensator(weight / scale_C, None, seen.empty(MLP).update_(*shown), keep)
        return (x * scale_C)[..., keep] @ pruned.T + added

    for per, same in (("channel", True), ("site", False)):
        assert torch.allclose(given(per, scale_C), given(per, torch.ones(C).double()), rtol=1e-9) == same


@pytest.mark.parametrize("per", ["site", "channel"])
@pytest.mark.parametrize("target", ["pruned", "dense"])
def test_a_channel_that_never_changes_keeps_its_weights(per, target):
    weight, _ = out_projection()
    x, keep, seen = mixed(), torch.arange(1, C, 2), Gram if target == "pruned" else WantedOutput
    x[..., 3] = 0.0
    shown = (x,) if target == "pruned" else (x, mixed(1)[..., :9])
    pruned, _ = LeastSquares(1e-4, target, True, per)(weight, None, seen.empty(MLP).update_(*shown), keep)
    torch.testing.assert_close(pruned[:, 1], weight[:, 3])


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_a_constant_channel_leaves_without_a_trace(ridge):
    weight, bias = out_projection()
    x = mixed()
    x[..., 5] = 7.0
    keep = torch.tensor([c for c in range(C) if c != 5])
    pruned, added = LeastSquares(ridge, "pruned", True, "site")(weight, bias, gram(x), keep)
    torch.testing.assert_close(x[..., keep] @ pruned.T + added, x @ weight.T + bias, rtol=1e-8, atol=1e-8)


def test_a_duplicated_channel_leaves_without_a_trace():
    weight, bias = out_projection()
    x = mixed()
    x[..., 11] = -2 * x[..., 30] + 1
    keep = torch.tensor([c for c in range(C) if c != 11])
    pruned, added = LeastSquares(0.0, "pruned", True, "site")(weight, None, gram(x), keep)
    torch.testing.assert_close(x[..., keep] @ pruned.T + added, x @ weight.T, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("biased", [True, False])
def test_keep_all_is_the_identity(biased):
    weight, bias = out_projection()
    bias = bias if biased else None
    kept, same = LeastSquares(0.1, "pruned", True, "site")(weight, bias, gram(mixed()), torch.arange(C))
    assert kept is weight and same is bias


def test_a_reader_that_loses_everything_is_its_mean_output():
    weight, bias = out_projection()
    x = mixed()
    pruned, added = LeastSquares(0.0, "pruned", True, "site")(
        weight, bias, gram(x), torch.tensor([], dtype=torch.int64)
    )
    assert pruned.shape == (9, 0)
    torch.testing.assert_close(added, (x @ weight.T + bias).mean((0, 1)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_rounded_once_and_leaves_weights_alone(dtype):
    weight, bias = out_projection(dtype)
    before, seen, keep = (weight.clone(), bias.clone()), gram(mixed()), torch.arange(0, C, 2)
    pruned, added = LeastSquares(1e-3, "pruned", True, "site")(weight, bias, seen.copy(), keep)
    exact, exact_bias = LeastSquares(1e-3, "pruned", True, "site")(weight.double(), bias.double(), seen, keep)  # spent
    assert torch.equal(pruned, exact.to(dtype)) and torch.equal(added, exact_bias.to(dtype))
    assert torch.equal(weight, before[0]) and torch.equal(bias, before[1])


def test_a_singular_covariance_names_the_ridge():
    weight, bias = out_projection()
    x = mixed()
    x[..., 4] = 1.0  # stays
    with pytest.raises(RunError, match=r"^ridge=0\.0: the inputs' covariance is singular"):
        LeastSquares(0.0, "pruned", True, "site")(weight, bias, gram(x), torch.arange(10))
    LeastSquares(1e-4, "pruned", True, "site")(weight, bias, gram(x), torch.arange(10))


@pytest.mark.parametrize("ridge", [-1.0, math.nan, math.inf])
def test_a_ridge_that_cannot_be(ridge):
    with pytest.raises(ConfigError, match=r"^ridge="):
        LeastSquares(ridge, "pruned", True, "site")


def test_a_wanted_output_is_fitted_as_by_least_squares_on_the_raw_data():
    weight, bias = out_projection()
    x, keep = mixed(), torch.arange(0, C, 3)
    y = torch.tanh(x) @ weight.T + mixed(1)[..., :9]
    seen = WantedOutput.empty(MLP)
    for part_x, part_y in zip(x.split(3), y.split(3), strict=True):
        seen = seen.update_(part_x, part_y)
    pruned, added = LeastSquares(0.0, "dense", True, "site")(weight, bias, seen, keep)
    flat = x.reshape(-1, C)
    design = torch.cat([flat[:, keep], torch.ones(len(flat), 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(design, y.reshape(-1, 9)).solution
    torch.testing.assert_close(pruned, solution[:-1].T, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(added, solution[-1], rtol=1e-8, atol=1e-8)


def test_wanted_outputs_do_not_depend_on_chunks_and_merge():
    x, y = mixed(), mixed(1)[..., :9]
    whole = WantedOutput.empty(MLP).update_(x, y)
    parts = [WantedOutput.empty(MLP).update_(x[i : i + 2], y[i : i + 2]) for i in range(0, 8, 2)]
    joined = parts[0].merge(parts[1]).merge(parts[2].merge(parts[3]))
    assert joined.inputs.n == whole.inputs.n == 8 * 64
    flat, wanted = x.reshape(-1, C), y.reshape(-1, 9)
    expected = (flat - flat.mean(0)).T @ (wanted - wanted.mean(0)) / (len(flat) - 1)
    for seen in (whole, joined):
        torch.testing.assert_close(seen.copy().covariance_(), expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(seen.wanted_mean_O, wanted.mean(0))


@pytest.mark.parametrize(("ridge", "per"), [(0.0, "site"), (1e-2, "site"), (1e-2, "channel")])
def test_wanted_outputs_of_the_kept_channels_fit_as_those_of_all(ridge, per):
    """The ridge goes by their variance alone."""
    weight, bias = out_projection()
    x, keep = mixed(), torch.arange(1, C, 3)
    y = torch.tanh(x) @ weight.T + mixed(1)[..., :9]
    whole, kept = (WantedOutput.of(MLP, channels) for channels in (torch.arange(C), keep))
    for part_x, part_y in zip(x.split(3), y.split(3), strict=True):
        whole, kept = whole.update_(part_x, part_y), kept.update_(part_x, part_y)
    assert kept.inputs.gram_CC.shape == (len(keep), len(keep))
    fits = [LeastSquares(ridge, "dense", True, per)(weight, bias, seen.copy(), keep) for seen in (whole, kept)]
    for of_all, of_kept in zip(*fits, strict=True):
        torch.testing.assert_close(of_kept, of_all, rtol=1e-9, atol=1e-10)
    halved = [
        half.narrowed(keep[::2]) for half in (whole, whole.narrowed(keep), kept.merge(WantedOutput.of(MLP, keep)))
    ]
    for other in halved[1:]:
        torch.testing.assert_close(other.inputs.gram_CC, halved[0].inputs.gram_CC)
        torch.testing.assert_close(other.cross_KO, halved[0].cross_KO)
    alone = WantedOutput.of(MLP, keep).update_(x[..., keep], y)
    torch.testing.assert_close(alone.inputs.gram_CC, kept.inputs.gram_CC)
    with pytest.raises(ValueError, match="some of those looked at"):
        kept.narrowed(torch.arange(3))


def test_a_reader_that_is_left_without_inputs_gives_the_wanted_mean():
    weight, bias = out_projection()
    x, y = mixed(), mixed(1)[..., :9]
    seen = WantedOutput.of(MLP, torch.arange(0)).update_(x, y)
    pruned, added = LeastSquares(1e-3, "dense", True, "site")(weight, bias, seen, torch.arange(0))
    assert pruned.shape == (9, 0)
    torch.testing.assert_close(added, y.reshape(-1, 9).mean(0))


def test_the_dense_target_is_sequential():
    with pytest.raises(ConfigError, match=r"^sequential=False: expected true with target=dense"):
        LeastSquares(1e-3, "dense", False, "site")
    assert LeastSquares(1e-3, "dense", True, "site").evidence is WantedOutput
    assert LeastSquares(1e-3, "pruned", False, "site").evidence is Gram

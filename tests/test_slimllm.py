"""SlimLLM's scores and its regression, against their formulas written out over tokens."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from pruneexp.compensator import LinearRegression
from pruneexp.criterion import SlimLlm
from pruneexp.criterion.slimllm import removed_by_correlation
from pruneexp.evidence import Gram, InputMoments
from pruneexp.types import RemovalPath
from tests.cases import each
from tests.toy_sites import HIDDEN, activations, block

BLOCK = block()
ATTENTION, FFN = BLOCK.sites
X = {site.name: activations(site, 4, 50, seed=site.units) for site in BLOCK.sites}
H = torch.randn(4, 50, HIDDEN, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.3
SEEN = {
    site.name: (Gram.empty(site).update_(X[site.name]), InputMoments.empty(site).update_(H)) for site in BLOCK.sites
}


def correlation(z: Tensor, y: Tensor) -> Tensor:
    z, y = z - z.mean(0), y - y.mean(0)
    return ((z * y).mean(0) / (z.std(0, correction=0) * y.std(0, correction=0))).abs()


def given_by_heads() -> Tensor:
    """[N, O, U]"""
    weight = BLOCK.weights[ATTENTION.name].out_projection
    x_NUW = X[ATTENTION.name].flatten(0, 1).unflatten(1, (ATTENTION.units, ATTENTION.width))
    return torch.einsum("nuw,ouw->nou", x_NUW, weight.unflatten(1, (ATTENTION.units, ATTENTION.width)))


def test_heads_leave_by_the_correlation_of_what_stays() -> None:
    path = SlimLlm(True)(BLOCK, SEEN)[ATTENTION.name]
    assert isinstance(path, RemovalPath)
    o_NOU, left = given_by_heads(), list(range(ATTENTION.units))
    for unit, cost in zip(path.order_U.tolist()[:-1], path.cost_U.tolist()[:-1], strict=True):
        losses = {
            u: 1 - correlation(o_NOU[..., [v for v in left if v != u]].sum(-1), o_NOU.sum(-1)).mean() for u in left
        }
        assert min(losses, key=lambda u: losses[u].item()) == unit
        torch.testing.assert_close(torch.tensor(cost, dtype=torch.float64), losses[unit], rtol=1e-8, atol=1e-10)
        left.remove(unit)
    assert path.cost_U[-1] == 1 + 3e-12 and path.scores_U.argsort().tolist() == path.order_U.tolist()


def test_channels_score_in_the_principal_directions_of_the_output() -> None:
    weights, x, h = BLOCK.weights[FFN.name], X[FFN.name].flatten(0, 1), H.flatten(0, 1)
    y = x @ weights.out_projection.T
    values, vectors = torch.linalg.eig(((y - y.mean(0)).T @ (y - y.mean(0))).to(torch.complex128))
    values, vectors = values.real.abs(), vectors.real
    scale = torch.sigmoid(values / values.mean())
    expected = []
    for j in range(FFN.channels):
        directions = (vectors.T @ weights.out_projection[:, j]) * scale
        score = directions.norm() * x[:, j].square().mean().sqrt()
        for rows in weights.in_projections.values():
            score = score + (rows[j, 0] * h.square().mean(0).sqrt()).norm()
        expected.append(score)
    scores = SlimLlm(True)(BLOCK, SEEN)[FFN.name]
    torch.testing.assert_close(scores.columns_C, torch.stack(expected), rtol=1e-8, atol=0)  # type: ignore


def test_an_output_that_never_changes_costs_nothing() -> None:
    still = torch.zeros(2, 3, 3, dtype=torch.float64)
    still[1] = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    order, cost = removed_by_correlation(still)
    assert order.tolist() == [0, 1, 2]
    torch.testing.assert_close(
        cost[0], torch.tensor((1 - (5 / 6) ** 0.5) / 2, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )
    assert torch.isfinite(cost).all()


@each("biased, heads", itertools.product([True, False], [True, False]))
def test_the_regression_is_least_squares_of_every_output_alone(biased: bool, heads: bool) -> None:
    site = ATTENTION if heads else FFN
    weight, x = BLOCK.weights[site.name].out_projection, X[site.name].flatten(0, 1)
    bias = torch.linspace(-1, 1, HIDDEN, dtype=torch.float64) if biased else None
    keep = site.keep_C(range(0, site.units, 2))
    y, z = x @ weight.T + (0 if bias is None else bias), x[:, keep] @ weight[:, keep].T
    fitted_weight, added = LinearRegression(True)(weight, bias, Gram.empty(site).update_(X[site.name]), keep)
    for d in range(HIDDEN):
        a, b = torch.linalg.lstsq(torch.stack([z[:, d], torch.ones(len(z))], 1), y[:, d, None]).solution.flatten()
        torch.testing.assert_close(fitted_weight[d], a * weight[d, keep], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(added[d], b, rtol=1e-8, atol=1e-10)  # type: ignore


def test_the_regression_leaves_what_keeps_all_and_shifts_what_keeps_nothing() -> None:
    weight = BLOCK.weights[FFN.name].out_projection.float()
    seen = Gram.empty(FFN).update_(X[FFN.name])
    assert LinearRegression(True)(weight, None, seen, torch.arange(FFN.channels)) == (weight, None)
    none, shift = LinearRegression(True)(weight, None, seen, torch.tensor([], dtype=torch.int64))
    expected = (X[FFN.name].flatten(0, 1) @ weight.double().T).mean(0).float()
    assert none.shape == (HIDDEN, 0)
    torch.testing.assert_close(shift, expected)

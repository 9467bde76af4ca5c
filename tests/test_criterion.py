"""Each criterion against the formula of its docstring, written out as a loop over columns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pruneexp.criterion import ActivationNorm, Flap, FlapOfficial, LlmBip, Magnitude, Random, WandaSp
from pruneexp.evidence import Moments, RunningFluctuation, WindowNorms
from pruneexp.types import Block, ColumnScores, RunError, Site, unit_scores
from tests.cases import each
from tests.toy_sites import activations, block

METRICS = ["WIFV", "IFV", "WIFN"]
BLOCK = block()
X = {site.name: activations(site, 6, 10, seed=site.units) for site in BLOCK.sites}
DATA_FREE = [Random(0), Magnitude("reader", 2), Magnitude("reader", 1), Magnitude("coupled", 1)]
BIP = [LlmBip("l2", "up", "ignore", False), LlmBip("l1", "up_plus_gate", "scale", False)]
NORMS = [ActivationNorm("windows", "none", False), ActivationNorm("tokens", "relative", False)]
FORWARD = [
    WandaSp("sum", True),
    *BIP,
    *NORMS,
    *(Flap(m, False) for m in METRICS),
    *(FlapOfficial(m, False) for m in METRICS),
]


def seen(kind: type, dtype: torch.dtype = torch.float64) -> dict:
    return {site.name: kind.empty(site).update_(X[site.name].to(dtype)) for site in BLOCK.sites}


def summed_by_unit(site: Site, columns: list[float]) -> Tensor:
    return torch.tensor(columns, dtype=torch.float64).reshape(site.units, site.width).sum(1)


def columns_of(block: Block, site: Site) -> list[tuple[Tensor, Tensor]]:
    """(weights of column j [O], what its channel carried [N]) for all j."""
    out_projection, x = block.weights[site.name].out_projection.double(), X[site.name].reshape(-1, site.channels)
    return [(out_projection[:, j], x[:, j]) for j in range(site.channels)]


LOOPS = {
    "WIFV": lambda w, x: (((x - x.mean()) ** 2).sum() / (len(x) - 1) * (w * w).sum()).item(),
    "IFV": lambda w, x: (((x - x.mean()) ** 2).sum() / (len(x) - 1)).item(),
    "WIFN": lambda w, x: (w.abs().sum() / len(w) * ((x * x).sum() / len(x)).sqrt()).item(),
}


@pytest.mark.parametrize("metric", METRICS)
def test_flap(metric):
    scores = Flap(metric, False)(BLOCK, seen(Moments))
    for site in BLOCK.sites:
        columns = [LOOPS[metric](w, x) for w, x in columns_of(BLOCK, site)]
        expected = torch.tensor(columns, dtype=torch.float64)
        torch.testing.assert_close(scores[site.name].columns_C, expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(scores[site.name].scores_U, summed_by_unit(site, columns), rtol=1e-10, atol=0)


@pytest.mark.parametrize("heads", ["sum", "mean"])
def test_wanda_sp(heads):
    scores = WandaSp(heads, True)(BLOCK, seen(Moments))
    for site in BLOCK.sites:
        columns = [LOOPS["WIFN"](w, x) for w, x in columns_of(BLOCK, site)]
        expected = summed_by_unit(site, columns) / (1 if heads == "sum" else site.width)
        torch.testing.assert_close(scores[site.name].scores_U, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("weights", ["none", "relative"])
@pytest.mark.parametrize("average", ["windows", "tokens"])
def test_activation_norm(average, weights):
    scores = ActivationNorm(average, weights, False)(BLOCK, seen(WindowNorms if average == "windows" else Moments))
    for site in BLOCK.sites:
        weight, x_BTC = BLOCK.weights[site.name].out_projection.abs(), X[site.name]
        size = x_BTC.norm(dim=1).mean(0) if average == "windows" else x_BTC.square().mean((0, 1)).sqrt()
        expected = size * (weight / weight.sum(1, keepdim=True)).sum(0) if weights == "relative" else size
        torch.testing.assert_close(scores[site.name].columns_C, expected, rtol=1e-10, atol=0)


def test_window_norms_do_not_depend_on_batches():
    site = BLOCK.sites[0]
    x = X[site.name]
    whole, parts = WindowNorms.empty(site).update_(x), WindowNorms.empty(site)
    for part in x.split([1, 3, 2]):
        parts = parts.merge(WindowNorms.empty(site).update_(part))
    assert whole.n == parts.n == len(x)
    torch.testing.assert_close(whole.mean_C, parts.mean_C, rtol=1e-12, atol=0)
    with pytest.raises(RunError, match="no calibration window was seen"):
        _ = WindowNorms.empty(site).mean_C


@pytest.mark.parametrize("metric", METRICS)
def test_flap_official_has_the_running_estimates_and_squares_attention(metric):
    float32 = block(dtype=torch.float32)
    evidence = seen(RunningFluctuation, torch.float32)
    scores = FlapOfficial(metric, False)(float32, evidence)
    for site in float32.sites:
        w, e = float32.weights[site.name].out_projection, evidence[site.name]
        columns = {
            "WIFV": e.fluctuation_C * torch.sum(w.pow(2), dim=0),
            "IFV": e.fluctuation_C,
            "WIFN": (torch.abs(w) * torch.sqrt(e.scaler_C.reshape(1, -1))).mean(axis=0),
        }[metric]
        columns = columns**2 if site.kind == "attention" else columns
        assert torch.equal(scores[site.name].columns_C, columns)
        assert torch.equal(scores[site.name].scores_U, columns.reshape(site.units, -1).sum(1))


def test_flap_official_wants_a_second_window():
    """Else all scores are 0, none is above AL-AM's threshold, and everything leaves."""
    evidence = {s.name: RunningFluctuation.empty(s).update_(X[s.name][:1]) for s in BLOCK.sites}
    for metric in ("WIFV", "IFV"):
        with pytest.raises(RunError, match="^1 calibration windows: expected at least 2"):
            FlapOfficial(metric, False)(BLOCK, evidence)
    assert FlapOfficial("WIFN", False)(BLOCK, evidence)


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_of_the_reader(p):
    scores = Magnitude("reader", p)(BLOCK, {})
    for site in BLOCK.sites:
        columns = [sum(abs(v) ** p for v in w.tolist()) ** (1 / p) for w, _ in columns_of(BLOCK, site)]
        torch.testing.assert_close(scores[site.name].scores_U, summed_by_unit(site, columns), rtol=1e-10, atol=0)


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_of_all_coupled_weights_is_the_mean_over_matrices(p):
    scores = Magnitude("coupled", p)(BLOCK, {})
    for site in BLOCK.sites:
        weights = BLOCK.weights[site.name]
        for u in range(site.units):
            parts = [w[u] for w in weights.in_projections.values()]
            parts.append(weights.out_projection[:, u * site.width : (u + 1) * site.width])
            expected = sum((part.abs() ** p).sum().item() for part in parts) / len(parts)
            assert scores[site.name][u].item() == pytest.approx(expected, rel=1e-10)


def test_random_depends_on_the_seed_and_the_site_alone():
    alone = Block(BLOCK.name, 0, BLOCK.sites[1:], BLOCK.weights)
    first, again, other = Random(1)(BLOCK, {}), Random(1)(alone, {}), Random(2)(BLOCK, {})
    name = BLOCK.sites[1].name
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    assert first[name].min() >= 0 and first[name].max() < 1
    # the same on every machine and in every process
    assert Random(0)(BLOCK, {})[name][:3].tolist() == pytest.approx(RANDOM_0, abs=1e-12)


RANDOM_0 = [0.10729477126491793, 0.9349447156932376, 0.8677773860545764]


@each("criterion", [*DATA_FREE, *FORWARD])
def test_one_score_per_unit_and_weights_left_alone(criterion):
    before = {name: w.out_projection.clone() for name, w in BLOCK.weights.items()}
    evidence = {} if criterion.evidence is None else seen(criterion.evidence)
    scores = criterion(BLOCK, evidence)
    assert set(scores) == {site.name for site in BLOCK.sites}
    for site in BLOCK.sites:
        assert unit_scores(scores[site.name]).shape == (site.units,)
        assert torch.isfinite(unit_scores(scores[site.name])).all()
        if isinstance(scores[site.name], ColumnScores):
            assert scores[site.name].columns_C.shape == (site.channels,)
    assert all(
        torch.equal(BLOCK.weights[name].out_projection, out_projection) for name, out_projection in before.items()
    )


@each("criterion", [*DATA_FREE[1:], *FORWARD])
def test_a_unit_without_weights_or_signal_scores_lowest(criterion):
    quiet = block()
    evidence = {}
    for site in quiet.sites:
        first = slice(0, site.width)
        quiet.weights[site.name].out_projection[:, first] = 0
        for in_projection in quiet.weights[site.name].in_projections.values():
            in_projection[0] = 0
        x = X[site.name].clone()
        x[..., first] = 0
        evidence[site.name] = None if criterion.evidence is None else criterion.evidence.empty(site).update_(x)
    for score in criterion(quiet, evidence).values():
        assert unit_scores(score).argmin() == 0 and unit_scores(score)[0] == 0


@each("criterion", [*DATA_FREE[1:], *FORWARD])
def test_half_precision_weights_are_widened_first(criterion):
    half = block(dtype=torch.float16)
    wide = Block(half.name, 0, half.sites, {name: _widened(w) for name, w in half.weights.items()})
    evidence = {} if criterion.evidence is None else seen(criterion.evidence)
    for a, b in zip(criterion(half, evidence).values(), criterion(wide, evidence).values(), strict=True):
        assert torch.equal(unit_scores(a), unit_scores(b))


def _widened(weights):
    in_projections = {role: w.float() for role, w in weights.in_projections.items()}
    return type(weights)(in_projections, {}, weights.out_projection.float(), None)


def test_rows_in_chunks_make_no_difference(monkeypatch):
    whole = Magnitude("reader", 2)(BLOCK, {})
    monkeypatch.setattr("pruneexp.criterion.common._CHUNK", 50)
    for name, score in Magnitude("reader", 2)(BLOCK, {}).items():
        torch.testing.assert_close(score.scores_U, whole[name].scores_U, rtol=1e-12, atol=0)

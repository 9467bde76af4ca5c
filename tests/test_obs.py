from __future__ import annotations

import time

import pytest
import torch

from pruneexp.compensator import LeastSquares
from pruneexp.criterion import Obs, obs, spill
from pruneexp.evidence import Gram, Halves
from pruneexp.evidence.held_out import RIDGES, START, chosen_ridge
from pruneexp.types import Block, ConfigError, RunError, Site, SiteWeights
from tests.toy_sites import activations, block, layer_sites

ATTENTION, MLP = layer_sites(0)
BLOCK = block()


def mixed(site: Site, seed: int = 0) -> torch.Tensor:
    x, c = activations(site, 8, 64, seed), site.channels
    mix = torch.randn(c, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / c**0.5
    return x @ (torch.eye(c, dtype=torch.float64) + mix)


SEEN = {site.name: Gram.empty(site).update_(mixed(site)) for site in (ATTENTION, MLP)}


def lost(site: Site, out_projection: torch.Tensor, bias: torch.Tensor | None, keep_C: torch.Tensor) -> float:
    """Squared error per token of a reader on the kept channels, measured on the data (unbiased, as a variance)."""
    x = mixed(site).reshape(-1, site.channels)
    weights = BLOCK.weights[site.name]
    error = x @ weights.out_projection.T - (x[:, keep_C] @ out_projection.T + (0 if bias is None else bias))
    return float(error.square().sum() / (len(x) - 1))


@pytest.mark.parametrize("site", [ATTENTION, MLP], ids=lambda site: site.kind)
@pytest.mark.parametrize("step", [1, 7])
def test_the_cost_is_the_increase_of_the_squared_error(site, step):
    path = Obs(0.0, step, 8, "none", False, 8.0, "site")(BLOCK, SEEN)[site.name]
    assert sorted(path.order_U.tolist()) == list(range(site.units))
    assert (path.cost_U.diff() >= -1e-9).all()
    for removed in range(1, site.units + 1):
        keep_C = site.keep_C(sorted(path.order_U[removed:].tolist()))
        own = BLOCK.weights[site.name].out_projection
        weight, bias = LeastSquares(0.0, "pruned", True, "site")(own, None, SEEN[site.name].copy(), keep_C)
        assert lost(site, weight, bias, keep_C) == pytest.approx(float(path.cost_U[removed - 1]), rel=1e-6)
        torch.testing.assert_close(path.out_projections[removed], (weight, bias))


@pytest.mark.parametrize("site", [ATTENTION, MLP], ids=lambda site: site.kind)
def test_with_a_ridge_the_cost_has_its_penalty_on_the_change_too(site):
    path = Obs(0.3, 1, 8, "none", False, 8.0, "channel")(BLOCK, SEEN)[site.name]
    for removed in (1, site.units // 2, site.units):
        keep_C = site.keep_C(sorted(path.order_U[removed:].tolist()))
        weight, bias = path.out_projections[removed]
        change = -BLOCK.weights[site.name].out_projection
        change[:, keep_C] += weight
        penalty = (change.square() * 0.3 * SEEN[site.name].covariance_CC.diagonal()).sum()
        expected = lost(site, weight, bias, keep_C) + float(penalty)
        assert float(path.cost_U[removed - 1]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("site", [ATTENTION, MLP], ids=lambda site: site.kind)
def test_each_step_takes_the_unit_whose_removal_costs_least(site):
    path = Obs(0.0, 1, 8, "none", False, 8.0, "site")(BLOCK, SEEN)[site.name]
    kept = list(range(site.units))
    for removed in range(min(5, site.units - 1)):
        costs = {}
        for unit in kept:
            keep_C = site.keep_C([u for u in kept if u != unit])
            own = BLOCK.weights[site.name].out_projection
            out_projection = LeastSquares(0.0, "pruned", True, "site")(own, None, SEEN[site.name].copy(), keep_C)
            costs[unit] = lost(site, *out_projection, keep_C)
        assert int(path.order_U[removed]) == min(costs, key=costs.__getitem__)
        kept.remove(int(path.order_U[removed]))


@pytest.mark.parametrize("per", ["site", "channel"])
def test_it_is_the_closed_form_of_a_single_weight(per):
    """w_j^T w_j / [(S + L)^-1]_jj for the unit that leaves first."""
    path = Obs(1e-2, 1, 8, "none", False, 8.0, per)(BLOCK, SEEN)[MLP.name]
    cov = SEEN[MLP.name].covariance_CC
    variance_C = cov.diagonal() if per == "channel" else cov.diagonal().mean().expand(MLP.channels)
    inverse = torch.linalg.inv(cov + 1e-2 * torch.diag(variance_C))
    cost = BLOCK.weights[MLP.name].out_projection.square().sum(0) / inverse.diagonal()
    assert int(path.order_U[0]) == int(cost.argmin())
    assert float(path.cost_U[0]) == pytest.approx(float(cost.min()))


@pytest.mark.parametrize("per", ["site", "channel"])
def test_its_fits_are_those_of_least_squares(per):
    path = Obs(0.1, 1, 8, "none", False, 8.0, per)(BLOCK, SEEN)[MLP.name]
    keep_C = MLP.keep_C(sorted(path.order_U[9:].tolist()))
    own = BLOCK.weights[MLP.name].out_projection
    fitted = LeastSquares(0.1, "pruned", True, per)(own, None, SEEN[MLP.name].copy(), keep_C)
    torch.testing.assert_close(path.out_projections[9], fitted)


def test_output_scale_ends_at_one_and_changes_no_order():
    plain = Obs(1e-9, 1, 8, "none", False, 8.0, "site")(BLOCK, SEEN)
    relative = Obs(1e-9, 1, 8, "output", False, 8.0, "site")(BLOCK, SEEN)
    for site in (ATTENTION, MLP):
        assert torch.equal(plain[site.name].order_U, relative[site.name].order_U)
        assert float(relative[site.name].cost_U[-1]) == pytest.approx(1.0, rel=1e-6)


def test_levels_are_evenly_spaced_and_any_other_is_answered():
    out_projections = Obs(1e-3, 1, 8, "none", False, 8.0, "site")(BLOCK, SEEN)[MLP.name].out_projections
    assert list(out_projections) == [5, 10, 15, 20, 25, 30, 35, 40] and len(out_projections) == 8
    assert (
        out_projections[7][0].shape == (24, 33)
        and out_projections[40][0].shape == (24, 0)
        and 41 not in out_projections
    )
    assert out_projections[0] == (BLOCK.weights[MLP.name].out_projection, None)
    with pytest.raises(KeyError):
        out_projections[41]


def test_duplicated_and_constant_channels_leave_first_and_free():
    x = mixed(MLP)
    x[..., 11], x[..., 20] = 2 * x[..., 30], 5.0
    seen = {**SEEN, MLP.name: Gram.empty(MLP).update_(x)}
    path = Obs(1e-9, 1, 8, "none", False, 8.0, "site")(BLOCK, seen)[MLP.name]
    first = set(path.order_U[:2].tolist())
    assert 20 in first and first & {11, 30}
    assert float(path.cost_U[1]) < 1e-5 * float(path.cost_U[2])
    with pytest.raises(RunError, match=r"^ridge=0\.0: the inputs' covariance is singular"):
        Obs(0.0, 1, 8, "none", False, 8.0, "site")(BLOCK, seen)


def test_a_ridge_that_float32_cannot_tell_from_none_is_one_line():
    """A fit is made of the inverse covariance in float32, long after the scores."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 768, generator=generator, dtype=torch.float64)
    site = Site("wide", "mlp", 0, 768, 1, MLP.cost)
    out_projection = torch.randn(96, 768, generator=generator)
    wide = Block("b", 0, (site,), {"wide": SiteWeights({}, {}, out_projection, None)})
    path = Obs(1e-7, 4, 8, "none", False, 8.0, "channel")(wide, {"wide": Gram.empty(site).update_(x)})["wide"]
    with pytest.raises(RunError, match=r"^ridge=1e-07: .* singular .*; expected a larger ridge"):
        path.out_projections[767]


@pytest.mark.parametrize("width", [1, 6])
def test_an_inverse_that_rounding_has_spoilt_is_one_line(width):
    spoilt = -torch.eye(12, dtype=torch.float64)
    left = obs._RemainingUnits(width, spoilt, torch.ones(3, 12, dtype=torch.float64), 1e-9)
    with pytest.raises(RunError, match=r"^ridge=1e-09: "):
        left.remove_(left.costs_U().argsort()[:1])


def test_a_thousand_channels_take_about_a_second():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 1024, generator=generator, dtype=torch.float64)
    site = Site("wide", "mlp", 0, 1024, 1, MLP.cost)
    out_projection = torch.randn(256, 1024, generator=generator)
    wide = Block("b", 0, (site,), {"wide": SiteWeights({}, {}, out_projection, None)})
    gram = Gram.empty(site).update_(x[None])
    start = time.process_time()
    Obs(1e-3, 4, 8, "none", False, 8.0, "site")(wide, {"wide": gram})
    assert time.process_time() - start < 10  # about 0.6 s alone on one thread


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_the_ridge_is_chosen_for_the_loss_of_a_quarter_of_the_units_or_of_one(groups):
    site = Site("few", "attention", 0, groups, 6, ATTENTION.cost)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, site.channels, generator=generator, dtype=torch.float64)
    weight[:, -6:] *= 0.1  # the last unit gives least
    weight[:, -12:-6] *= 0.3
    block = Block("b", 0, (site,), {"few": SiteWeights({}, {}, weight, None)})
    seen = Halves(Gram).empty(site).update_(mixed(site))
    left = 2 if groups == 6 else 1
    ridge = chosen_ridge(weight, None, seen, torch.arange(6 * (groups - left)), "channel")
    assert (ridge == RIDGES[START] / 2) == (groups == 1), "a single unit leaves nothing to fit"
    auto, expected = (Obs(each, 1, 8, "none", False, 8.0, "channel") for each in ("auto", ridge))
    costs = auto(block, {"few": seen})["few"].cost_U, expected(block, {"few": seen.whole})["few"].cost_U
    torch.testing.assert_close(*costs)


@pytest.mark.parametrize(("key", "settings"), [("step", (0.0, 0, 8)), ("levels", (0.0, 1, 0)), ("ridge", (-1.0, 1, 8))])
def test_settings_that_cannot_be(key, settings):
    with pytest.raises(ConfigError, match=f"^{key}="):
        Obs(*settings, "none", False, 8.0, "site")


# what is kept while a search may ask


@pytest.fixture
def small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of these sizes are counted, and written, as large ones are."""
    monkeypatch.setattr(spill, "SMALL", 0)


def on_disk(tensor: torch.Tensor) -> bool:
    """Whether this process has a file mapped where the tensor lies."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            low, high = (int(end, 16) for end in line.split()[0].split("-"))
            if low <= tensor.data_ptr() < high:
                return "pruneexp-" in line
    return False


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_beyond_the_limit_tensors_are_mapped_files_without_a_name(dtype, small_counts, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    first, second = (torch.randn(30, 20, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    size, before = 600 * dtype.itemsize, spill.held_bytes()
    limit = before + 1.5 * size
    kept, written = spill.spilled(first, limit), spill.spilled(second.T, limit)
    assert kept is first and not on_disk(kept) and spill.held_bytes() == before + size
    assert on_disk(written) and torch.equal(written, second.T) and written.dtype == dtype
    assert not list(tmp_path.iterdir())
    del first, kept  # what is gone makes room
    assert spill.held_bytes() == before and spill.spilled(second, limit) is second


def test_little_memory_changes_no_reader(small_counts):
    ample = Obs(1e-3, 1, 4, "none", False, 8.0, "site")(BLOCK, SEEN)
    tight = Obs(1e-3, 1, 4, "none", False, 0.0, "site")(BLOCK, SEEN)
    for site in (ATTENTION, MLP):
        assert torch.equal(ample[site.name].order_U, tight[site.name].order_U)
        assert on_disk(tight[site.name].out_projections.inverse_CC) and not on_disk(
            ample[site.name].out_projections.inverse_CC
        )
        for removed in range(1, site.units):
            (weight, bias), (again, same) = (
                tight[site.name].out_projections[removed],
                ample[site.name].out_projections[removed],
            )
            assert on_disk(weight) and not on_disk(again)
            assert torch.equal(weight, again) and torch.equal(bias, same)
            assert tight[site.name].out_projections[removed][0] is weight  # probes tell readers apart by what they are


def test_a_full_disk_is_one_line(small_counts, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    with pytest.raises(RunError, match=r"gone: covariances .* cannot be written there .*TMPDIR .*criterion\.memory"):
        Obs(1e-3, 1, 4, "none", False, 0.0, "site")(BLOCK, SEEN)

"""Policy gradients: projections, estimates against the exact gradient of a small problem, and whole searches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pruneexp.calibrate import Meter
from pruneexp.model import Model
from pruneexp.pruning import Method, prune_
from pruneexp.pruning.record import Record
from pruneexp.search import PolicyGradient
from pruneexp.search.gates import projected
from pruneexp.search.policy import policy_gradient
from pruneexp.types import Budget, Candidate, ConfigError, Cost, RunError, Site
from tests.cases import each
from tests.conftest import FAMILIES
from tests.toy_sites import model_sites

BOTH = ["heads", "channels"]
SEARCH = PolicyGradient(1, BOTH, "separate", "scores", "sqrt", 2, 0.05, 5, 1.0, 60, 1)
SITES = model_sites(2, heads=4, channels=12)
TOTAL = sum(site.units * site.cost.params for site in SITES)


class Worth:
    """An oracle whose loss is what the removed channels (not heads) are worth: the first half of each site's, all."""

    def __init__(self, nan: str = "never") -> None:
        self.passes, self.batches, self.nan, self.calls = 0.0, 3, nan, []

    def losses(self, candidates: Sequence[Candidate], batch: int | None = None) -> Tensor:
        self.passes += len(candidates) / self.batches
        self.calls.append(batch)
        losses = []
        for number, candidate in enumerate(candidates):
            lost = 0
            for site in candidate.plan.sites.values():
                lost += sum(1 for u in range(site.units // 2) if u not in site.kept)
            bad = self.nan == "always" or (self.nan == "sometimes" and number == 0 and len(self.calls) % 7 == 0)
            losses.append(math.nan if bad else float(lost))
        return torch.tensor(losses, dtype=torch.float64)


def draws(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {site.name: torch.rand(site.units, generator=generator, dtype=torch.float64) for site in SITES}


@each("seed", range(5))
def test_projection_meets_the_budget_is_idempotent_and_the_nearest_point(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    s = torch.randn(30, generator=draw, dtype=torch.float64) * 0.7 + 0.5
    cost = torch.randint(1, 9, (30,), generator=draw).double()
    most = 0.25 * cost.sum().item()
    inside = projected(s, cost, most)
    within = (s.clamp(0, 1) * cost).sum().item()
    assert (inside * cost).sum().item() == pytest.approx(min(most, within), rel=1e-9)
    assert inside.min() >= 0 and inside.max() <= 1
    torch.testing.assert_close(projected(inside, cost, most), inside, rtol=0, atol=1e-9)
    for _ in range(50):  # no other point of the set is nearer
        other = torch.rand(30, generator=draw, dtype=torch.float64)
        other *= min(1.0, most / (other * cost).sum().item())
        assert (other - s).norm() >= (inside - s).norm()


def test_a_point_within_the_budget_is_only_clamped() -> None:
    s = torch.tensor([-0.5, 0.2, 1.7], dtype=torch.float64)
    assert torch.equal(projected(s, torch.ones(3), 2.0), torch.tensor([0.0, 0.2, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["sqrt", "exact"])
def test_the_estimate_converges_to_the_exact_gradient_of_six_bits(estimator: str) -> None:
    draw = torch.Generator().manual_seed(0)
    s = torch.rand(6, generator=draw, dtype=torch.float64) * 0.8 + 0.1
    table = torch.rand(64, generator=draw, dtype=torch.float64)
    bits = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)

    def expected(p: Tensor) -> Tensor:
        return ((bits * p + (1 - bits) * (1 - p)).prod(1) * table).sum()

    leaf = s.clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(expected(leaf), leaf)
    if estimator == "sqrt":  # the released code's is the exact one, preconditioned
        exact = exact * (s * (1 - s)).sqrt()
    errors = []
    for n in (200, 200_000):
        masks = torch.rand(n, 6, generator=draw, dtype=torch.float64) < s
        losses = table[(masks.long() * torch.tensor([32, 16, 8, 4, 2, 1])).sum(1)]
        estimate = policy_gradient(s, masks, losses, expected(s).item(), n + 1, estimator)
        errors.append(((estimate - exact).norm() / exact.norm()).item())
    assert errors[1] < 0.03 and errors[1] < errors[0] / 5


@pytest.mark.slow
@pytest.mark.parametrize("budgets", ["separate", "joint"])
@pytest.mark.parametrize("estimator", ["sqrt", "exact"])
def test_it_finds_the_units_that_matter_and_meets_the_budget(estimator: str, budgets: str) -> None:
    oracle = Worth("sometimes")
    rate = 0.05 if estimator == "sqrt" else 0.02
    method = replace(SEARCH, estimator=estimator, budgets=budgets, initial="random", rate=rate, steps=400, samples=4)
    budget = Budget(0.4, TOTAL)
    plan = method(draws(), SITES, budget, oracle, torch.Generator().manual_seed(0))
    removed = sum(plan.removed(site) * site.cost.params for site in SITES)
    assert abs(removed - budget.remove) <= min(site.cost.params for site in SITES) / 2 + 1
    worth = sum(1 for s in SITES for u in range(s.units // 2) if u not in plan.sites[s.name].kept)
    assert worth <= 2  # by chance: about six of the sixteen


def test_the_same_seed_gives_the_same_plan_and_batches_go_round() -> None:
    oracle = Worth()
    plans = [SEARCH(draws(), SITES, Budget(0.3, TOTAL), o, torch.Generator().manual_seed(3)) for o in (oracle, Worth())]
    assert plans[0] == plans[1] and oracle.calls == [step % 3 for step in range(60)]


@pytest.mark.parametrize("initial", ["scores", "random"])
def test_blocks_start_from_their_scores(initial: str) -> None:
    sites = [Site(f"model.layers.{i}", "block", i, 1, 0, Cost(10, 10, 1)) for i in range(6)]
    scores = {site.name: torch.tensor([worth]) for site, worth in zip(sites, (3.0, 5, 1, 4, 6, 2), strict=True)}
    equal = Worth()  # no block has a half that matters: nothing is learned
    method = replace(SEARCH, granularity=["blocks"], initial=initial, steps=1)
    plan = method(scores, sites, Budget(0.5, 60), equal, torch.Generator().manual_seed(0))
    left = [site.layer for site in sites if plan.removed(site)]
    assert left == [0, 2, 5] if initial == "scores" else len(left) == 3 and left not in ([0, 1, 2], [0, 2, 5])


def test_steps_are_what_the_passes_pay_for() -> None:
    oracle = Worth()
    replace(SEARCH, passes=10.0, steps=None)(draws(), SITES, Budget(0.3, TOTAL), oracle, torch.Generator())
    assert oracle.passes == pytest.approx(10)


def test_nothing_leaves_for_a_ratio_of_zero_and_no_loss_at_all_is_an_error() -> None:
    plan = SEARCH(draws(), SITES, Budget(0.0, TOTAL), Worth(), torch.Generator())
    assert all(plan.removed(site) == 0 for site in SITES)
    with pytest.raises(RunError, match="the losses of all 120 masks are NaN or Inf"):
        SEARCH(draws(), SITES, Budget(0.3, TOTAL), Worth("always"), torch.Generator())
    with pytest.raises(ConfigError, match=r"^sparsity.ratio=0.99: expected at most 0.\d+"):
        SEARCH(draws(), SITES, Budget(0.99, TOTAL), Worth(), torch.Generator())


def test_settings_that_cannot_be() -> None:
    for name, value in (("samples", 1), ("memory", 0), ("rate", 0.0), ("passes", -1.0), ("steps", 0)):
        with pytest.raises(ConfigError, match=f"^{name}={value}: expected"):
            replace(SEARCH, **{name: value})


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_recipe_runs_on_every_family(
    family: str, tiny: Callable[..., Model], tokens_NT: Tensor, build_from: Callable[..., Any]
) -> None:
    experiment = build_from("recipe=policy_gradient", "search.passes=4")
    method = Method(experiment.criterion, experiment.sparsity, experiment.search, experiment.compensator)
    model, meter = tiny(family), Meter()
    before, cheapest = model.decoder_params, model.sites()[1].cost.params
    prune_(model, tokens_NT, method, 0.3, Record(rng=torch.Generator().manual_seed(0), meter=meter))
    assert abs(before - model.decoder_params - 0.3 * before) <= cheapest / 2 + 1
    assert 4 < meter.forward < 6 and meter.backward == 0  # one for the scores; the last batch of windows is smaller


def test_blocks_may_be_learned_too(
    tiny: Callable[..., Model], tokens_NT: Tensor, build_from: Callable[..., Any]
) -> None:
    chosen = ["search.passes=4", "search.granularity=[blocks]", "criterion=block_influence"]
    experiment = build_from("recipe=policy_gradient", *chosen)
    method = Method(experiment.criterion, experiment.sparsity, experiment.search, experiment.compensator)
    model = tiny("opt")
    prune_(model, tokens_NT, method, 0.3, Record(rng=torch.Generator().manual_seed(0)))
    assert len(model.layers) == 2

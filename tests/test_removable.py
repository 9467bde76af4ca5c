"""Units, whole sublayers and whole layers in one budget; FFN widths in multiples."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pruneexp.search import Evolutionary, Global, Greedy, PolicyGradient, Uniform
from pruneexp.search.gates import Gates
from pruneexp.search.granularity import is_nested, is_plain, removal_steps, scored_as
from pruneexp.search.removable import Removable
from pruneexp.types import Budget, Candidate, ConfigError, Cost, Plan, RemovalPath, RunError, Site
from tests.cases import each
from tests.toy_sites import CHANNEL_COST, HEAD_COST, model_sites, params

RNG = torch.Generator()
UNITS = ["heads", "channels"]
MIXED = [["attention"], ["ffn"], ["attention", "ffn"], ["heads", "ffn"], ["channels", "attention"],
         ["heads", "attention"], ["channels", "ffn"], ["heads", "channels", "ffn"], [*UNITS, "attention", "ffn"],
         ["attention", "ffn", "blocks"], ["heads", "blocks"], ["channels", "blocks"], ["ffn", "blocks"],
         [*UNITS, "blocks"], [*UNITS, "attention", "ffn", "blocks"]]  # fmt: skip
NORMS = 48  # parameters of a block that no unit holds


def with_blocks(sites: Sequence[Site]) -> list[Site]:
    blocks = []
    for layer in sorted({site.layer for site in sites}):
        own = [site for site in sites if site.layer == layer]
        total = Cost(*(sum(s.units * getattr(s.cost, what) for s in own) for what in ("params", "macs", "kv")))
        total = replace(total, params=total.params + NORMS)
        blocks.append(Site(f"model.layers.{layer}", "block", layer, 1, 0, total))
    return [*sites, *blocks]


def draws(sites: Sequence[Site], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = [site for site in sites if site.kind != "block"]
    return {site.name: torch.rand(site.units, generator=generator, dtype=torch.float64) for site in base}


def sites_for(sites: Sequence[Site], granularity: Sequence[str]) -> list[Site]:
    return with_blocks(sites) if "blocks" in granularity else list(sites)


def gone_layers(plan: Plan, sites: Sequence[Site]) -> set[int]:
    return {site.layer for site in sites if site.kind == "block" and plan.removed(site)}


def removed(plan: Plan, sites: Sequence[Site], budget: Budget) -> int:
    return sum(plan.removed(site) * budget.price(site) for site in sites)


class Worth:
    """An oracle: what is gone counts by its size, later layers less."""

    def __init__(self) -> None:
        self.passes, self.batches, self.plans = 0.0, 4, []

    def losses(self, candidates: Sequence[Candidate], batch: int | None = None) -> Tensor:
        self.passes += len(candidates) / (1 if batch is None else self.batches)
        self.plans += [candidate.plan for candidate in candidates]
        return torch.tensor([self._loss(candidate.plan) for candidate in candidates], dtype=torch.float64)

    def _loss(self, plan: Plan) -> float:
        lost = 0.0
        for name, site in plan.sites.items():
            share = 1 - len(site.kept) / site.units
            lost += share * (3 if site.kind == "block" else 1) / (1 + int(name.split(".")[2]))
        return lost


def reachable(sites: Sequence[Site], scores: Any, budget: Budget, method: Any) -> list[int]:
    """Everything that plans may remove, by brute force over the layers."""
    named, priced = set(method.granularity), [site for site in sites if budget.price(site)]
    total = {site.name: scores[site.name].sum().item() for site in sites if site.kind != "block"}
    layers = sorted({site.layer for site in sites})
    own = {layer: [s for s in sites if s.layer == layer and s.kind != "block"] for layer in layers}
    best_block = max(layers, key=lambda layer: sum(total[site.name] for site in own[layer]))
    sums = 1  # bit n: n may leave
    for layer in layers:
        options = 1
        for site in own[layer]:
            if site not in priced:
                continue
            unit, whole = ("heads", "attention") if site.kind == "attention" else ("channels", "ffn")
            alike = [s for s in sites if s.kind == site.kind]
            stays = layer == best_block if "blocks" in named else site is max(alike, key=lambda s: total[s.name])
            multiple = method.multiple if site.kind == "mlp" else 1
            kept = {site.units}
            if unit in named:
                kept |= {k for k in range(method.min_units, site.units) if k % multiple == 0}
            if whole in named and not stays:
                kept.add(0)
            options = _either(options, {(site.units - k) * budget.price(site) for k in kept})
        block = [budget.price(s) for s in sites if s.kind == "block" and s.layer == layer and layer != best_block]
        for price in block if "blocks" in named else ():
            options |= 1 << price
        sums = _either(sums, [n for n in range(options.bit_length()) if options >> n & 1])
    return [n for n in range(sums.bit_length()) if sums >> n & 1]


def _either(sums: int, more: Any) -> int:
    result = 0
    for n in more:
        result |= sums << n
    return result


def check(plan: Plan, method: Any, sites: Sequence[Site], budget: Budget) -> None:
    """What every plan holds to, whatever was searched."""
    out = gone_layers(plan, sites)
    named = set(method.granularity)
    assert plan.budget[f"removed_{budget.counts}"] == removed(plan, sites, budget)
    for site in sites:
        if site.kind == "block":
            continue
        assert (site.name in plan.sites) == (site.layer not in out), "a block takes its sublayers along"
        gone = plan.removed(site)
        unit, whole = ("heads", "attention") if site.kind == "attention" else ("channels", "ffn")
        kept = site.units - gone
        if not gone:
            continue
        assert {unit, whole} & named
        if kept == 0:
            assert whole in named or method.min_units == 0
        else:
            assert unit in named and kept >= method.min_units
            assert site.kind == "attention" or kept % method.multiple == 0
    layers = {site.layer for site in sites}
    assert out < layers
    for kind, name in (("attention", "attention"), ("mlp", "ffn")):
        there = [s for s in sites if s.kind == kind and s.layer not in out and plan.removed(s) < s.units]
        assert there or method.min_units == 0 or name not in named


def cheapest(sites: Sequence[Site], budget: Budget, method: Any) -> int:
    named, prices = set(method.granularity), []
    for site in sites:
        price = budget.price(site)
        if site.kind == "block":
            prices.append(price)
            continue
        unit, whole = ("heads", "attention") if site.kind == "attention" else ("channels", "ffn")
        if unit in named:
            prices.append(price * (method.multiple if site.kind == "mlp" else 1))
        elif whole in named:
            prices.append(price * site.units)
    return min(price for price in prices if price)


def methods(granularity: list[str], min_units: int, multiple: int, seed: int) -> list[Any]:
    normalise = ["none", "zscore", "mean", "per_parameter"][seed % 4]
    budgets = "joint" if is_nested(granularity) or seed % 2 else "separate"
    searches: list[Any] = [Global(min_units, granularity, normalise, multiple)]
    searches.append(PolicyGradient(min_units, granularity, budgets, "scores", "sqrt", 2, 0.05, 5, 1.0, 3, multiple))
    if "blocks" not in granularity:
        searches.append(
            Evolutionary(min_units, granularity, 3.0, 0.25, 1, 0.2, 3, None, multiple, {}, 0.0, "next_token")
        )
    if is_plain(granularity, 1):
        searches.append(Uniform(min_units, granularity, 0.0, 0.0, multiple, alike=False, remainder="nearest"))
    return searches


@pytest.mark.slow
@each("granularity", [UNITS, ["channels"], *MIXED])
def test_the_budget_is_met_to_half_the_cheapest_unit_wherever_that_can_be(granularity: list[str]) -> None:
    met = 0
    for seed in range(25):
        draw = random.Random(seed)
        toy = model_sites(draw.randint(2, 5), draw.randint(1, 6), draw.choice([16, 24, 37, 40]))
        sites, scores = sites_for(toy, granularity), draws(toy, seed)
        counts = draw.choice(["params", "params", "macs", "bytes", "kv_cache"])
        budget = Budget(draw.uniform(0, 0.9), 0, 0, None, counts, draw.choice([0, 50]), 2)
        budget = replace(budget, total=sum(site.units * budget.price(site) for site in toy))
        method = methods(granularity, draw.choice([0, 1, 1, 2]), draw.choice([1, 1, 4, 8, 16]), seed)
        for one in method:
            try:
                plan = one(scores, sites, budget, Worth(), torch.Generator().manual_seed(seed))
            except ConfigError as error:
                assert str(error).startswith(("sparsity.ratio=", "search.granularity=")), error
                continue
            check(plan, one, sites, budget)
            off = abs(removed(plan, sites, budget) - budget.remove)
            slack = cheapest(sites, budget, one) / 2 + 1e-3
            if off > slack and not isinstance(one, Uniform):  # which goes layer by layer
                possible = reachable(sites, scores, budget, one)
                nearest = min(abs(n - budget.remove) for n in possible)
                assert nearest > slack, (seed, one, budget, off, nearest, slack)
            met += off <= slack
    assert met > 20


@pytest.mark.parametrize("granularity", [["attention"], ["ffn"], ["attention", "ffn"]], ids=",".join)
def test_whole_sublayers_leave_by_their_sum_and_ties_remove_more(granularity: list[str]) -> None:
    sites = model_sites(4, heads=4, channels=32)  # a sublayer of heads costs as much as one of channels: 2304
    scores = {site.name: torch.full((site.units,), (1.0 + site.layer) / site.units) for site in sites}
    kinds = {"attention": "attention", "ffn": "mlp"}
    own = [site for site in sites if site.kind in [kinds[name] for name in granularity]]
    for share, count in ((0.4, 0), (0.5, 1), (1.4, 1), (1.5, 2), (2.0, 2)):
        budget = Budget(share * 2304 / params(sites), params(sites))
        method = Global(1, granularity, "none", 1)
        plan = method(scores, sites, budget, None, RNG)
        gone = [site for site in own if not plan.sites[site.name].kept]
        assert {site.name for site in gone} == {s.name for s in sorted(own, key=lambda s: (s.layer, s.name))[:count]}
        assert sum(len(s.kept) for s in plan.sites.values()) == sum(s.units for s in sites) - sum(s.units for s in gone)
    with pytest.raises(
        ConfigError, match=r"^sparsity\.ratio=0\.99: expected at most 0\.\d+, all that search may remove"
    ):
        method(scores, sites, Budget(0.99, params(sites)), None, RNG)


def test_the_best_of_a_kind_stays_and_with_blocks_its_whole_layer() -> None:
    sites = with_blocks(model_sites(3, heads=2, channels=16))
    scores = {site.name: torch.full((site.units,), float(site.layer == 1)) for site in sites if site.kind != "block"}
    most = Budget(0.999, sum(site.cost.params for site in sites if site.kind == "block" and site.layer != 1))
    plan = Global(1, ["attention", "ffn", "blocks"], "zscore", 1)(scores, sites, most, None, RNG)
    assert gone_layers(plan, sites) == {0, 2}
    assert plan.sites["model.layers.1.self_attn"].kept and plan.sites["model.layers.1.mlp"].kept


def test_a_removal_paths_sublayer_is_worth_its_last_cost_and_its_units_what_they_add() -> None:
    sites = model_sites(2, heads=2, channels=4)
    names = [site.name for site in sites]
    scores = {
        names[0]: RemovalPath(torch.tensor([1, 0]), torch.tensor([8.0, 9.0])),  # 17 by sum, 9 in truth
        names[1]: RemovalPath(torch.arange(4), torch.tensor([5.0, 10.0, 15.0, 20.0])),
        names[2]: RemovalPath(torch.tensor([0, 1]), torch.tensor([1.0, 12.0])),
        names[3]: RemovalPath(torch.arange(4), torch.tensor([100.0, 200.0, 300.0, 400.0])),
    }
    budget = Budget(HEAD_COST / params(sites), params(sites))
    assert HEAD_COST == 8 * CHANNEL_COST  # what leaves is worth 9 of attention (17 by sum), or 5 a channel
    plan = Global(1, ["attention", "ffn"], "none", 1)(scores, sites, budget, None, RNG)
    assert [name for name in names if not plan.sites[name].kept] == [names[1]]
    plan = Global(1, ["heads", "attention"], "none", 1)(scores, sites, budget, None, RNG)
    assert plan.sites[names[2]].kept == (1,)  # 1 is less than 8
    plan = Global(1, ["heads", "attention"], "none", 1)(scores, sites, replace(budget, added=HEAD_COST), None, RNG)
    assert plan.sites[names[0]].kept == (0,)  # then 8; the last one there only adds 1, but the other has 11 still
    plan = Global(1, ["heads", "attention"], "none", 1)(scores, sites, replace(budget, added=2 * HEAD_COST), None, RNG)
    assert not plan.sites[names[0]].kept


def test_what_a_composite_still_holds_is_all_that_is_charged() -> None:
    sites = with_blocks(model_sites(3, heads=4, channels=40))
    scores = draws(sites)
    scores["model.layers.0.self_attn"] = torch.tensor([0.0, 0.0, 1e-3, 1e-3]).double()  # two heads leave first
    scores["model.layers.0.mlp"] *= 1e-4
    block = next(site for site in sites if site.kind == "block")
    budget = Budget(block.cost.params / params(sites[:6]), params(sites[:6]))
    plan = Global(2, ["heads", "blocks"], "per_parameter", 1)(scores, sites, budget, None, RNG)
    assert gone_layers(plan, sites) == {0}
    assert plan.budget["removed_params"] == block.cost.params


def test_criteria_may_score_wholes_themselves() -> None:
    sites = with_blocks(model_sites(4, heads=2, channels=16))
    scores = {site.name: torch.tensor([float(i)]) for i, site in enumerate(sites)}
    budget = Budget(0.2, params(sites[:8]))
    plan = Global(1, ["attention", "ffn", "blocks"], "none", 1)(scores, sites, budget, None, RNG)
    assert not gone_layers(plan, sites) and not plan.sites["model.layers.0.self_attn"].kept
    with pytest.raises(RunError, match=r"^model\.layers\.0\.self_attn: \[1\] scores, expected one for each of its 2"):
        Global(1, ["heads", "ffn"], "none", 1)(scores, sites, budget, None, RNG)


@each(
    "units, multiple, min_units, expected",
    [
        (40, 8, 1, [0, 8, 16, 24, 32]),
        (40, 8, 9, [0, 8, 16, 24]),
        (37, 8, 1, [0, 5, 13, 21, 29]),
        (37, 8, 0, [0, 5, 13, 21, 29, 37]),
        (8, 8, 1, [0]),
        (4, 1, 1, [0, 1, 2, 3]),
        (4, 8, 0, [0, 4]),
    ],
)
def test_what_stays_is_a_multiple(units: int, multiple: int, min_units: int, expected: list[int]) -> None:
    site = Site("model.layers.0.mlp", "mlp", 0, units, 1, Cost(72, 72, 0))
    assert removal_steps(site, min_units, multiple) == expected
    everything = removal_steps(site, min_units, multiple, whole=True)
    assert everything == (expected if expected[-1] == units else [*expected, units])
    assert removal_steps(site, min_units, multiple, units=False, whole=True) == [0, units]


@each("multiple, channels", itertools.product([2, 8, 20], [120, 117]))
def test_widths_are_multiples_and_the_lowest_channels_leave(multiple: int, channels: int) -> None:
    sites = model_sites(4, heads=4, channels=channels)
    scores = draws(sites)
    for ratio in (0.1, 0.3, 0.6):
        budget = Budget(ratio, params(sites))
        for method in methods(UNITS, 1, multiple, 0):
            plan = method(scores, sites, budget, Worth(), torch.Generator().manual_seed(0))
            check(plan, method, sites, budget)
            assert abs(removed(plan, sites, budget) - budget.remove) <= min(multiple * CHANNEL_COST, HEAD_COST) / 2
            for site in sites:
                if plan.removed(site) and not isinstance(method, PolicyGradient):
                    kept = list(plan.sites[site.name].kept)
                    gone = [unit for unit in range(site.units) if unit not in kept]
                    assert scores[site.name][kept].min() > scores[site.name][gone].max()


def test_greedy_probes_channels_by_the_bundle_and_composites_beside_them() -> None:
    sites = model_sites(3, heads=2, channels=20)
    scores, oracle = draws(sites), Worth()
    method = Greedy(1, ["channels"], 0, 0, None, "probes", "none", 8)
    budget = Budget(12 * CHANNEL_COST / params(sites), params(sites))
    plan = method(scores, sites, budget, oracle, RNG)
    check(plan, method, sites, budget)
    assert [plan.removed(site) for site in sites if site.kind == "mlp"] == [0, 4, 12]  # first 4, then by 8
    assert len(oracle.plans) == 3 + 3 + 3
    mixed = Greedy(1, ["channels", "attention", "blocks"], 0, 0, None, "probes", "per_parameter", 8)
    blocks = with_blocks(sites)
    for ratio in (0.1, 0.35, 0.6):
        budget = Budget(ratio, params(sites))
        plan = mixed(scores, blocks, budget, Worth(), RNG)
        check(plan, mixed, blocks, budget)
        assert abs(removed(plan, blocks, budget) - budget.remove) <= 8 * CHANNEL_COST / 2


@pytest.mark.slow
@each("granularity", [g for g in MIXED if is_nested(g)])
def test_gates_keep_on_average_what_they_say_and_are_lowered_to_the_budget_once(granularity: list[str]) -> None:
    sites = sites_for(model_sites(3, heads=3, channels=10), granularity)
    whole = sum(s.units * s.cost.params for s in sites if s.kind != "block")
    budget = Budget(0.4, whole)
    gates = Gates(Removable(Global(0, granularity, "none", 1), draws(sites), sites, budget))
    draw = torch.Generator().manual_seed(0)
    s = 0.3 + 0.7 * torch.rand(len(gates.cost), generator=draw, dtype=torch.float64)
    all_open, expected = gates.kept(torch.ones_like(s)), gates.kept(s)
    plans = [gates.plan(torch.rand(len(s), generator=draw) < s) for _ in range(1000)]
    left = torch.tensor([all_open - removed(plan, sites, budget) for plan in plans], dtype=torch.float64)
    assert abs(left.mean().item() - expected) < 4 * (left.std() / len(plans) ** 0.5).item()
    most = 0.5 * expected
    lowered = gates.shifted(s, most)
    assert gates.kept(lowered) == pytest.approx(most, rel=1e-9) and gates.kept(lowered) <= most
    torch.testing.assert_close(gates.shifted(lowered, most), lowered, rtol=0, atol=0)


def test_policy_gradients_learn_gates() -> None:
    class Dear(Worth):
        """FFNs of odd layers are worth much."""

        def _loss(self, plan: Plan) -> float:
            odd = [site for name, site in plan.sites.items() if site.kind == "mlp" and int(name.split(".")[2]) % 2]
            return sum(site.units - len(site.kept) for site in odd) / 10

    sites = model_sites(6, heads=2, channels=16)
    method = PolicyGradient(1, ["ffn"], "joint", "random", "exact", 4, 0.1, 5, 1.0, 300, 1)
    budget = Budget(3 * 16 * CHANNEL_COST / params(sites), params(sites))
    scores = {site.name: torch.full((site.units,), 1.0 + (site.layer == 5)) for site in sites}
    plan = method(scores, sites, budget, Dear(), torch.Generator().manual_seed(0))
    assert [site.layer for site in sites if plan.removed(site)] == [0, 2, 4]


@each(
    "make, message",
    [
        (
            lambda: Uniform(1, ["attention"], 0, 0, 1, alike=False, remainder="nearest"),
            r"^granularity=\['attention'\]: expected heads, channels or both",
        ),
        (
            lambda: Uniform(1, UNITS, 0, 0, 0, alike=False, remainder="nearest"),
            r"^multiple=0: expected an integer >= 1",
        ),
        (lambda: Global(1, ["ffn", "ffn"], "none", 1), r"^granularity=.*: expected one or more of heads, channels"),
        (
            lambda: PolicyGradient(1, ["channels", "ffn"], "separate", "scores", "sqrt", 2, 0.1, 5, 1.0, 3, 1),
            r"^budgets='separate': expected joint with granularity=\['channels', 'ffn'\]",
        ),
        (
            lambda: Evolutionary(1, ["heads", "blocks"], 3.0, 0.25, 1, 0.2, 3, None, 1, {}, 0.0, "next_token"),
            r"^granularity=\['heads', 'blocks'\]: expected blocks alone, or without them",
        ),
    ],
)
def test_settings_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    "method", [Uniform(1, UNITS, 0, 0, 64, alike=False, remainder="nearest"), Global(1, UNITS, "none", 64)], ids=repr
)
def test_a_multiple_wider_than_the_ffn_is_refused(method: Any) -> None:
    sites = model_sites(2, channels=40)
    with pytest.raises(ConfigError, match=r"^search\.multiple=64: expected at most 40, the FFN width"):
        method(draws(sites), sites, Budget(0.2, params(sites)), None, RNG)


def test_what_a_criterion_is_shown() -> None:
    units, wholes = ("attention", "mlp"), ("sublayer", "block")
    assert scored_as(["heads", "blocks"], units) == scored_as(["attention"], units) == "units"
    assert scored_as(["attention", "blocks"], wholes) == scored_as(["blocks"], (*units, *wholes)) == "wholes"
    assert scored_as(["heads"], wholes) is None and scored_as(["blocks"], ("mlp",)) is None
    assert scored_as(["heads", "ffn"], (*units, *wholes)) == "units"


def test_no_order_of_sites_matters_and_mixed_rankings_are_quick() -> None:
    granularity = [*UNITS, "attention", "ffn", "blocks"]
    sites, method = with_blocks(model_sites(3)), Global(1, granularity, "per_parameter", 4)
    scores, budget = draws(sites), Budget(0.4, params(model_sites(3)))
    plans = [method(scores, random.Random(i).sample(sites, len(sites)), budget, None, RNG).to_json() for i in range(3)]
    assert len(set(plans)) == 1

"""Gradients as evidence, and Taylor importance: against autograd by hand, numerical derivatives and plain loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pruneexp.calibrate import Bookmark, Meter, gradient_evidence, walk
from pruneexp.criterion import Taylor
from pruneexp.evidence import Gradient, Moments, PerSampleGradient
from pruneexp.model import Model
from pruneexp.pruning import Method, prune_
from pruneexp.pruning.record import Record
from pruneexp.types import Block, Cost, Site, SiteWeights
from tests.cases import each
from tests.conftest import FAMILIES

ELEMENTS = ("vectorize", "param_first", "param_second", "param_mix")


def loss_of(model: Model, tokens_NT: Tensor) -> Tensor:
    logits = model.module(tokens_NT).logits[:, :-1]  # the model's own loss rounds to float32
    return -logits.log_softmax(-1).gather(-1, tokens_NT[:, 1:, None]).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_autograd_whatever_the_batches(
    family: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model, meter = tiny(family), Meter()
    evidence = gradient_evidence(model, tokens_NT, Gradient, meter)
    assert meter.forward == meter.backward == pytest.approx(1)
    assert all(not p.requires_grad and p.grad is None for p in model.module.parameters())
    for parameter in model.module.parameters():
        parameter.requires_grad_(True)
    loss_of(model, tokens_NT).backward()
    for index in range(len(model.layers)):
        expected = model.block(index, read=lambda p: p.grad)
        for site in expected.sites:
            mine, theirs = evidence[site.name].mean, expected.weights[site.name]
            torch.testing.assert_close(
                mine.out_projection, theirs.out_projection, rtol=1e-3, atol=1e-7
            )  # norms in float32
            assert set(mine.in_projections) == set(theirs.in_projections)
            for role, gradient in mine.in_projections.items():
                torch.testing.assert_close(gradient, theirs.in_projections[role], rtol=1e-3, atol=1e-7)


def test_a_gradient_is_the_numerical_derivative(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model, eps = tiny("opt"), 1e-5
    evidence = gradient_evidence(model, tokens_NT, Gradient, Meter())
    weight = model.layers[1].fc2.weight
    for i, j in ((0, 0), (7, 31), (47, 39)):
        before = weight[i, j].item()
        losses = []
        for step in (eps, -eps):
            with torch.no_grad():
                weight[i, j] = before + step
                losses.append(loss_of(model, tokens_NT).item())
                weight[i, j] = before
        slope = (losses[0] - losses[1]) / (2 * eps)
        assert evidence["model.decoder.layers.1.fc2"].mean.out_projection[i, j].item() == pytest.approx(
            slope, rel=1e-4, abs=1e-9
        )


def test_squares_go_by_window(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model, meter = tiny("llama"), Meter()
    evidence = gradient_evidence(model, tokens_NT, PerSampleGradient, meter)["model.layers.0.self_attn"]
    assert meter.backward == pytest.approx(1) and evidence.n == len(tokens_NT)
    weight = model.layers[0].self_attn.o_proj.weight.requires_grad_(True)
    each = torch.stack([torch.autograd.grad(loss_of(model, window[None]), weight)[0] for window in tokens_NT])
    torch.testing.assert_close(evidence.mean_square.out_projection, each.square().mean(0), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(evidence.mean.out_projection, each.mean(0), rtol=1e-3, atol=1e-7)


def test_the_walk_hands_gradients_out_beside_statistics(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model, meter = tiny("opt"), Meter()
    whole = gradient_evidence(model, tokens_NT, Gradient, Meter())
    for visit in walk(model, tokens_NT, (Moments, Gradient), Bookmark(meter, "test"), read_only=True):
        both = visit.of((Moments, Gradient))
        for site in visit.block.sites:
            moments, gradient = both[site.name]
            assert moments.n == tokens_NT.numel()
            assert torch.equal(gradient.mean.out_projection, whole[site.name].mean.out_projection)
    assert meter.forward == pytest.approx(2) and meter.backward == pytest.approx(1)


def toy(group: int = 3, units: int = 2, rows: int = 4, hidden: int = 5) -> tuple[Block, dict[str, Any]]:
    """A site with grouped queries, and three windows' gradients for it."""
    draw = torch.Generator().manual_seed(0)

    def random() -> SiteWeights:
        shapes = {"query": group * rows, "key": rows, "value": rows}
        in_projections = {
            k: torch.randn(units, n, hidden, generator=draw, dtype=torch.float64) for k, n in shapes.items()
        }
        out_projection = torch.randn(hidden, units * group * rows, generator=draw, dtype=torch.float64)
        return SiteWeights(in_projections, {}, out_projection, None)

    site = Site("model.layers.0.self_attn", "attention", 0, units, group * rows, Cost(1, 1, 1))
    windows = [random() for _ in range(3)]
    block = Block("model.layers.0", 0, (site,), {site.name: random()})
    first, second = Gradient.empty(site), PerSampleGradient.empty(site)
    for window in windows:
        first, second = first.update_(window, 1), second.update_(window, 1)
    return block, {"windows": windows, Gradient: first, PerSampleGradient: second}


@each("members, element", itertools.product(["sum", "mean", "max", "prod", "first", "second"], ELEMENTS))
def test_the_formula_row_by_row_with_a_groups_query_heads_on_its_own_keys(element: str, members: str) -> None:
    block, seen = toy()
    (site,) = block.sites
    criterion = Taylor(element, members, "attention")
    score_U = criterion(block, {site.name: seen[criterion.evidence]})[site.name]
    weights, windows = block.weights[site.name], seen["windows"]

    def importance(pick: Callable[..., Tensor], *at: int) -> float:
        w, gs = pick(weights, *at), torch.stack([pick(window, *at) for window in windows])
        g, a = gs.mean(0), gs.square().mean(0)
        terms = {"vectorize": w * g, "param_first": (w * g).abs(), "param_second": (w * a * w).abs()}
        terms["param_mix"] = (w * g - 0.5 * w * a * w).abs()
        return terms[element].sum().abs().item()

    for unit in range(2):
        total = 0.0
        for row in range(4):
            heads = [4 * head + row for head in range(3)]  # this row in each of the unit's three query heads
            parts = [
                sum(importance(lambda s, u, r: s.in_projections["query"][u, r], unit, r) for r in heads),
                importance(lambda s, u, r: s.in_projections["key"][u, r], unit, row),
                importance(lambda s, u, r: s.in_projections["value"][u, r], unit, row),
                sum(importance(lambda s, u, r: s.out_projection[:, 12 * u + r], unit, r) for r in heads),
            ]
            values = torch.tensor(parts, dtype=torch.float64)
            reduced = {"sum": values.sum(), "mean": values.mean(), "max": values.max(), "prod": values.prod()}
            reduced |= {"first": values[1], "second": values[2]}  # grouped queries: the key, the value
            total += reduced[members].item()
        assert score_U[unit].item() == pytest.approx(total, rel=1e-10)


@each("members", ["sum", "first", "second"])
def test_the_released_fold_adds_query_heads_to_other_groups_and_has_the_out_projection_second(members: str) -> None:
    """Of 2 groups of 3 query heads, head h is added to group h mod 2: 0, 2, 4 to the first. With as many groups as
    heads, and of FFNs, nothing but the second matrix of attention differs."""
    block, seen = toy()
    (site,) = block.sites
    score_U = Taylor("param_first", members, "released")(block, {site.name: seen[Gradient]})[site.name]
    weights, gradient = block.weights[site.name], seen[Gradient].mean
    row = {name: (w * gradient.in_projections[name]).abs().sum(-1) for name, w in weights.in_projections.items()}
    columns = (weights.out_projection * gradient.out_projection).abs().sum(0)
    query, out = (each.reshape(6, 4).sum(1) for each in (row["query"], columns))  # by query head
    key, value = row["key"].sum(1), row["value"].sum(1)
    folded = {"query": query.view(3, 2).sum(0), "out": out.view(3, 2).sum(0)}
    expected = {"sum": key + value + folded["query"] + folded["out"], "first": key, "second": folded["out"]}
    torch.testing.assert_close(score_U, expected[members])

    for kind, groups in (("attention", 1), ("mlp", 1), ("mlp", 3)):
        block, seen = toy(group=groups)
        site = replace(block.sites[0], kind=kind)
        block, evidence = replace(block, sites=(site,)), {site.name: seen[Gradient]}
        ours, theirs = (
            Taylor("param_first", members, how)(block, evidence)[site.name] for how in ("attention", "released")
        )
        assert torch.equal(ours, theirs) == (members != "second" or kind == "mlp")


def test_the_first_matrix_of_a_group_is_the_one_that_it_is_grown_from() -> None:
    """Query and gate, their rows as many as the other matrices'; where there is no gate, up."""
    g = torch.rand(2, 4, 5, dtype=torch.float64)
    for roles in (("query", "key", "value"), ("gate", "up"), ("up",)):
        in_projections = {role: torch.full_like(g, float(n + 1)) for n, role in enumerate(roles)}
        weights = SiteWeights(in_projections, {}, torch.full((5, 8), 9.0, dtype=torch.float64), None)
        seen = Gradient(1, SiteWeights(dict.fromkeys(roles, g), {}, torch.ones(5, 8, dtype=torch.float64), None))
        site = Site("toy", "mlp", 0, 2, 4, Cost(1, 1, 0))
        toy, evidence = Block("toy", 0, (site,), {site.name: weights}), {site.name: seen}
        torch.testing.assert_close(Taylor("param_first", "first", "attention")(toy, evidence)[site.name], g.sum((1, 2)))
        second = 2 * g.sum((1, 2)) if len(roles) > 1 else torch.full((2,), 9.0 * 5 * 4, dtype=torch.float64)
        torch.testing.assert_close(Taylor("param_first", "second", "attention")(toy, evidence)[site.name], second)


def test_removing_a_unit_changes_the_loss_by_the_signed_first_order_sum(
    tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    """vectorize over a reader column is the derivative by the channel's gate: check it on a scaled-down column."""
    model, eps = tiny("opt"), 1e-5
    gradient = gradient_evidence(model, tokens_NT, Gradient, Meter())["model.decoder.layers.2.fc2"].mean
    weight = model.layers[2].fc2.weight
    for j in (0, 17):
        expected = (weight[:, j] * gradient.out_projection[:, j]).sum().item()
        column, losses = weight[:, j].clone(), []
        for step in (eps, -eps):
            with torch.no_grad():
                weight[:, j] = column * (1 + step)
                losses.append(loss_of(model, tokens_NT).item())
                weight[:, j] = column
        assert (losses[0] - losses[1]) / (2 * eps) == pytest.approx(expected, rel=1e-4, abs=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_llm_pruner_runs_on_every_family(
    family: str, tiny: Callable[..., Model], tokens_NT: Tensor, build_from: Callable[..., Any]
) -> None:
    experiment = build_from("recipe=llm_pruner", "sparsity.ratio=0.3", "search.protect_first=0.34")
    method = Method(experiment.criterion, experiment.sparsity, experiment.search, experiment.compensator)
    model, meter = tiny(family), Meter()
    before, cheapest = model.decoder_params, model.sites()[1].cost.params
    pruned = prune_(model, tokens_NT, method, 0.3, Record(meter=meter))
    assert abs(before - model.decoder_params - 0.3 * before) <= cheapest / 2 + 1
    assert all(pruned.plan.removed(site) == 0 for site in pruned.sites if site.layer == 0)
    assert meter.backward == pytest.approx(1)
    assert all(not p.requires_grad and p.grad is None for p in model.module.parameters())


def test_half_precision_gradients_are_kept_in_float32() -> None:
    block, seen = toy()
    half = SiteWeights({}, {}, torch.ones(2, 2, dtype=torch.bfloat16), None)
    assert Gradient.empty(block.sites[0]).update_(half, 3).mean.out_projection.dtype == torch.float32
    with pytest.raises(ValueError, match="one window at a time"):
        PerSampleGradient.empty(block.sites[0]).update_(half, 3)


def test_a_loss_that_is_not_finite_is_named(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    from pruneexp.types import RunError

    model = tiny("llama")
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(RunError, match=r"the calibration loss is NaN or Inf \(batch 0\)"):
        gradient_evidence(model, tokens_NT, Gradient, Meter())
    assert all(not p.requires_grad for p in model.module.parameters())


def test_a_streamed_model_is_refused_before_it_is_loaded(build_from: Callable[..., Any]) -> None:
    from pruneexp.types import ConfigError

    with pytest.raises(ConfigError, match=r"^model.stream=True: criterion=taylor needs backward passes"):
        build_from("criterion=taylor", "model.stream=true", "evaluator=[size]", "search=uniform")

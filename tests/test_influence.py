"""Influence functions: the exact removal cost on least squares, differences against double differentiation, costs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pruneexp.calibrate import Landscape, Meter, gradient_evidence, influence_evidence
from pruneexp.criterion import Ifso, Obs
from pruneexp.evidence import BatchDerivatives, GateDerivatives, Gradient, Gram, Influence
from pruneexp.experiment.preflight import prepare
from pruneexp.model import Model
from pruneexp.pruning import Method, prune_
from pruneexp.pruning.record import Record
from pruneexp.surgery import shrink_
from pruneexp.types import Block, ConfigError, Cost, Plan, RunError, Site, SitePlan, SiteWeights
from tests.cases import each
from tests.conftest import FAMILIES
from tests.toy_sites import block

KIND = Influence("together", "coupled", "exact", 1e-2, "damping", 1e-4, 10, None, 1)
CRITERION = Ifso("retraining", "together", "coupled", "finite_difference", 1e-2, "damping", 1e-4, 10, None, 2, "params")
APART = replace(KIND, directions="apart", weights="readers", inverse="conjugate_gradient", damping=0.0, steps=200)
CPU = torch.device("cpu")


# Least squares: one reader, Y = X W^T + noise, W fitted


def least_squares(width: int, outputs: int = 5, units: int = 8) -> tuple[Site, Tensor, Tensor, Tensor]:
    """A site, its inputs [N, C], centred and mixed; the wanted output; the reader that fits it best."""
    draw = torch.Generator().manual_seed(0)
    site = Site("toy", "mlp", 0, units, width, Cost(1, 1, 0))
    x = torch.randn(300, site.channels, generator=draw, dtype=torch.float64)
    x = x @ (torch.eye(site.channels) + 0.3 * torch.randn(site.channels, site.channels, generator=draw)).double()
    x = x - x.mean(0)
    y = x @ torch.randn(site.channels, outputs, generator=draw, dtype=torch.float64)
    y = y + 0.5 * torch.randn(300, outputs, generator=draw, dtype=torch.float64)
    return site, x, y - y.mean(0), torch.linalg.lstsq(x, y - y.mean(0)).solution.T.contiguous()


def landscape(kind: Influence, width: int) -> tuple[Landscape, Site, Tensor, Tensor, Tensor]:
    """The squared error of one window of 300 tokens, over the 299 of an unbiased covariance."""
    site, x, y, out_projection = least_squares(width)
    out_projection.requires_grad_(True)

    def loss(gates_BU: Tensor, batch: Tensor) -> Tensor:
        gated = x * gates_BU[0].repeat_interleave(width)
        return (gated @ out_projection.T - y).square().sum() / (len(x) - 1)

    made = Landscape(loss, [torch.zeros(1, 1)], [out_projection], site.units, kind, CPU, lambda *_: None)
    return made, site, x, y, out_projection


def survivors(width: int) -> Callable[[int, list[Tensor]], None]:
    def silenced(unit: int, tensors: list[Tensor]) -> None:
        tensors[0][:, unit * width : (unit + 1) * width] = 0

    return silenced


def scored(derivatives: BatchDerivatives, site: Site, **settings: Any) -> Tensor:
    only = Block("toy", 0, (site,), {})
    return replace(CRITERION, scale="none", **settings)(only, {site.name: GateDerivatives((derivatives,))})[site.name]


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("hessian", ["exact", "finite_difference"])
def test_on_least_squares_the_score_is_the_exact_cost_of_removal_the_survivors_fitted_anew(
    hessian: str, width: int
) -> None:
    made, site, x, y, out_projection = landscape(replace(APART, hessian=hessian), width)
    score_U = scored(made.apart(survivors(width)), site, score="loss")
    full, costs = (x @ out_projection.detach().T - y).square().sum(), []
    for unit in range(site.units):
        keep_C = site.keep_C([u for u in range(site.units) if u != unit])
        fitted = torch.linalg.lstsq(x[:, keep_C], y).solution
        costs.append((x[:, keep_C] @ fitted - y).square().sum() - full)
    expected = torch.stack(costs) / (len(x) - 1)
    torch.testing.assert_close(score_U, expected, rtol=1e-6, atol=1e-9)

    weights = {site.name: SiteWeights({}, {}, out_projection.detach(), None)}
    gram = Gram.empty(site).update_(x[None])
    path = Obs(0.0, 1, 8, "none", False, 8.0, "site")(Block("toy", 0, (site,), weights), {site.name: gram})[site.name]
    assert int(path.order_U[0]) == int(score_U.argmin())
    assert float(score_U.min()) == pytest.approx(float(path.cost_U[0]), rel=1e-6)


def test_with_a_units_own_weights_free_nothing_is_lost() -> None:
    """Gates and a reader's columns say the same twice: H_mm = H_mw H_ww^-1 H_wm at a minimum."""
    made, site, x, _, out_projection = landscape(replace(APART, directions="together"), 1)
    derivatives = made.together()
    row_sums = (2 * (out_projection.T @ out_projection) * (x.T @ x) / (len(x) - 1)).sum(1)
    torch.testing.assert_close(derivatives.retraining_U, row_sums.detach(), rtol=1e-6, atol=1e-9)
    assert scored(derivatives, site, score="retraining").tolist() == pytest.approx(
        derivatives.retraining_U.abs().tolist()
    )


def test_conjugate_gradients_solve_and_stop_where_the_curvature_is_not_positive() -> None:
    made, *_ = landscape(replace(APART, damping=0.1), 1)
    u = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (answer,) = made._answer([u], None)
    _, (bent,), _ = made.along(weights=[u])
    damping = 0.1 * (bent * u).sum() / u.square().sum()
    _, (again,), _ = made.along(weights=[answer])
    torch.testing.assert_close(again + damping * answer, u, rtol=1e-8, atol=1e-10)
    made.loss = lambda gates, batch: -(made.weights[0] * gates[0]).square().sum()  # a hill: nothing can be said
    assert made._answer([u], None)[0].abs().sum() == 0


# The model


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_have_the_gradient_of_their_columns(family: str, tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model = tiny(family)
    evidence = influence_evidence(model, tokens_NT, KIND, Meter())
    exact = gradient_evidence(model, tokens_NT, Gradient, Meter())
    windows = [gradient_evidence(model, window[None], Gradient, Meter()) for window in tokens_NT]
    for index in range(len(model.layers)):
        for site in model.block(index).sites:
            out_projection = model.block(index).weights[site.name].out_projection

            def slope_U(gradient: Any, out_projection: Tensor = out_projection, site: Site = site) -> Tensor:
                return (gradient[site.name].mean.out_projection * out_projection).sum(0).reshape(site.units, -1).sum(1)

            (part,) = evidence[site.name].parts
            torch.testing.assert_close(part.slope_U, slope_U(exact), rtol=1e-3, atol=1e-6)
            fisher_U = torch.stack([slope_U(each) for each in windows]).square().mean(0)
            torch.testing.assert_close(part.curvature_U, fisher_U, rtol=1e-3, atol=1e-9)


@each(
    "family, weights, inverse",
    itertools.product(FAMILIES, ["coupled", "readers"], ["damping", "conjugate_gradient"]),
)
def test_finite_differences_are_near_the_exact_derivatives_and_weights_stay_to_the_bit(
    family: str, weights: str, inverse: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model = tiny(family)
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    by_hessian = []
    for hessian in ("exact", "finite_difference"):
        # OPT: so short that no kink of a ReLU is passed; the others' norms, in float32, drown a step so short
        step = 1e-6 if family == "opt" else 3e-3
        kind = replace(KIND, hessian=hessian, weights=weights, inverse=inverse, damping=0.5, steps=3, step=step)
        by_hessian.append(influence_evidence(model, tokens_NT[:4], kind, Meter()))
    for name, evidence in by_hessian[0].items():
        (exact,), (near,) = evidence.parts, by_hessian[1][name].parts
        for one, other in ((exact.retraining_U, near.retraining_U), (exact.slope_U, near.slope_U)):
            assert (one - other).norm() <= (1e-4 if family == "opt" else 0.03) * one.norm(), name
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())
    assert all(not p.requires_grad and p.grad is None for p in model.module.parameters())
    for layer in model.layers:
        assert all(not module._forward_pre_hooks for module in layer.modules())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_unit_apart_leaves_its_own_weights_alone(family: str, tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    """The diagonal by hand, from a Hessian that autograd gives whole: one channel, the readers of a single layer."""
    model = tiny(family)
    few = {s.name: SitePlan(s.kind, s.units, tuple(range(8))) for s in model.sites() if s.kind == "mlp"}
    shrink_(model, Plan(few))  # each unit of any site has passes of its own
    tokens, sites = tokens_NT[:2, :8], model.sites()
    kind = replace(APART, inverse="damping", damping=1.0, weights="coupled")
    evidence = influence_evidence(model, tokens, kind, Meter())
    site = sites[0]
    (part,) = evidence[site.name].parts
    layer = model.layers[0]
    out_projection = layer.get_submodule(model.family.attention_out)
    column = out_projection.weight.data.clone()
    u: list[Tensor] = []
    for sign in (1, -1):  # the gradient of every weight, with the unit's columns scaled
        out_projection.weight.data = column.clone()
        out_projection.weight.data[:, : site.width] *= 1 + sign * 1e-4
        gradients = gradient_evidence(model, tokens, Gradient, Meter())
        for other in sites:
            g = gradients[other.name].mean
            parts = [*g.in_projections.values(), g.out_projection.clone()]
            if other is site:  # the unit's own rows and columns are not tuned
                parts = [rows.clone() for rows in parts]
                for rows in parts[:-1]:
                    rows[0] = 0
                parts[-1][:, : site.width] = 0
            flat = torch.cat([rows.flatten() for rows in parts])
            u = [*u, flat]
    out_projection.weight.data = column
    half = len(u) // 2
    expected = sum(((a - b) / 2e-4).square().sum() for a, b in zip(u[:half], u[half:], strict=True))
    assert part.retraining_U[0].item() == pytest.approx(float(expected), rel=2e-2)


def test_any_batch_size_and_the_parts_of_the_windows(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    kind = replace(KIND, batches=2, windows=8)
    many, few = (influence_evidence(tiny("opt", batch_size=n), tokens_NT, kind, Meter()) for n in (10, 1))
    halves = [influence_evidence(tiny("opt"), part, KIND, Meter()) for part in (tokens_NT[:4], tokens_NT[4:8])]
    for name, evidence in many.items():
        assert len(evidence.parts) == 2
        for number, part in enumerate(evidence.parts):
            for other in (few[name].parts[number], halves[number][name].parts[0]):
                torch.testing.assert_close(part.retraining_U, other.retraining_U, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "forward", "backward"),
    [
        ({"hessian": "finite_difference"}, 4, 4),
        ({"hessian": "exact"}, 2, 6),
        ({"hessian": "exact", "windows": 5}, 1, 3),
        ({"hessian": "exact", "inverse": "conjugate_gradient", "damping": 5.0, "steps": 2}, 4, 12),
    ],
    ids=str,
)
def test_passes_are_counted(
    settings: dict[str, Any], forward: float, backward: float, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    meter = Meter()
    influence_evidence(tiny("opt"), tokens_NT, replace(KIND, **settings), meter)
    assert (meter.forward, meter.backward) == (pytest.approx(forward), pytest.approx(backward))


# The criterion


def test_the_scores_of_several_parts() -> None:
    toy = block()
    made = [
        [torch.randn(3, site.units, generator=torch.Generator().manual_seed(n)) for n in (1, 2)] for site in toy.sites
    ]
    evidence = {}
    for site, parts in zip(toy.sites, made, strict=True):
        evidence[site.name] = GateDerivatives(())
        for part in parts:
            evidence[site.name] = evidence[site.name].update_(BatchDerivatives(*part))
    for scale, power in (("none", 0.0), ("params", 0.5), ("macs", 0.5)):
        sizes = replace(CRITERION, scale=scale)(toy, evidence)
        changes = replace(CRITERION, scale=scale, score="loss")(toy, evidence)
        for site, (a, b) in zip(toy.sites, made, strict=True):
            saved = (site.cost.macs if scale == "macs" else site.cost.params) ** power
            torch.testing.assert_close(sizes[site.name], (a[2].abs() + b[2].abs()) / 2 / saved)
            mean = (a + b) / 2
            torch.testing.assert_close(changes[site.name], ((mean[1] - mean[2]) / 2 - mean[0]) / saved)
    with pytest.raises(RunError, match="0 calibration windows"):
        CRITERION(toy, {site.name: GateDerivatives(()) for site in toy.sites})


def test_settings_that_cannot_be() -> None:
    for name, value in (("step", 0.0), ("damping", 0.0), ("steps", 0), ("windows", 0), ("batches", 0)):
        with pytest.raises(ConfigError, match=f"^{name}={value}: expected"):
            replace(CRITERION, **{name: value})
    replace(CRITERION, damping=0.0, inverse="conjugate_gradient")


@pytest.mark.slow
@pytest.mark.parametrize("score", ["retraining", "loss"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_recipe_runs_on_every_family(
    family: str, score: str, tiny: Callable[..., Model], tokens_NT: Tensor, build_from: Callable[..., Any]
) -> None:
    experiment = build_from("recipe=ifso", f"criterion.score={score}")
    method = Method(experiment.criterion, experiment.sparsity, experiment.search, experiment.compensator)
    model, meter = tiny(family), Meter()
    before, cheapest = model.decoder_params, model.sites()[1].cost.params
    prune_(model, tokens_NT, method, 0.3, Record(meter=meter))
    assert abs(before - model.decoder_params - 0.3 * before) <= cheapest / 2 + 1
    assert meter.forward == meter.backward == pytest.approx(4)
    assert torch.isfinite(model.token_losses(tokens_NT, 5)).all()


def test_what_cannot_be_had_is_refused(
    tiny: Callable[..., Model], tokens_NT: Tensor, build_from: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"^model.stream=True: criterion=ifso needs backward passes"):
        build_from("recipe=ifso", "model.stream=true", "evaluator=[size]")
    with pytest.raises(ConfigError, match=r"^model.dtype='bfloat16': its rounding hides the finite differences of"):
        build_from("recipe=ifso", "model.dtype=bfloat16")
    build_from("recipe=ifso", "model.dtype=bfloat16", "criterion.hessian=exact")
    tiny("llama", dtype="bfloat16").module.save_pretrained(tmp_path / "stored")
    with pytest.raises(ConfigError, match=r"^model.dtype='bfloat16': its rounding hides the finite differences of"):
        prepare(build_from("recipe=ifso", "model=hf", f"model.path={tmp_path / 'stored'}"))
    with pytest.raises(RunError, match="need the whole model in memory"):
        influence_evidence(tiny("opt", stream=True), tokens_NT, KIND, Meter())
    half = tiny("opt", dtype="bfloat16")
    with pytest.raises(RunError, match=r"^model.dtype=bfloat16: its rounding hides finite differences"):
        influence_evidence(half, tokens_NT, replace(KIND, hessian="finite_difference"), Meter())
    evidence = influence_evidence(half, tokens_NT[:2], KIND, Meter())
    assert all(torch.isfinite(e.parts[0].retraining_U).all() for e in evidence.values())
    model = tiny("llama")
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(RunError, match=r"the calibration loss is NaN or Inf \(batch 0\)"):
        influence_evidence(model, tokens_NT, KIND, Meter())
    assert all(not p.requires_grad for p in model.module.parameters())

"""Gradients by forward passes: slopes are g.z, estimates converge, weights stay what they were to the bit."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pruneexp.calibrate import Bookmark, Meter, Slopes, gradient_evidence, perturbed, walk
from pruneexp.criterion import MiniLlm
from pruneexp.evidence import DirectionalGradient, Gradient, InputMoments, Moments, Perturbation
from pruneexp.model import Model
from pruneexp.pruning import Method, prune_
from pruneexp.pruning.record import Record
from pruneexp.types import ConfigError, Cost, RunError, Site, SiteWeights
from tests.cases import each
from tests.conftest import FAMILIES
from tests.toy_sites import activations, block

KIND = Perturbation("weights", 3, 1e-4, "gaussian", "multiply", None, 0)
CRITERION = MiniLlm("spsa", "weights", "l2", "sum", 4, 1e-3, "gaussian", "multiply", 5, 0)
QUIET: dict[str, Any] = {
    "rng": torch.Generator(),
}


@each(
    "distribution, over, family", itertools.product(["gaussian", "rademacher"], ["weights", "gates"], ["opt", "bloom"])
)
def test_a_slope_is_the_gradient_along_the_direction(
    family: str, over: str, distribution: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model, meter = tiny(family), Meter()
    # so many weights move at once that the third derivative and kinks show at larger steps
    kind = replace(KIND, perturb=over, distribution=distribution, epsilon=1e-6)
    slopes = Slopes(model, tokens_NT, kind, meter)
    assert meter.forward == pytest.approx(6) and meter.backward == 0
    exact = gradient_evidence(model, tokens_NT, Gradient, Meter())
    for number, slope in slopes.values.items():
        expected = 0.0
        for index in range(len(model.layers)):
            block = model.block(index)
            for name, z in slopes._directions(block, number).items():
                g, weights = exact[name].mean, block.weights[name]
                if over == "gates":
                    gates_U = (g.out_projection * weights.out_projection).sum(0).reshape(len(z), -1).sum(1)
                    expected += (gates_U * z).sum().item()
                else:
                    expected += (g.out_projection * z.out_projection).sum().item()
                    expected += sum(
                        (g.in_projections[role] * z.in_projections[role]).sum().item() for role in g.in_projections
                    )
        assert slope == pytest.approx(expected, rel=1e-2, abs=2e-3)


@each("family, over", itertools.product(FAMILIES, ["weights", "gates"]))
def test_weights_and_logits_are_restored_to_the_bit_even_after_an_error(
    over: str, family: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model, kind = tiny(family, dtype="bfloat16"), replace(KIND, perturb=over, epsilon=0.05)
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    with torch.no_grad():
        logits = model.module(tokens_NT).logits
        with perturbed(model, kind, 0, 0.05):
            assert not torch.equal(model.module(tokens_NT).logits, logits)
        with contextlib.suppress(ZeroDivisionError), perturbed(model, kind, 0, 0.05):
            handle = model.layers[1].register_forward_hook(lambda *_: 1 / 0)
            model.module(tokens_NT)
        handle.remove()
        assert torch.equal(model.module(tokens_NT).logits, logits)
    assert all(torch.equal(p, before[name]) for name, p in model.module.named_parameters())
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in model.layers)


def test_gates_in_half_precision_are_rounded_once_and_small_steps_refused(
    tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model, kind = tiny("llama", dtype="bfloat16"), replace(KIND, perturb="gates", epsilon=0.01)
    seen: list[Tensor] = []
    out_projection = model.layers[0].get_submodule("self_attn.o_proj")
    with torch.no_grad():
        out_projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
        model.module(tokens_NT)
        with perturbed(model, kind, 0, 0.01):
            out_projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
            model.module(tokens_NT)
    site = model.sites()[0]
    z_U = kind.draw(0, site.name, torch.Size([site.units]), model.device).double()
    expected = seen[0] * (1 + 0.01 * z_U).repeat_interleave(site.width)
    assert ((seen[-1] - expected).abs() <= 1.001 * 2**-8 * expected.abs()).all()  # half of bfloat16's last place
    with pytest.raises(RunError, match=r"^criterion.epsilon=0.001: expected at least 0.0078 for gates in bfloat16"):
        Slopes(model, tokens_NT, replace(kind, epsilon=1e-3), Meter())


@pytest.mark.parametrize("over", ["weights", "gates"])
def test_a_streamed_model_gives_the_same_slopes(over: str, tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    kind = replace(KIND, perturb=over, windows=4)
    held = Slopes(tiny("llama"), tokens_NT, kind, Meter())
    model, meter = tiny("llama", stream=True), Meter()
    streamed = Slopes(model, tokens_NT, kind, meter)
    assert streamed.values == pytest.approx(held.values, rel=1e-6)
    assert meter.forward == pytest.approx(3 * 2 * 4 / 10)
    with model.loaded(1):
        gradient = streamed.of(model.block(1))["model.layers.1.mlp"]
    out_projection = held.of(held.model.block(1))["model.layers.1.mlp"].total.out_projection
    torch.testing.assert_close(gradient.total.out_projection, out_projection, rtol=1e-5, atol=1e-7)


def quadratic(p: int = 6) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A quadratic loss of p weights with its gradient at zero."""
    draw = torch.Generator().manual_seed(0)
    root, g = (
        torch.randn(p, p, generator=draw, dtype=torch.float64),
        torch.randn(p, generator=draw, dtype=torch.float64),
    )
    return g, lambda w: 0.5 * w @ (root @ root.T) @ w + g @ w


def estimate(kind: Perturbation, directions: int, epsilon: float = 0.3) -> Tensor:
    site = Site("toy", "mlp", 0, 6, 1, Cost(1, 1, 0))
    _, loss = quadratic()
    gradient = kind.empty(site)
    for number in range(directions):
        z = kind.draw(number, site.name, torch.Size([6]), torch.device("cpu")).double()
        slope = (loss(epsilon * z) - loss(-epsilon * z)).item() / (2 * epsilon)
        assert slope == pytest.approx((quadratic()[0] @ z).item(), rel=1e-9)  # exact on a quadratic, for any step
        gradient = gradient.update_(z, slope)
    return gradient.gates_U


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_the_estimate_converges_to_the_gradient(distribution: str) -> None:
    g, _ = quadratic()
    kind = replace(KIND, perturb="gates", distribution=distribution)
    errors = [(estimate(kind, n) - g).norm() / g.norm() for n in (30, 3000)]
    assert errors[1] < 0.08 and errors[1] < errors[0] / 3


def test_dividing_is_multiplying_for_signs_and_blows_up_for_gaussians() -> None:
    g, _ = quadratic()
    signs = replace(KIND, perturb="gates", distribution="rademacher")
    torch.testing.assert_close(estimate(signs, 50), estimate(replace(signs, estimate="divide"), 50))
    gaussian = replace(KIND, perturb="gates")
    off = [(estimate(replace(gaussian, estimate=how), 500) - g).norm() for how in ("multiply", "divide")]
    assert off[1] > 3 * off[0]


def test_directions_differ_by_number_name_and_seed_alone() -> None:
    shape, cpu = torch.Size([5]), torch.device("cpu")
    first = KIND.draw(0, "a", shape, cpu)
    assert torch.equal(first, replace(KIND, epsilon=1.0).draw(0, "a", shape, cpu))
    others = [
        KIND.draw(1, "a", shape, cpu),
        KIND.draw(0, "b", shape, cpu),
        replace(KIND, seed=1).draw(0, "a", shape, cpu),
    ]
    assert all(not torch.equal(first, other) for other in others)


def test_settings_that_cannot_be() -> None:
    for name, value in (("directions", 0), ("epsilon", 0.0), ("windows", 0)):
        with pytest.raises(ConfigError, match=f"^{name}={value}: expected"):
            replace(CRITERION, **{name: value})


def test_a_direction_without_a_loss_is_left_out_and_none_at_all_is_an_error(
    tiny: Callable[..., Model], tokens_NT: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    losses = iter([torch.tensor(x) for x in (1.0, torch.nan, 3.0, 1.0, torch.inf, 1.0)])
    monkeypatch.setattr(Model, "token_losses", lambda *_: next(losses))
    assert set(Slopes(model, tokens_NT, KIND, Meter()).values) == {1}
    monkeypatch.setattr(Model, "token_losses", lambda *_: torch.tensor(torch.nan))
    with pytest.raises(RunError, match="all 3 directions gave losses that are NaN or Inf"):
        Slopes(model, tokens_NT, KIND, Meter())


def evidence_for(toy: Any) -> tuple[dict[str, tuple[Any, ...]], dict[str, tuple[Tensor, Tensor, SiteWeights]]]:
    """Moments, a gradient and input moments for each site; and the tensors they were made of."""
    evidence, made = {}, {}
    for site in toy.sites:
        weights = toy.weights[site.name]
        g = SiteWeights(
            {k: w.roll(1, -1) for k, w in weights.in_projections.items()}, {}, weights.out_projection.roll(1, 0), None
        )
        x, inputs = activations(site, 3, 5), activations(toy.sites[0], 3, 5, seed=8)
        gradient = DirectionalGradient(2, g, False)
        moments = (Moments.empty(site).update_(x), InputMoments.empty(site).update_(inputs))
        evidence[site.name] = (moments[0], gradient, moments[1])
        made[site.name] = (x.flatten(0, 1), inputs.flatten(0, 1), g)
    return evidence, made


@each("members, tokens", itertools.product(["sum", "max", "mean"], ["l2", "mean"]))
def test_the_formula_unit_by_unit(tokens: str, members: str) -> None:
    toy = block()
    evidence, made = evidence_for(toy)
    scores = replace(CRITERION, tokens=tokens, members=members)(toy, evidence)
    for site in toy.sites:
        x, inputs, g = made[site.name]
        a, b = ((t.square().mean(0).sqrt() if tokens == "l2" else t.mean(0).abs()) for t in (x, inputs))
        weights = toy.weights[site.name]
        for unit in range(site.units):
            columns = slice(unit * site.width, (unit + 1) * site.width)
            parts = [
                (w[unit] * g.in_projections[role][unit] / 2).abs().mul(b).sum()
                for role, w in weights.in_projections.items()
            ]
            parts.append(
                (weights.out_projection[:, columns] * g.out_projection[:, columns] / 2).abs().mul(a[columns]).sum()
            )
            stacked = torch.stack(parts)
            reduced = {"sum": stacked.sum(), "max": stacked.max(), "mean": stacked.mean()}[members]
            torch.testing.assert_close(scores[site.name][unit], reduced, rtol=1e-10, atol=0)


def test_gates_with_the_exact_gradient_are_the_signed_sum_over_the_unit() -> None:
    toy = block()
    evidence, made = evidence_for(toy)
    for site in toy.sites:
        x, _, g = made[site.name]
        exact = {site.name: (evidence[site.name][0], Gradient(2, g))}
        alone = replace(toy, sites=(site,))
        score_U = replace(CRITERION, perturb="gates", gradient="exact")(alone, exact)[site.name]
        signed_U = (toy.weights[site.name].out_projection * g.out_projection / 2).sum(0).reshape(site.units, -1).sum(1)
        rms_U = x.square().mean(0).reshape(site.units, -1).mean(1).sqrt()
        torch.testing.assert_close(score_U, signed_U.abs() * rms_U, rtol=1e-10, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_writer_inputs_are_what_the_projections_read(
    family: str, tiny: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model, seen = tiny(family), []
    path = model.family.attention_in[0].path
    handle = model.layers[0].get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.module(tokens_NT)
    handle.remove()
    visit = next(walk(model, tokens_NT, (InputMoments,), Bookmark(Meter(), "test"), read_only=True))
    moments = visit.of(InputMoments)[visit.block.sites[0].name]
    torch.testing.assert_close(moments.mean_square_C, seen[0].flatten(0, 1).square().mean(0), rtol=1e-9, atol=0)
    assert moments.n == tokens_NT.numel()


@pytest.mark.slow
@each("setting, family", itertools.product(["perturb=weights", "perturb=gates", "gradient=exact"], FAMILIES))
def test_mini_llm_runs_on_every_family(
    family: str, setting: str, tiny: Callable[..., Model], tokens_NT: Tensor, build_from: Callable[..., Any]
) -> None:
    overrides = ["recipe=mini_llm", "criterion.directions=4", "criterion.windows=5", f"criterion.{setting}"]
    experiment = build_from(*overrides)
    method = Method(experiment.criterion, experiment.sparsity, experiment.search, experiment.compensator)
    model, meter = tiny(family), Meter()
    before, cheapest = model.decoder_params, model.sites()[1].cost.params
    prune_(model, tokens_NT, method, 0.3, Record(meter=meter, **QUIET))
    assert abs(before - model.decoder_params - 0.3 * before) <= cheapest / 2 + 1
    exact = setting == "gradient=exact"
    assert meter.backward == pytest.approx(1 if exact else 0)
    assert meter.forward == pytest.approx(2 if exact else 1 + 4 * 2 * 0.5)


def test_the_exact_gradient_of_a_streamed_model_is_refused(build_from: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"^model.stream=True: criterion=mini_llm_exact needs backward passes"):
        build_from("criterion=mini_llm_exact", "model.stream=true", "evaluator=[size]", "search=uniform")
    build_from("criterion=mini_llm", "model.stream=true", "evaluator=[size]", "search=uniform")

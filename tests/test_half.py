"""Half precision on processors that cannot multiply it: widened where that pays, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import pruneexp
from pruneexp.model import half
from pruneexp.model.half import WideLinear, plain_linear

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
TOKENS = half.LEAST_TOKENS + 8


@pytest.fixture(autouse=True)
def old_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "_multiplied_natively", lambda dtype: dtype not in half.HALF)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the tokens of every product that is widened."""
    counts: list[int] = []

    def spy(x: Tensor, *others: Any) -> Tensor:
        counts.append(x.numel() // x.shape[-1])
        return own(x, *others)

    own = half._wide_linear
    monkeypatch.setattr(half, "_wide_linear", spy)
    return counts


def drawn(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, TOKENS // 2, 48), (33, 48), (33,), (2, TOKENS // 2, 33))
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


@HALVES
@pytest.mark.parametrize("biased", [True, False])
def test_products_and_gradients_are_rounded_once(
    biased: bool, dtype: torch.dtype, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half, "ROWS_BYTES", 4 * 48 * 7)  # seven rows at once: the last part is smaller
    *inputs, grad = drawn(dtype)
    inputs = inputs if biased else inputs[:2]
    exact = [one.double().requires_grad_() for one in inputs]
    own = [one.requires_grad_() for one in inputs]
    with WideLinear():
        output = functional.linear(*own)
    output.backward(grad)
    expected = functional.linear(*exact)
    expected.backward(grad.double())
    assert calls == [TOKENS]
    for rounded, wanted in zip(
        [output, *(one.grad for one in own)], [expected, *(one.grad for one in exact)], strict=True
    ):
        assert rounded is not None and wanted is not None and rounded.dtype == dtype
        assert (rounded == wanted.to(dtype)).float().mean() > 0.99


def test_gradients_are_those_that_are_asked_for() -> None:
    x, weight, bias, grad = drawn(torch.bfloat16)
    with WideLinear():
        functional.linear(x, weight.requires_grad_(), bias).backward(grad)
    assert x.grad is None and bias.grad is None and weight.grad is not None


def test_second_derivatives_are_those_of_plain_products(calls: list[int]) -> None:
    def curvature(*inputs: Tensor) -> Tensor:
        """Of the cube of what x W^T + b gives, along W."""
        x, weight, bias = inputs
        loss = functional.linear(input=x, weight=weight.requires_grad_()).pow(3).sum()  # by name: plain
        loss = loss + functional.linear(x, weight, bias).pow(3).sum()
        (slope,) = torch.autograd.grad(loss, weight, create_graph=True)
        return torch.autograd.grad(slope.sum(), weight)[0]

    *inputs, _ = drawn(torch.bfloat16)
    expected = curvature(*(one.double() for one in inputs))
    with WideLinear():
        derivative = curvature(*inputs)
    assert calls == [TOKENS]
    assert (derivative - expected).abs().max() < 0.05 * expected.abs().max()


def test_only_what_gains_is_widened(calls: list[int]) -> None:
    layer, x = nn.Linear(48, 33, dtype=torch.bfloat16), torch.randn(TOKENS, 48).bfloat16()
    with WideLinear():
        layer.float()(x.float())
        layer.bfloat16()(x[: half.LEAST_TOKENS - 1])
        with plain_linear():
            layer(x)
        assert not calls
        layer(x)
    layer(x)
    assert calls == [TOKENS]


@pytest.mark.slow
@pytest.mark.parametrize("dtype, wide", [("float32", False), ("bfloat16", True)])
def test_runs_are_widened_and_their_timings_are_not(dtype: str, wide: bool, calls: list[int], tmp_path: Path) -> None:
    prompt = 77  # tokens that no other part of the run has at once
    settings = ["model=embedded", f"model.dtype={dtype}", "recipe=flap", "dataset.samples=4", "cache=off"]
    settings += ["evaluator=[perplexity,latency]", f"evaluator.latency.prompt={prompt}", "evaluator.latency.repeats=1"]
    settings += ["evaluator.perplexity.samples=4", f"run.dir={tmp_path / 'run'}", "run.save=false"]
    result = pruneexp.run(settings)
    assert any("latency/prefill" in key for key in result.metrics)
    assert bool(calls) == wide and prompt not in calls


@pytest.mark.slow
def test_checkpoints_are_proved_by_plain_products(tmp_path: Path) -> None:
    """Otherwise the run's rounding would be held against the checkpoint."""
    settings = ["model=embedded", "model.dtype=bfloat16", "recipe=flap", "dataset.samples=4", "cache=off"]
    result = pruneexp.run([*settings, "evaluator=[size]", f"run.dir={tmp_path / 'run'}"])
    proof = json.loads((tmp_path / "run/proof.json").read_text())
    assert proof["prove"] == "process" and result.metrics["proof/max_logit_difference"] == 0
    assert proof["source"]["max_logit_difference"] == 0

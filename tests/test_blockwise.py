"""Block-wise recovery: every layer comes nearer to the dense model, and never farther off on what it is judged by."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pruneexp
from pruneexp import progress
from pruneexp.__main__ import main
from pruneexp.calibrate import Meter
from pruneexp.compensator import Bias
from pruneexp.criterion import Flap
from pruneexp.model import Model
from pruneexp.model.modeling_pruned import FAMILIES as TABLES
from pruneexp.pruning import Method, prune_
from pruneexp.pruning.record import Record
from pruneexp.recovery import Blockwise
from pruneexp.recovery.blockwise import split
from pruneexp.recovery.lesson import relative_error
from pruneexp.search import AlAm, Global
from pruneexp.sparsity import OneShot
from pruneexp.surgery import shrink_
from pruneexp.types import ConfigError, Plan, SitePlan
from tests.cases import UNTIMED, each
from tests.conftest import FAMILIES, PARITY
from tests.messages import assert_told
from tests.tiny_families import tiny_model

GLOBAL = Global(1, ["heads", "channels"], "zscore", 1)
BLOCKWISE = Blockwise(epochs=3, batch=2, rate=1e-2, warmup=0.1, held_out=0.25)


@pytest.fixture
def tokens_NT(tokens_NT: Tensor) -> Tensor:
    """Four windows, each four times: what helps on three of them helps on the one that is held out."""
    return tokens_NT[:4].repeat_interleave(4, 0)


@pytest.fixture
def pair(tiny_folder: Callable[..., Path], source: Callable[..., Any], tokens_NT: Tensor) -> Callable[..., Any]:
    """A tiny model of a family without a part of its units, and the dense one that it came from."""

    def make(family: str, ratio: float = 0.3, search: Any = GLOBAL, **settings: Any) -> tuple[Model, Model]:
        origin = source(tiny_folder(family), **settings)
        model = origin.load()
        method = Method(Flap("WIFV", False), OneShot(ratio, "decoder", 0, *UNTIMED), search, Bias(False))
        prune_(model, tokens_NT, method, ratio, Record())
        return model, origin.reference()

    return make


def state(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


@torch.no_grad()
def behind(model: Model, tokens_NT: Tensor) -> Tensor:
    """Hidden states behind the last layer."""
    hidden_BTD, calls = model.enter(tokens_NT)
    for index in range(len(model.layers)):
        with model.loaded(index) as layer:
            hidden_BTD = model.run_layer(layer, hidden_BTD, calls[index])
    return hidden_BTD


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_come_nearer_to_the_dense_model(family: str, pair: Callable[..., Any], tokens_NT: Tensor) -> None:
    model, dense = pair(family)
    before, wanted = state(model), behind(dense, tokens_NT)
    far = relative_error(behind(model, tokens_NT), wanted)
    outcome = BLOCKWISE(model, tokens_NT, Meter(), 0, dense)
    assert relative_error(behind(model, tokens_NT), wanted) < 0.9 * far
    assert outcome.adapter is None and outcome.metrics["recovery/layers_kept"] <= 1
    assert outcome.metrics["recovery/loss_last"] < 0.9 * outcome.metrics["recovery/loss_first"]
    assert outcome.metrics["recovery/steps"] == 3 * 3 * 6 and outcome.metrics["recovery/params"] == model.decoder_params
    after = state(model)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed and all(name.startswith(f"{model.layers_path}.") for name in changed)
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    assert not any(p.requires_grad or p.grad is not None for p in model.module.parameters())


def test_the_same_seed_is_the_same_to_the_bit(pair: Callable[..., Any], tokens_NT: Tensor) -> None:
    states = []
    for seed in (0, 0, 1):
        model, dense = pair("llama")
        torch.manual_seed(len(states))  # whatever was drawn before
        drawn = torch.random.get_rng_state()
        BLOCKWISE(model, tokens_NT, Meter(), seed, dense)
        assert torch.equal(torch.random.get_rng_state(), drawn), "what is drawn after it does not depend on it"
        states.append(state(model))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not all(torch.equal(tensor, states[2][name]) for name, tensor in states[0].items())


def test_steps_do_not_depend_on_how_windows_are_batched(pair: Callable[..., Any], tokens_NT: Tensor) -> None:
    states = []
    for batch_size in (1, 4):
        model, dense = pair("llama", batch_size=batch_size)
        BLOCKWISE(model, tokens_NT, Meter(), 0, dense)
        states.append(behind(model, tokens_NT))
    torch.testing.assert_close(*states, rtol=1e-6, atol=1e-8)


def test_what_it_costs(pair: Callable[..., Any], tokens_NT: Tensor) -> None:
    meter = Meter()
    model, dense = pair("llama")
    BLOCKWISE(model, tokens_NT, meter, 0, dense)
    seen, looks = BLOCKWISE.seen(16), BLOCKWISE.looks(16)
    assert (seen, looks) == (3 * 12, 2 * 16 + 4 * 4)
    assert meter.forward == pytest.approx((seen + looks) / 16) and meter.backward == pytest.approx(seen / 16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_lower_precision_keeps_its_dtype(dtype: str, pair: Callable[..., Any], tokens_NT: Tensor) -> None:
    model, dense = pair("llama", dtype=dtype)
    wanted = behind(dense, tokens_NT)
    far = relative_error(behind(model, tokens_NT), wanted)
    BLOCKWISE(model, tokens_NT, Meter(), 0, dense)
    assert {p.dtype for p in model.module.parameters()} == {getattr(torch, dtype)}
    assert relative_error(behind(model, tokens_NT), wanted) < 0.9 * far


@pytest.mark.parametrize("family", FAMILIES)
def test_sublayers_that_are_gone_are_made_up_for(family: str, pair: Callable[..., Any], tokens_NT: Tensor) -> None:
    model, dense = pair(family, 0.8, AlAm())
    assert len(model.sites()) < 6, "this ratio takes whole sublayers"
    metrics = BLOCKWISE(model, tokens_NT, Meter(), 0, dense).metrics
    assert metrics["recovery/loss_last"] < metrics["recovery/loss_first"]


def test_a_layer_makes_up_for_those_that_are_gone_behind_it(pair: Callable[..., Any], tokens_NT: Tensor) -> None:
    model, dense = pair("llama", 0.0)
    shrink_(model, Plan({f"{model.layers_path}.1": SitePlan("block", 1, ())}, {}))
    assert model.origin == [0, 2]
    hidden_BTD, calls = dense.enter(tokens_NT)
    for index in range(2):
        with dense.loaded(index) as layer:
            hidden_BTD = dense.run_layer(layer, hidden_BTD, calls[index])

    def far() -> float:
        entered_BTD, own = model.enter(tokens_NT)
        return relative_error(model.run_layer(model.layers[0], entered_BTD, own[0]), hidden_BTD).item()

    before = far()
    BLOCKWISE(model, tokens_NT, Meter(), 0, dense)
    assert far() < 0.9 * before


def test_a_mixture_of_experts(loaded: Callable[..., Model], tokens_NT: Tensor) -> None:
    model, dense, tokens_NT = loaded("mixtral"), loaded("mixtral"), tokens_NT % 64
    method = Method(Flap("WIFV", False), OneShot(0.3, "decoder", 0, *UNTIMED), GLOBAL, Bias(False))
    prune_(model, tokens_NT, method, 0.3, Record())
    metrics = BLOCKWISE(model, tokens_NT, Meter(), 0, dense).metrics
    assert metrics["recovery/loss_last"] < 0.9 * metrics["recovery/loss_first"]


# Judged by windows held out


@each("windows, held", [(10, 2), (128, 16), (7, 6), (9, 4)])
def test_windows_are_held_out_from_all_over(windows: int, held: int) -> None:
    drawn = [split(windows, held, torch.Generator().manual_seed(seed)) for seed in range(20)]
    for held_B, others_B in drawn:
        assert sorted([*held_B.tolist(), *others_B.tolist()]) == list(range(windows))
        bounds = [windows * stretch // held for stretch in range(held + 1)]
        assert all(low <= at < high for at, low, high in zip(held_B.tolist(), bounds[:-1], bounds[1:], strict=True))
    assert len({tuple(held_B.tolist()) for held_B, _ in drawn}) > 1


def test_a_layer_is_never_farther_off_where_it_is_judged(pair: Callable[..., Any], tokens_NT: Tensor) -> None:
    model, dense = pair("llama")
    before = state(model)
    metrics = replace(BLOCKWISE, rate=1.0)(model, tokens_NT, Meter(), 0, dense).metrics
    assert metrics["recovery/layers_kept"] == 3 and metrics["recovery/loss_last"] == metrics["recovery/loss_first"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


@pytest.mark.parametrize("where", ["weights", "gradient"])
def test_a_layer_whose_training_meets_nan_is_restored(
    where: str,
    pair: Callable[..., Any],
    tokens_NT: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, dense = pair("llama")
    before = state(model)
    if where == "gradient":
        monkeypatch.setattr(
            "pruneexp.recovery.lesson.relative_error", lambda y, wanted: relative_error(y, wanted) + y.sum() * math.nan
        )
    with caplog.at_level(logging.WARNING, "pruneexp"):
        replace(BLOCKWISE, rate=1e300)(model, tokens_NT, Meter(), 0, dense)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    lines = [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]
    assert len(lines) == 3 and all(f"{model.layers_path}.{i}:" in line for i, line in enumerate(lines))


# Settings


@each(
    "name, value, typed",
    [
        ("epochs", 0, [">= 1"]),
        ("batch", 0, [">= 1"]),
        ("rate", 0.0, ["> 0"]),
        ("rate", math.nan, ["> 0"]),
        ("warmup", 1.5, ["share"]),
        ("held_out", 0.0, ["share"]),
        ("held_out", 1.0, ["share"]),
    ],
)
def test_bad_settings_are_refused_by_name(name: str, value: Any, typed: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        replace(BLOCKWISE, **{name: value})
    assert_told(f"{error.value}\n", f"{name}={value!r}", *typed)


@each("held_out, windows", [(0.1, 10), (0.125, 8), (0.99, 10)])
def test_fewer_than_two_windows_are_nothing_to_judge_by(held_out: float, windows: int) -> None:
    with pytest.raises(ConfigError) as error:
        replace(BLOCKWISE, held_out=held_out).prepare(TABLES["llama"], windows)
    assert_told(f"{error.value}\n", f"recovery.held_out={held_out:g}", str(windows), "2")
    replace(BLOCKWISE, held_out=0.125).prepare(TABLES["llama"], 16)


@each(
    "typed, named, offered",
    [
        (["recovery.rate=0"], "recovery.rate=0.0", ["> 0"]),
        (["recovery.held_out=0.001"], "recovery.held_out=0.001", ["2"]),
        (["model.stream=true"], "model.stream=True", ["recovery=blockwise", "recovery=none"]),
        (["recovery.epochs=0"], "recovery.epochs=0", [">= 1"]),
    ],
)
def test_mistakes_are_answered_before_a_weight_is_loaded(
    typed: list[str], named: str, offered: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["recovery=blockwise", "run.dry=true", *typed]) == 2
    assert_told(capfd.readouterr().err, named, *offered)


# Whole runs


def test_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = tiny_model("qwen2").eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tokens_NT = torch.randint(3, 64, (16, 24), generator=torch.Generator().manual_seed(1))
    typed = ["recovery=blockwise", "recovery.rate=3e-3"]
    plain = pruneexp.prune(module, None, tokens_NT, ratio=0.3)
    tuned = pruneexp.prune(module, None, tokens_NT, ratio=0.3, overrides=typed)
    assert tuned.plan == plain.plan
    assert tuned.metrics["recovery/loss_last"] < tuned.metrics["recovery/loss_first"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    with pytest.raises(ConfigError) as error:
        pruneexp.prune(module, None, tokens_NT, ratio=0.3, overrides=typed, in_place=True)
    assert_told(f"{error.value}\n", "in_place=True", "in_place=False", "recovery=none")
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.slow
@pytest.mark.usefixtures("forked_proofs")
def test_a_run_that_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "BAR_AFTER", 3600.0)
    small = ["model=hf", f"model.path={PARITY}", "dataset=tokens", "evaluator=[perplexity,size]", "sparsity.ratio=0.4"]
    small += [f"dataset.calibration={PARITY / 'calib.npy'}", f"dataset.evaluation={PARITY / 'test.npy'}"]
    assert main([*small, "run.dir=plain", "run.save=false"]) == 0
    assert main([*small, "run.dir=tuned", "recovery=blockwise"]) == 0
    plain, tuned = (json.loads(Path(folder, "metrics.json").read_text()) for folder in ("plain", "tuned"))
    [ppl] = [key for key in plain if key.startswith("pruned/ppl/")]
    assert tuned[ppl] < plain[ppl]
    assert tuned["pruned/params"] == plain["pruned/params"]
    assert tuned["seconds/recover"] > 0 and tuned["passes/backward"] > 0
    proof = json.loads(Path("tuned/proof.json").read_text())
    assert proof["prove"] == "process" and proof["max_logit_difference"] < 1e-4
    assert Path("tuned/plan.json").read_bytes() == Path("plain/plan.json").read_bytes()

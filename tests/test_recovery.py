"""Recovery: the loss falls, nothing else changes, merged is active, and what is saved loads with peft alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pruneexp import progress
from pruneexp.__main__ import main
from pruneexp.calibrate import Meter
from pruneexp.compensator import Bias
from pruneexp.criterion import Flap
from pruneexp.model import Model
from pruneexp.model.modeling_pruned import FAMILIES as TABLES
from pruneexp.pruning import Method, prune_
from pruneexp.pruning.record import Record
from pruneexp.recovery import Lora, NoRecovery
from pruneexp.recovery.common import rate_factor
from pruneexp.search import AlAm, Global
from pruneexp.sparsity import OneShot
from pruneexp.surgery import prove_in_place, save
from pruneexp.types import ConfigError, RunError
from tests.cases import UNTIMED, each
from tests.conftest import FAMILIES, PARITY
from tests.messages import assert_told

ALL: Any = ["query", "key", "value", "output", "gate", "up", "down"]
GLOBAL = Global(1, ["heads", "channels"], "zscore", 1)
LORA = Lora(None, 2, None, 5, ALL, 4, 8, 0.05, 1e-2, 0.1, 1.0, True)
SMALL = ["model=hf", f"model.path={PARITY}", "dataset=tokens", "dataset.length=64", "evaluator=[perplexity,size]"]
SMALL += [f"dataset.calibration={PARITY / 'calib.npy'}", f"dataset.evaluation={PARITY / 'test.npy'}"]


@pytest.fixture
def pruned(tiny: Callable[..., Model], tokens_NT: Tensor) -> Callable[..., Model]:
    """A tiny model of a family without a part of its units."""

    def make(family: str, ratio: float = 0.3, search: Any = None) -> Model:
        model = tiny(family)
        prune_(
            model,
            tokens_NT,
            Method(Flap("WIFV", False), OneShot(ratio, "decoder", 0, *UNTIMED), search or GLOBAL, Bias(False)),
            ratio,
            Record(),
        )
        return model

    return make


@torch.no_grad()
def logits(model: Model, tokens_NT: Tensor) -> Tensor:
    return model.module(tokens_NT[:2]).logits


def loss(model: Model, tokens_NT: Tensor) -> float:
    return model.token_losses(tokens_NT, 5).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "kept"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_calibration_loss_falls(family: str, merge: bool, pruned: Callable[..., Model], tokens_NT: Tensor) -> None:
    model, meter = pruned(family), Meter()
    before, names = loss(model, tokens_NT), list(model.module.state_dict())
    config = model.module.config.to_dict()
    recovered = replace(LORA, merge=merge, epochs=5)(model, tokens_NT, meter, 0)
    assert loss(model, tokens_NT) < before - 0.05
    assert meter.forward == meter.backward == pytest.approx(5)
    assert recovered.metrics["recovery/steps"] == 10 and recovered.metrics["recovery/params"] > 0
    assert recovered.metrics["recovery/loss_last"] < recovered.metrics["recovery/loss_first"]
    assert list(model.module.state_dict()) == names and model.module.config.to_dict() == config
    assert not hasattr(model.module, "peft_config")
    assert not any(p.requires_grad or p.grad is not None for p in model.module.parameters())
    assert not any(module.training for module in model.module.modules())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_the_active_adapter(family: str, pruned: Callable[..., Model], tokens_NT: Tensor) -> None:
    merged, kept = pruned(family), pruned(family)
    dense = logits(kept, tokens_NT)
    assert LORA(merged, tokens_NT, Meter(), 3).adapter is None
    adapter = replace(LORA, merge=False)(kept, tokens_NT, Meter(), 3).adapter
    assert adapter is not None
    active = logits(kept, tokens_NT)
    torch.testing.assert_close(active, logits(merged, tokens_NT), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(active, dense)
    with adapter.off():
        assert torch.equal(logits(kept, tokens_NT), dense)
    assert torch.equal(logits(kept, tokens_NT), active)


@each(
    "family, targets, paths",
    [(f, t, p) for f in FAMILIES for t, p in ((["value", "output"], ("attention",)), (["up", "down"], ("mlp",)))],
)
def test_weights_that_are_not_targets_stay_to_the_bit(
    family: str, targets: Any, paths: tuple[str, ...], pruned: Callable[..., Model], tokens_NT: Tensor
) -> None:
    model = pruned(family)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    replace(LORA, targets=targets)(model, tokens_NT, Meter(), 0)
    table = model.family
    in_projections = table.attention_in if paths == ("attention",) else table.mlp_in
    out_projection = table.attention_out if paths == ("attention",) else table.mlp_out
    chosen = [in_projection.path for in_projection in in_projections if set(in_projection.roles) & set(targets)] + [
        out_projection
    ]
    after = model.module.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    layers = range(len(model.layers))
    assert changed == {f"{model.layers_path}.{i}.{path}.weight" for i in layers for path in chosen}


@pytest.mark.parametrize("targets", [["gate"], ["up", "down"], ALL])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_mixtures_experts_are_trained(
    name: str, targets: Any, loaded: Callable[..., Model], tokens_NT: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    model = loaded(name)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    lora, kind = replace(LORA, targets=targets, epochs=1), model.module.config.model_type
    linears = lora._linears(model)
    recovered = lora(model, tokens_NT % model.vocab_size, Meter(), 0)
    assert recovered.metrics["recovery/params"] == sum(lora.r * sum(each.weight.shape) for each in linears.values())
    changed = {name for name, tensor in model.module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= {f"{name}.weight" for name in linears} and any(".experts." in name for name in changed)
    assert model.module.config.model_type == kind and not [said for said in recwarn if "peft" in said.filename]


def test_the_same_seed_is_the_same_to_the_bit(pruned: Callable[..., Model], tokens_NT: Tensor) -> None:
    states = []
    for seed in (0, 0, 1):
        model = pruned("llama")
        torch.manual_seed(len(states))  # whatever was drawn before
        drawn = torch.random.get_rng_state()
        LORA(model, tokens_NT, Meter(), seed)
        assert torch.equal(torch.random.get_rng_state(), drawn), "what is drawn after it does not depend on it"
        states.append(model.module.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not all(torch.equal(tensor, states[2][name]) for name, tensor in states[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_steps_do_not_depend_on_how_windows_are_batched(
    batch_size: int, pruned: Callable[..., Model], tokens_NT: Tensor
) -> None:
    models, chosen = [pruned("llama"), pruned("llama")], replace(LORA, dropout=0.0)
    models[1].batch_size = batch_size
    recoveries = [chosen(model, tokens_NT, Meter(), 0) for model in models]
    assert recoveries[0].metrics == pytest.approx(recoveries[1].metrics, rel=1e-6)
    torch.testing.assert_close(logits(models[0], tokens_NT), logits(models[1], tokens_NT), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "steps", "passes"),
    [({}, 4, 2), ({"steps": 5}, 5, 2.5), ({"samples": 4}, 2, 0.8), ({"batch": 64, "epochs": 1}, 1, 1)],
)
def test_what_it_costs(
    settings: dict[str, Any], steps: int, passes: float, pruned: Callable[..., Model], tokens_NT: Tensor
) -> None:
    meter = Meter()
    metrics = replace(LORA, **settings)(pruned("llama"), tokens_NT, meter, 0).metrics
    assert metrics["recovery/steps"] == steps
    assert meter.forward == meter.backward == pytest.approx(passes)


def test_the_rate_rises_and_falls() -> None:
    assert [rate_factor(s, 6, 2) for s in range(6)] == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    assert [rate_factor(s, 2, 0) for s in range(2)] == pytest.approx([1, 0.5])
    assert [rate_factor(s, 2, 2) for s in range(2)] == pytest.approx([0.5, 1])
    assert rate_factor(0, 1, 0) == 1


def test_half_precision_keeps_its_dtype(tiny: Callable[..., Model], tokens_NT: Tensor) -> None:
    model = tiny("llama", dtype="bfloat16")
    before = loss(model, tokens_NT)
    replace(LORA, epochs=5)(model, tokens_NT, Meter(), 0)
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}
    assert loss(model, tokens_NT) < before


def test_sublayers_that_are_gone_are_passed_over(
    pruned: Callable[..., Model], tokens_NT: Tensor, tmp_path: Path
) -> None:
    model = pruned("llama", 0.8, AlAm())
    assert len(model.sites()) < 6, "this ratio takes whole sublayers"
    before = loss(model, tokens_NT)
    replace(LORA, epochs=5)(model, tokens_NT, Meter(), 0)
    assert loss(model, tokens_NT) < before
    save(model, tmp_path / "model")
    assert prove_in_place(model, tmp_path / "model", tokens_NT[:2])["max_logit_difference"] == 0


def test_a_loss_that_is_no_number_ends_the_run(pruned: Callable[..., Model], tokens_NT: Tensor) -> None:
    model = pruned("llama")
    broken = deepcopy(model)
    broken.module.lm_head.weight.data[5] = math.inf
    with pytest.raises(RunError) as error:
        LORA(broken, tokens_NT, Meter(), 0)
    assert_told(f"{error.value}\n", "recovery", "NaN", "step 1 of 4")
    with pytest.raises(RunError) as error:
        replace(LORA, rate=1e300)(model, tokens_NT, Meter(), 0)
    assert_told(f"{error.value}\n", "recovery", "NaN")


def test_none_does_nothing(pruned: Callable[..., Model], tokens_NT: Tensor) -> None:
    recovered = NoRecovery()(pruned("llama"), tokens_NT, Meter(), 0)
    assert recovered.adapter is None and recovered.metrics == {} and not NoRecovery.trains


# Settings


@each(
    "name, value, typed",
    [
        ("samples", 0, ["null", ">= 1"]),
        ("steps", 0, ["null", ">= 1"]),
        ("epochs", 0, [">= 1"]),
        ("batch", 0, [">= 1"]),
        ("r", 0, [">= 1"]),
        ("alpha", 0, [">= 1"]),
        ("rate", 0.0, ["> 0"]),
        ("rate", math.nan, ["> 0"]),
        ("clip", -1.0, ["> 0"]),
        ("dropout", 1.0, ["[0, 1)"]),
        ("warmup", 1.5, ["share"]),
        ("targets", [], ["roles"]),
        ("targets", ["up", "up"], ["once"]),
    ],
)
def test_bad_settings_are_refused_by_name(name: str, value: Any, typed: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        replace(LORA, **{name: value})
    assert_told(f"{error.value}\n", f"{name}={value!r}", *typed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "named", "offered"),
    [
        (["recovery=lora", "recovery.targets=[querry]"], "recovery.targets=['querry']", ["query"]),
        (["recovery=lora", "recovery.r=0"], "recovery.r=0", [">= 1"]),
        (["recovery=lorra"], "recovery=lorra", ["none", "recovery=lora"]),
        (["recovery=lora", "model.stream=true"], "model.stream=True", ["recovery=lora"]),
        (["recovery=lora", "recovery.samples=100000"], "recovery.samples=100000", ["at most"]),
        (["recovery=lora", "recovery.targets=[gate]", "model=embedded_opt"], "recovery.targets=['gate']", ["down"]),
    ],
)
def test_mistakes_are_answered_before_a_weight_is_loaded(
    typed: list[str],
    named: str,
    offered: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(typed) == 2
    assert_told(capfd.readouterr().err, named, *offered)
    assert not list(tmp_path.iterdir())


def test_targets_are_checked_against_the_family() -> None:
    replace(LORA, targets=["query"]).prepare(TABLES["bloom"], 10)
    with pytest.raises(ConfigError) as error:
        replace(LORA, targets=["gate"]).prepare(TABLES["opt"], 10)
    assert_told(f"{error.value}\n", "recovery.targets=['gate']", "down", "key", "output")
    with pytest.raises(ConfigError) as error:
        replace(LORA, samples=11).prepare(TABLES["llama"], 10)
    assert_told(f"{error.value}\n", "recovery.samples=11", "10")


# Whole runs


def run(folder: str, *typed: str) -> dict[str, float]:
    assert main([*SMALL, f"run.dir={folder}", "recovery.steps=5", "recovery.rate=1e-3", *typed]) == 0
    return json.loads(Path(folder, "metrics.json").read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("forked_proofs")
def test_a_run_that_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "BAR_AFTER", 3600.0)
    assert main([*SMALL, "run.dir=plain", "run.save=false"]) == 0
    plain = json.loads(Path("plain/metrics.json").read_text())
    assert "seconds/recover" not in plain
    merged = run("merged", "recovery=lora")
    assert merged["pruned/ppl/test@64"] != plain["pruned/ppl/test@64"]
    assert merged["seconds/recover"] > 0 and merged["passes/backward"] > 0 and merged["recovery/steps"] == 5
    assert merged["pruned/params"] == plain["pruned/params"]
    proof = json.loads(Path("merged/proof.json").read_text())
    assert proof["prove"] == "process" and proof["max_logit_difference"] < 1e-4 and "adapter" not in proof
    assert not Path("merged/model/adapter").exists()
    assert Path("merged/plan.json").read_bytes() == Path("plain/plan.json").read_bytes()

    kept = run("kept", "recovery=lora", "recovery.merge=false")
    assert kept["pruned/ppl/test@64"] == pytest.approx(merged["pruned/ppl/test@64"], rel=1e-4)
    proof = json.loads(Path("kept/proof.json").read_text())
    assert proof["max_logit_difference"] < 1e-4 and proof["adapter"].startswith("model/adapter: ")
    assert np.isclose(with_peft("kept"), math.log(kept["pruned/ppl/test@64"]), rtol=1e-4)

    again = run("kept", "recovery=lora", "run.overwrite=true", "run.prove=off")
    assert again["pruned/ppl/test@64"] == merged["pruned/ppl/test@64"]
    assert not Path("kept/model/adapter").exists()


def with_peft(folder: str) -> float:
    """The evaluation loss, by transformers and peft alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(f"{folder}/model", trust_remote_code=True)
    model = PeftModel.from_pretrained(base, f"{folder}/model/adapter").eval()
    tokens = torch.from_numpy(np.load(PARITY / "test.npy")).long().view(-1, 64)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.3, 0.8], ids=["thinner", "emptied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_gives_the_same_logits_in_peft(
    family: str, ratio: float, pruned: Callable[..., Model], tokens_NT: Tensor, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = pruned(family, ratio, AlAm())
    assert ratio < 0.5 or len(model.sites()) < 6, "this ratio takes whole sublayers"
    adapter = replace(LORA, merge=False)(model, tokens_NT, Meter(), 0).adapter
    assert adapter is not None
    save(model, tmp_path / "model")
    adapter.save(tmp_path / "model" / "adapter", tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True, dtype=torch.float64)
    tuned = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter").eval()
    with torch.no_grad():
        peft_logits = tuned(tokens_NT[:2]).logits
    torch.testing.assert_close(peft_logits, logits(model, tokens_NT), rtol=1e-9, atol=1e-9)

"""Masking, shrinking, saving, reloading: the same model throughout, in every family."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pruneexp.model import Model
from pruneexp.surgery import prove, prove_in_place, prove_in_process, save, shrink_
from pruneexp.surgery.save import ShardWriter
from pruneexp.types import Plan, RunError, SitePlan
from tests.cases import each
from tests.conftest import FAMILIES
from tests.masking import masked

CASES = ("uneven", "uniform", "emptied", "block")


def plan_for(model: Model, case: str) -> Plan:
    """A plan of one kind: uneven random widths, one width for all, sublayers emptied in layer 0, block 1 removed."""
    rng = torch.Generator().manual_seed(3)
    sites = {}
    for site in model.sites():
        count = site.units * 2 // 3 if case == "uniform" else int(torch.randint(1, site.units, (), generator=rng))
        if case == "emptied" and site.layer == 0:
            count = 0
        if case == "block" and site.layer == 1:
            continue
        kept = torch.randperm(site.units, generator=rng)[:count].sort().values.tolist()
        sites[site.name] = SitePlan(site.kind, site.units, tuple(kept))
    if case == "block":
        sites[f"{model.layers_path}.1"] = SitePlan("block", 1, ())
    return Plan(sites)


def out_projections_for(model: Model, plan: Plan) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Compensated readers: other weights on the kept channels, and a bias."""
    rng = torch.Generator().manual_seed(4)
    out_projections = {}
    for index in range(len(model.layers)):
        block = model.block(index)
        for site in block.sites:
            if plan.removed(site):
                keep_C = site.keep_C(plan.sites[site.name].kept)
                weight = block.weights[site.name].out_projection[:, keep_C] * 1.5
                out_projections[site.name] = (weight, torch.randn(len(weight), generator=rng, dtype=weight.dtype))
    return out_projections


def logits(model: Model, tokens_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.module(tokens_BT).logits


@each("family, case, compensated", itertools.product(FAMILIES, CASES, [False, True]))
def test_masked_is_shrunk(
    family: str, case: str, compensated: bool, tiny: Callable[..., Model], tokens_NT: torch.Tensor
) -> None:
    model = tiny(family)
    dense = logits(model, tokens_NT)
    plan = plan_for(model, case)
    out_projections = out_projections_for(model, plan) if compensated else {}
    with masked(model, plan, out_projections):
        expected = logits(model, tokens_NT)
    assert torch.equal(logits(model, tokens_NT), dense), "masking left something behind"
    assert not torch.allclose(expected, dense, atol=1e-3), "the plan changes nothing: the comparison would be empty"
    shrink_(model, plan, out_projections)
    torch.testing.assert_close(logits(model, tokens_NT), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_masking_copies_and_writes_no_weight(family: str, tiny: Callable[..., Model]) -> None:
    model = tiny(family)

    def held() -> dict[str, tuple[int, int]]:
        return {name: (p.data_ptr(), p._version) for name, p in model.module.named_parameters()}

    before = held()
    with masked(model, plan_for(model, CASES[0])):
        assert held() == before
    assert held() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_all_is_the_identity(family: str, tiny: Callable[..., Model], tokens_NT: torch.Tensor) -> None:
    model = tiny(family)
    dense, weights = logits(model, tokens_NT), {k: v.clone() for k, v in model.module.state_dict().items()}
    shrink_(model, Plan.keep_all(model.sites()))
    assert torch.equal(logits(model, tokens_NT), dense)
    assert weights.keys() == model.module.state_dict().keys()
    assert all(torch.equal(v, weights[k]) for k, v in model.module.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_shrunk_parameters_are_the_dense_ones_less_the_units_cost(family: str, tiny: Callable[..., Model]) -> None:
    model = tiny(family)
    plan, sites, before = plan_for(model, "uneven"), model.sites(), model.decoder_params
    shrink_(model, plan)
    assert before - model.decoder_params == sum(plan.removed(site) * site.cost.params for site in sites)


@each("family, case", itertools.product(FAMILIES, CASES))
def test_reloaded_in_place_and_streamed(
    family: str,
    case: str,
    tiny: Callable[..., Model],
    source: Callable[..., Any],
    tokens_NT: torch.Tensor,
    tmp_path: Path,
) -> None:
    model = tiny(family)
    plan = plan_for(model, case)
    shrink_(model, plan, out_projections_for(model, plan))
    save(model, tmp_path / "model")
    assert prove_in_place(model, tmp_path / "model", tokens_NT)["max_logit_difference"] == 0
    streamed = source(tmp_path / "model", stream=True).load()
    assert torch.equal(streamed.token_losses(tokens_NT, 4), model.token_losses(tokens_NT, 4))


def test_a_checkpoint_that_does_not_reload_is_the_runs_failure(
    tiny: Callable[..., Model], tokens_NT: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny("llama")
    save(model, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_bias": True}))
    with pytest.raises(RunError, match="the saved checkpoint does not reload .*it lacks model.layers.0.self_attn"):
        prove_in_place(model, tmp_path / "model", tokens_NT)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_twice_is_pruned_once(
    family: str, tiny: Callable[..., Model], source: Callable[..., Any], tokens_NT: torch.Tensor, tmp_path: Path
) -> None:
    once, twice = tiny(family), tiny(family)
    sites = {site.name: site for site in once.sites()}
    half = Plan({n: SitePlan(s.kind, s.units, tuple(range(1, s.units))) for n, s in sites.items()})
    rest = Plan({n: SitePlan(s.kind, s.units - 1, tuple(range(0, s.units - 1, 2))) for n, s in sites.items()})
    both = Plan({n: SitePlan(s.kind, s.units, tuple(range(1, s.units, 2))) for n, s in sites.items()})
    shrink_(once, both)
    shrink_(twice, half)
    save(twice, tmp_path / "model")
    twice = source(tmp_path / "model").load()  # the second round starts from the checkpoint, as a user's would
    shrink_(twice, rest)
    assert torch.equal(logits(once, tokens_NT), logits(twice, tokens_NT))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_clean_process_reloads_it_without_this_package(
    family: str,
    tiny: Callable[..., Model],
    tokens_NT: torch.Tensor,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if family != FAMILIES[0]:  # of one family, a process from its first import on
        request.getfixturevalue("forked_proofs")
    model = tiny(family)
    plan = plan_for(model, "emptied")
    shrink_(model, plan, out_projections_for(model, plan))
    assert save(model, tmp_path / "model").kind == "remote_code"
    proof = prove_in_process(model, tmp_path / "model", tokens_NT)
    assert proof["max_logit_difference"] < 1e-5 and proof["greedy_tokens_equal"]
    assert proof["class"].startswith("Pruned")


@pytest.mark.slow
@pytest.mark.usefixtures("forked_proofs")
@pytest.mark.parametrize(
    ("kept", "biases", "expected"),
    [(2, False, "MistralForCausalLM"), (2, True, "LlamaForCausalLM"), (1, False, "LlamaForCausalLM")],
)
def test_uniform_widths_are_a_stock_architecture(
    kept: int, biases: bool, expected: str, tiny: Callable[..., Model], tokens_NT: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny("llama")  # hidden 48: 4 heads (2 KV groups) divide it, so do 2 (1 KV group)
    if (kept, biases) == (2, False):
        expected = "LlamaForCausalLM"
    sites = {
        s.name: SitePlan(s.kind, s.units, tuple(range(kept if s.kind == "attention" else 25))) for s in model.sites()
    }
    plan = Plan(sites)
    shrink_(model, plan, out_projections_for(model, plan) if biases else {})
    form = save(model, tmp_path / "model")
    assert form.kind == "stock"
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == [expected]
    assert not list((tmp_path / "model").glob("*.py"))
    assert prove_in_process(model, tmp_path / "model", tokens_NT)["class"] == expected


@pytest.mark.slow
@pytest.mark.usefixtures("forked_proofs")
@pytest.mark.parametrize(("biases", "expected"), [(False, "MistralForCausalLM"), (True, "GraniteForCausalLM")])
def test_heads_that_do_not_divide_the_hidden_size_are_relabelled(
    biases: bool, expected: str, source: Callable[..., Any], tokens_NT: torch.Tensor, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    model = source(tmp_path / "dense").load()
    plan = Plan({s.name: SitePlan(s.kind, s.units, tuple(range(3))) for s in model.sites()})  # 3 heads of 16 on 64
    shrink_(model, plan, out_projections_for(model, plan) if biases else {})
    form = save(model, tmp_path / "model")
    assert (form.kind, form.config.architectures) == ("stock", [expected])
    assert prove_in_process(model, tmp_path / "model", tokens_NT)["max_logit_difference"] < 1e-5


def test_opt_with_narrower_ffn_is_stock(tiny: Callable[..., Model], tokens_NT: torch.Tensor, tmp_path: Path) -> None:
    model = tiny("opt")
    plan = Plan({s.name: SitePlan(s.kind, s.units, tuple(range(25))) for s in model.sites() if s.kind == "mlp"})
    shrink_(model, plan, out_projections_for(model, plan))
    assert save(model, tmp_path / "model").kind == "stock"
    assert prove_in_place(model, tmp_path / "model", tokens_NT)["max_logit_difference"] == 0


@pytest.mark.parametrize("whole", [True, False])
def test_a_stock_form_names_no_code_that_does_not_travel(
    whole: bool, tiny: Callable[..., Model], tokens_NT: torch.Tensor, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny("llama")
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    model.config.auto_map = own
    if not whole:
        shrink_(model, Plan({f"{model.layers_path}.1": SitePlan("block", 1, ())}))
    assert save(model, tmp_path / "model").kind == "stock"
    assert "auto_map" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert model.config.auto_map == own, "the model's own config is left as it was"
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True, dtype=model.dtype)
    assert torch.equal(reloaded.eval()(tokens_NT).logits, logits(model, tokens_NT))


@each("family, cache", itertools.product(FAMILIES, ["dynamic", "static"]))
def test_generation_with_a_cache_equals_generation_without(
    family: str, cache: str, tiny: Callable[..., Model], tokens_NT: torch.Tensor
) -> None:
    model = tiny(family)
    shrink_(model, plan_for(model, "emptied"))  # layer 0 has no attention: the cache must not count by it
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        plain = model.module.generate(tokens_NT[:2, :6], use_cache=False, **options)
        cached = model.module.generate(tokens_NT[:2, :6], cache_implementation=cache, **options)
    assert torch.equal(plain, cached)


@pytest.mark.parametrize("ended", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(143)])
def test_what_stops_a_save_leaves_nothing_behind(
    tiny: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: BaseException
) -> None:
    import safetensors.torch

    def stopped(tensors: Any, path: Path, *_args: Any) -> None:
        path.write_bytes(b"half")
        raise ended

    model = tiny("llama")
    monkeypatch.setattr(safetensors.torch, "save_file", stopped)
    expected = (RunError, "cannot be written.*No space left") if isinstance(ended, OSError) else (type(ended), None)
    with pytest.raises(expected[0], match=expected[1]):
        save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_writer_goes_on_behind_its_shards_alone(tmp_path: Path) -> None:
    """What a killed process was writing after them is no part of the checkpoint."""
    first, second = {"a": torch.ones(4)}, {"b": torch.zeros(4)}
    before = ShardWriter(tmp_path, shard_bytes=1)
    before.add(first)
    (tmp_path / "shard-00001").write_bytes(b"half")
    (tmp_path / ".tmpQ93tZl").write_bytes(b"half")
    writer = ShardWriter(tmp_path, shard_bytes=1)
    writer.restore(before.shards, second)
    writer.close()
    expected = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


def test_a_reader_with_nan_is_refused(tiny: Callable[..., Model]) -> None:
    model = tiny("llama")
    plan = plan_for(model, "uneven")
    out_projections = out_projections_for(model, plan)
    name = next(iter(out_projections))
    out_projections[name] = (out_projections[name][0] * float("nan"), out_projections[name][1])
    with pytest.raises(RunError, match=name):
        shrink_(model, plan, out_projections)


def test_a_clean_process_that_is_killed_is_told_as_that(
    tiny: Callable[..., Model], tokens_NT: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove, "RELOAD", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(RunError, match=r"model: the clean process .* was killed \(signal 9\); expected memory for"):
        prove_in_process(tiny("llama"), tmp_path / "model", tokens_NT)


def test_a_clean_process_ends_with_the_run_that_wants_its_answer(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    begins = prove.RELOAD.partition("import torch\n")[0] + "print(os.getpid(), flush=True); time.sleep(120)"
    command = [sys.executable, "-I", "-c", begins, *["-"] * 3, str(scratch), *["-"] * 4]
    dies = "import os, subprocess, sys; child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE); "
    dies += "os.write(1, child.stdout.readline()); os.kill(os.getpid(), 9)"
    run = subprocess.Popen([sys.executable, "-c", dies, *command], stdout=subprocess.PIPE, text=True)
    assert int(run.communicate()[0]) > 0 and run.returncode == -9
    end = time.monotonic() + 30
    while scratch.exists():  # the last that it does
        assert time.monotonic() < end, "it waits for nobody"
        time.sleep(0.05)

"""Python's door, knocked on in odd ways: every mistake one line, and results as plain transformers has them."""

from __future__ import annotations

import gc
import json
import os
import weakref
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pruneexp
from pruneexp.tracker import memory_metrics
from pruneexp.types import SitePlan
from tests.cases import each
from tests.tiny_families import tiny_model

pytestmark = pytest.mark.usefixtures("modules_cache")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model() -> Any:
    return tiny_model("mistral_sliding").float()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 64, (6, 24), generator=torch.Generator().manual_seed(0))


def reloaded(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process cannot be reset")
def test_no_run_has_the_peak_memory_of_what_was_before_it(model: Any, tokens: torch.Tensor) -> None:
    torch.ones(2**26)  # a quarter of a GiB, of which nothing is left
    most = memory_metrics([])["memory/peak_bytes"]
    assert pruneexp.prune(model, None, tokens).metrics["memory/peak_bytes"] < most - 2**27


@pytest.mark.slow
def test_results_are_in_evaluation_mode_whatever_was_replaced(tokens: torch.Tensor) -> None:
    result: Any
    for name, recipe in (("mistral_sliding", "shortgpt"), ("stablelm_2_12b", "flap")):
        given = tiny_model(name)
        result = pruneexp.prune(given, None, tokens, recipe=recipe, ratio=0.3)
        assert not any(part.training for part in result.model.modules()), name
        assert not any(part.training for part in pruneexp.apply(given, result.plan).modules()), name
        again = pruneexp.prune(result.model, None, tokens, ratio=0.3)
        assert again.metrics["pruned/params"] < result.metrics["pruned/params"]


def test_parts_that_compute_something_else_are_refused(model: Any, tokens: torch.Tensor) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from torch.nn.utils import parametrizations

    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    parametrised, adapted, subclassed, patched, hooked, computed = (deepcopy(model) for _ in range(6))
    parametrizations.weight_norm(parametrised.model.layers[0].mlp.down_proj)
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), adapted)
    subclassed.model.layers[0].mlp.up_proj = Doubled(48, 24, bias=False)
    forward = patched.model.layers[0].forward
    patched.model.layers[0].forward = lambda *args, **kwargs: forward(*args, **kwargs)
    hooked.model.layers[0].register_full_backward_pre_hook(lambda *_: None)
    weight = computed.lm_head.weight
    del computed.lm_head._parameters["weight"]
    computed.lm_head.weight = weight * 1.0
    for wrong, message in (
        (parametrised, "has a part of somebody else's: ParametrizedLinear at model.layers.0.mlp.down_proj"),
        (adapted, "has a part of somebody else's: Linear at model.layers.0.self_attn.q_proj"),
        (subclassed, "has a part of somebody else's: Doubled at model.layers.0.mlp.up_proj"),
        (patched, "has a part of somebody else's: MistralDecoderLayer at model.layers.0"),
        (hooked, "has a hook of somebody else's on model.layers.0"),
        (computed, "cannot be copied"),
    ):
        with pytest.raises(pruneexp.ConfigError, match=f"model: {message}") as caught:
            pruneexp.prune(wrong.eval(), None, tokens)
        assert "\n" not in str(caught.value)


def test_placement_of_accelerate_may_stay_and_prunes_again(model: Any, tokens: torch.Tensor) -> None:
    from accelerate import dispatch_model

    plan = pruneexp.prune(model, None, tokens).plan
    names = (
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(3)),
    )
    home: Any = "cpu"  # as a torch.device it would be taken for another place
    placed = dispatch_model(model, dict.fromkeys(names, "cpu"), main_device=home, force_hooks=True)
    result = pruneexp.prune(placed, None, tokens)
    assert result.plan == plan and hasattr(placed, "_hf_hook")
    assert pruneexp.prune(result.model, None, tokens).metrics["pruned/params"] < result.metrics["pruned/params"]


def test_a_head_that_was_tied_by_hand_is_tied_when_read(model: Any, tokens: torch.Tensor) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight
    result = pruneexp.prune(model, None, tokens)
    result.save("tied")
    assert not model.config.tie_word_embeddings, "the caller's config stays"
    read = reloaded("tied")
    assert read.lm_head.weight is read.model.embed_tokens.weight
    assert torch.equal(read(tokens).logits, result.model(tokens).logits)


def test_what_was_done_to_a_result_is_saved(model: Any, tokens: torch.Tensor) -> None:
    result = pruneexp.prune(model, None, tokens)
    result.model.to(torch.bfloat16)
    result.save("nested/cast")
    assert json.loads(Path("nested", "cast", "config.json").read_text())["dtype"] == "bfloat16"
    assert reloaded("nested/cast").dtype == torch.bfloat16
    with pytest.raises(pruneexp.ConfigError, match="folder=None"):
        result.save(None)  # type: ignore[arg-type]
    result.model.to("meta")
    with pytest.raises(pruneexp.ConfigError, match="meta device"):
        result.save("meta")
    assert not Path("meta").exists()


@pytest.mark.slow
def test_folders_are_any_text_and_home_is_home(
    model: Any, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    typed = ["run.save=false"]
    for folder in ("it's", "a ${b}", 'c "d", \\e', "~/run"):
        result: Any = pruneexp.prune(model, None, tokens, folder=folder, overrides=typed)
        assert result.folder == Path(folder).expanduser() and (result.folder / "metrics.json").is_file(), folder
    assert Path("home", "run").is_dir() and not Path("~").exists()


def test_odd_arguments_are_one_line(model: Any, tokens: torch.Tensor) -> None:
    for odd in (tokens.to("meta"), tokens.to_sparse(), torch.nested.nested_tensor([tokens[0], tokens[1, :5]])):
        with pytest.raises(pruneexp.ConfigError, match="tokens: .*expected token windows"):
            pruneexp.prune(model, None, odd)
    for odd in ("search.effort=3", None, 3):
        with pytest.raises(pruneexp.ConfigError, match="overrides=.*expected a list"):
            pruneexp.prune(model, None, tokens, overrides=odd)  # type: ignore[arg-type]
        with pytest.raises(pruneexp.ConfigError, match="overrides=.*expected a list"):
            pruneexp.run(odd)  # type: ignore[arg-type]
    with pytest.raises(pruneexp.ConfigError, match="3: expected key=value"):
        pruneexp.prune(model, None, tokens, overrides=[3])  # type: ignore[list-item]
    with pytest.raises(pruneexp.ConfigError, match="sweep.dir='x': expected null"):
        pruneexp.prune(model, None, tokens, overrides=["sweep.dir=x"])
    with pytest.raises(pruneexp.ConfigError, match="tokenizer: is a str"):
        pruneexp.prune(model, "gpt2", tokens)
    for odd in (None, 3, {}, "a\0b"):
        with pytest.raises(pruneexp.ConfigError, match="plan=.*expected a Plan"):
            pruneexp.apply(model, odd)  # type: ignore[arg-type]
    for odd in ("", 3, b"x", "a\0b"):
        with pytest.raises(pruneexp.ConfigError, match="folder=.*expected the path of a folder"):
            pruneexp.apply(model, pruneexp.Plan({}), odd)  # type: ignore[arg-type]


def test_advice_about_shared_text_is_of_what_the_caller_has(
    model: Any, tokens: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    short = ["search=evolutionary", "search.starts=[]", "search.effort=1"]
    pruneexp.prune(model, None, tokens[:1].repeat(4, 1), overrides=short)
    (shared,) = [line for line in caplog.messages if "share text" in line]
    assert shared.startswith("100 % of the windows that search.held_out=0.5 lets decide share text with those ")
    assert shared.endswith("; a longer text would keep them apart")  # neither samples nor sampling are its own to set


@pytest.mark.slow
@each("name", ["falcon_rw", "gpt2", "mixtral"])  # ALiBi's slopes, transposed weights, experts
def test_a_pruned_model_that_was_loaded_again_is_pruned_as_what_was_saved(name: str, tokens: torch.Tensor) -> None:
    model = tiny_model(name).float()
    plan = pruneexp.prune(model, None, tokens, recipe="wanda_sp", overrides=["compensator=none"]).plan
    attention = next(site for site in plan.sites if plan.sites[site].kind == "attention")  # type: ignore[union-attr]
    gone = SitePlan("attention", plan.sites[attention].units, ())  # type: ignore[union-attr]
    pruned = pruneexp.apply(model, plan.merged(pruneexp.Plan({attention: gone})), name)  # type: ignore[union-attr]
    read, windows = reloaded(name), torch.randint(3, 64, (16, 24), generator=torch.Generator().manual_seed(1))
    kinds = [type(part) for part in read.modules()]
    for recipe in ("flap", "best_tuned"):
        short = ["search.effort=2", "augmentation=none", "recovery.held_out=0.25"] if recipe == "best_tuned" else []
        windows = tokens.repeat(3, 1)[:16]
        again, wanted = (
            pruneexp.prune(given, None, windows, recipe=recipe, overrides=short) for given in (read, pruned)
        )
        assert again.plan == wanted.plan and again.metrics["sparsity/decoder"] > 0.1
        assert torch.equal(again.model(tokens).logits, wanted.model(tokens).logits)
    assert kinds == [type(part) for part in read.modules()]
    again.save(f"{name}_again")
    assert torch.equal(reloaded(f"{name}_again")(tokens).logits, again.model(tokens).logits)


def test_a_plan_that_leaves_no_model_is_refused(model: Any) -> None:
    layers = [f"model.layers.{index}" for index in range(3)]
    with pytest.raises(pruneexp.ConfigError, match="^plan: removes every decoder layer; expected one or more"):
        pruneexp.apply(model, pruneexp.Plan({name: SitePlan("block", 1, ()) for name in layers}))
    fewer = pruneexp.apply(model, pruneexp.Plan({name: SitePlan("block", 1, ()) for name in layers[1:]}))
    assert len(fewer.model.layers) == 1
    mixture, experts = tiny_model("mixtral").float(), "model.layers.0.mlp.experts"
    with pytest.raises(pruneexp.ConfigError, match=f"^plan: {experts} keeps 1 of 4 experts, a token .* goes to 2; "):
        pruneexp.apply(mixture, pruneexp.Plan({experts: SitePlan("experts", 4, (3,))}))


def test_units_of_a_plan_are_integers(model: Any) -> None:
    attention = "model.layers.0.self_attn"
    halves: Any = (SitePlan("attention", 3, (0, 0.5, 1)), SitePlan("attention", 3, (0,), 6, (0, 0.5)))  # type: ignore[arg-type]
    for own in halves:
        plan = pruneexp.Plan({attention: own})
        Path("plan.json").write_text(plan.to_json())
        for given in (plan, "plan.json"):
            with pytest.raises(pruneexp.ConfigError, match=f"^plan: {attention} keeps units by numbers that are no in"):
                pruneexp.apply(model, given)


@pytest.mark.slow
def test_inside_inference_mode_it_is_the_same(model: Any, tokens: torch.Tensor) -> None:
    plans = [pruneexp.prune(model, None, tokens, recipe=recipe).plan for recipe in ("flap", "llm_pruner")]
    with torch.inference_mode():
        assert [pruneexp.prune(model, None, tokens, recipe=each).plan for each in ("flap", "llm_pruner")] == plans
        assert torch.is_inference_mode_enabled()


@pytest.mark.slow
def test_gradients_are_required_where_they_were(model: Any, tokens: torch.Tensor) -> None:
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    result = pruneexp.prune(model, None, tokens, recipe="wanda_sp", ratio=0.3)
    for pruned in (result.model, pruneexp.apply(model, result.plan)):  # type: ignore[arg-type]
        assert {name: p.requires_grad for name, p in pruned.named_parameters()} == before
    fewer = pruneexp.prune(model, None, tokens, recipe="shortgpt", ratio=0.3)
    kept = [i for i in range(3) if f"model.layers.{i}" not in fewer.plan.sites]  # type: ignore[union-attr]
    assert len(kept) < 3
    for layer, index in zip(fewer.model.model.layers, kept, strict=True):
        assert [p.requires_grad for p in layer.mlp.parameters()] == [index != 1] * 3
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(pruneexp.RunError, match="NaN or Inf"):
        pruneexp.prune(model, None, tokens, in_place=True)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_pruning_in_place_frees_what_it_replaces(model: Any, tokens: torch.Tensor, monkeypatch: Any) -> None:
    from pruneexp.experiment import run

    dense, card_of = [weakref.ref(parameter) for parameter in model.parameters()], run.card_of
    living: list[int] = []

    def counted(*of: Any) -> Any:  # called once the model is pruned
        gc.collect()
        living.append(sum(parameter() is not None for parameter in dense))
        return card_of(*of)

    monkeypatch.setattr(run, "card_of", counted)
    result = pruneexp.prune(model, None, tokens, ratio=0.3, in_place=True)
    kept = {id(parameter) for parameter in result.model.parameters()}
    assert living == [sum(id(parameter()) in kept for parameter in dense)] and living[0] < len(dense)


def test_save_pretrained_of_what_no_config_says_is_one_line(model: Any, tokens: torch.Tensor) -> None:
    result = pruneexp.prune(model, None, tokens)
    for pruned in (result.model, pruneexp.apply(model, result.plan), deepcopy(result.model)):  # type: ignore[arg-type]
        with pytest.raises(pruneexp.ConfigError, match="save_pretrained.'uneven'.: .*expected Result.save"):
            pruned.save_pretrained("uneven")
    assert not Path("uneven").exists()
    result.save("saved")
    assert torch.equal(reloaded("saved")(tokens).logits, result.model(tokens).logits)
    fewer = pruneexp.prune(model, None, tokens, recipe="shortgpt", ratio=0.3)
    fewer.model.save_pretrained("fewer")  # a stock config can say how many layers there are
    assert torch.equal(reloaded("fewer")(tokens).logits, fewer.model(tokens).logits)


@pytest.mark.parametrize(
    ("name", "typed"),
    [
        ("mistral_sliding", ["sparsity.ratio=0"]),  # was never saved before: its config names no architecture
        ("mistral_sliding", ["recovery=lora", "recovery.steps=2", "recovery.rate=0.01", "recovery.merge=false"]),
        ("gpt2", ["recovery=lora", "recovery.steps=2", "recovery.rate=0.01"]),
        ("gpt2", ["recovery=lora", "recovery.steps=2", "recovery.rate=0.01", "recovery.merge=false"]),
        ("mixtral", []),
    ],
)
def test_what_is_saved_is_the_whole_result(name: str, typed: list[str], tokens: torch.Tensor) -> None:
    from peft import PeftModel

    result = pruneexp.prune(tiny_model(name).float(), None, tokens, overrides=typed)
    read = reloaded(str(result.save("whole")))
    if Path("whole", "adapter").exists():
        read = PeftModel.from_pretrained(read, "whole/adapter").eval()
    assert torch.allclose(read(tokens).logits, result.model(tokens).logits, rtol=0, atol=1e-5)


def test_a_dry_multirun_gives_a_forecast_for_each_job() -> None:
    typed = ["dataset.samples=4", "dataset.length=32", "evaluator=[size]", "run.dry=true"]
    one = pruneexp.run([*typed, "sparsity.ratio=0.2"])
    jobs = pruneexp.run([*typed, "sparsity.ratio=0.2,0.3", "--multirun"])
    assert len(jobs) == 2 and one.metrics.keys() == jobs[0].metrics.keys() == jobs[1].metrics.keys()
    assert all(job.model is job.plan is job.folder is None for job in jobs)
    assert one.metrics and not list(Path.cwd().rglob("metrics.json"))


def test_a_sweep_whose_job_another_process_runs_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from pruneexp.cli import sweep

    def taken(job: Any, shared: Any) -> Any:
        folder = Path(job.config["run"]["dir"])
        folder.mkdir()
        (folder / "status.json").write_text(json.dumps({"status": "running", "host": "elsewhere", "pid": 1}))
        raise pruneexp.ConfigError("process 1 of elsewhere is still writing a run there")

    monkeypatch.setattr(sweep, "_run", taken)
    with pytest.raises(pruneexp.RunError, match=r"^sweep in x: left to the processes that run them: [0-9a-f]{12};"):
        pruneexp.run(["--multirun", "seed=1", "sweep.dir=x"])


def test_inside_autocast_it_is_the_same(model: Any, tokens: torch.Tensor) -> None:
    alone: Any = pruneexp.prune(model, None, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        inside: Any = pruneexp.prune(model, None, tokens)
        assert torch.is_autocast_enabled("cpu")
    assert inside.plan == alone.plan
    for one, other in zip(inside.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(one, other)

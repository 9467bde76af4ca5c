"""Python's door: on models in memory, with the caller's world left as it was."""

from __future__ import annotations

import json
import logging
import random
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pruneexp
from pruneexp.criterion import Flap
from pruneexp.evidence import Moments
from pruneexp.model.given import GivenModel
from pruneexp.types import unit_scores
from tests.tiny_families import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("modules_cache")

EMBEDDED = Path(pruneexp.__file__).parent / "embedded" / "llama"
README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def loaded_once() -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture
def model(loaded_once: Any) -> Any:
    return loaded_once[0]


@pytest.fixture
def tokenizer(loaded_once: Any) -> Any:
    return loaded_once[1]


class _Mine:
    """Members as they are given."""

    def __init__(self, **members: Any):
        vars(self).update(members)


class Energy(_Mine):
    evidence = Moments

    def __call__(self, block: Any, evidence: Any) -> Any:
        return {s.name: evidence[s.name].mean_square_C.view(s.units, s.width).sum(1) for s in block.sites}


class Lowest(_Mine):
    """A quarter of each site."""

    def __call__(self, scores: Any, sites: Any, budget: Any, oracle: Any, rng: Any) -> pruneexp.Plan:
        values = {s.name: unit_scores(scores[s.name]) for s in sites}
        return pruneexp.Plan.from_masks(sites, {n: v > v.sort().values[len(v) // 4 - 1] for n, v in values.items()})


class Slice(_Mine):
    evidence, adds_bias, sequential = None, False, False

    def __call__(self, weight_OC: Any, bias_O: Any, evidence: Any, keep_C: Any) -> Any:
        return weight_OC[:, keep_C], bias_O


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 800, (12, 48), generator=torch.Generator().manual_seed(1))


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_the_readmes_blocks_run(model: Any, tokenizer: Any, tokens: torch.Tensor) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[:2]
    assert len(blocks) == 2 and all("pruneexp.prune(" in block for block in blocks)
    for block in blocks:
        names: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "tokens": tokens, "__name__": "notebook"}
        sys.modules["notebook"] = SimpleNamespace(__dict__=names)  # type: ignore[assignment]
        try:
            exec(compile(block, "README.md", "exec"), names)
        finally:
            del sys.modules["notebook"]
        assert names["result"].metrics["sparsity/decoder"] == pytest.approx(0.2, abs=0.03)
    assert (Path("small_model") / "model.safetensors").is_file()


def test_the_callers_model_stays_and_another_one_is_smaller(model: Any, tokenizer: Any, tokens: torch.Tensor) -> None:
    before = state(model)
    logits = model(tokens).logits
    result = pruneexp.prune(model, tokenizer, tokens)
    assert same_state(before, model.state_dict()) and torch.equal(model(tokens).logits, logits)
    assert result.model is not model and result.tokenizer is tokenizer and result.folder is None
    assert sum(p.numel() for p in result.model.parameters()) == result.metrics["pruned/params"]
    assert result.metrics["pruned/params"] < result.metrics["dense/params"]
    assert not list(Path().iterdir()), "nothing is written unless a folder is given"
    assert repr(result).count("\n") == 0 and len(repr(result)) < 200


@pytest.mark.slow
def test_it_is_what_the_command_does(model: Any, tokenizer: Any, tokens: torch.Tensor) -> None:
    np.save("windows.npy", tokens.numpy())
    windows = ["dataset=tokens", "dataset.calibration=windows.npy", "dataset.evaluation=windows.npy"]
    typed = ["evaluator=[size]", "run.prove=off", "run.dir=command"]
    for recipe in ("flap", "wanda_sp", "magnitude"):
        done = pruneexp.run([f"recipe={recipe}", "run.overwrite=true", *windows, *typed])
        settings: dict[str, Any] = {"recipe": recipe, "overrides": ["run.prove=off"], "folder": f"python_{recipe}"}
        result = pruneexp.prune(model, tokenizer, tokens, **settings)
        assert result.plan == done.plan, recipe
        for key in ("pruned/params", "sparsity/decoder", "passes/forward"):
            assert result.metrics[key] == done.metrics[key]
        assert torch.equal(result.model(tokens).logits, done.model(tokens).logits), recipe
    written = json.loads(Path("python_flap", "metrics.json").read_text())
    assert result.folder == Path("python_magnitude")
    assert written["passes/forward"] == 1 and Path("python_flap", "model", "config.json").is_file()


def test_a_saved_result_loads(model: Any, tokenizer: Any, tokens: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = pruneexp.prune(model, tokenizer, tokens, ratio=0.4)
    result.save("small")
    read = AutoModelForCausalLM.from_pretrained("small", trust_remote_code=True).eval()
    assert torch.equal(read(tokens).logits, result.model(tokens).logits)
    assert AutoTokenizer.from_pretrained("small", trust_remote_code=False).get_vocab() == tokenizer.get_vocab()
    assert json.loads(Path("small", "plan.json").read_text()) == json.loads(result.plan.to_json())
    assert "pruned" in Path("small", "README.md").read_text()
    with pytest.raises(pruneexp.ConfigError, match="folder='small': is not empty"):
        result.save("small")
    Path("disk/empty").mkdir(parents=True)
    Path("link").symlink_to("disk/empty")
    Path("mine.partial").mkdir()
    result.save("link")
    assert Path("link").is_symlink() and Path("disk/empty/config.json").is_file()
    with pytest.raises(pruneexp.ConfigError, match=r"folder='mine': is made as .*/mine.partial, which is there"):
        result.save("mine")


def test_a_plan_is_applied_without_calibrating(model: Any, tokenizer: Any, tokens: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM

    result = pruneexp.prune(model, tokenizer, tokens, overrides=["compensator=none"])
    Path("plan.json").write_text(result.plan.to_json())
    before = state(model)
    for plan in (result.plan, "plan.json", Path("plan.json")):
        applied = pruneexp.apply(model, plan)
        assert torch.equal(applied(tokens).logits, result.model(tokens).logits)
    assert same_state(before, model.state_dict())
    with pytest.raises(pruneexp.ConfigError, match=r"Result.save\(folder\), or pruneexp.apply\(model, plan, folder\)"):
        applied.save_pretrained("lost")
    pruneexp.apply(model, result.plan, "applied")
    loaded = AutoModelForCausalLM.from_pretrained("applied", trust_remote_code=True)
    assert torch.equal(loaded.eval()(tokens).logits, applied(tokens).logits)
    assert Path("applied/plan.json").read_text() == Path("plan.json").read_text() + "\n"
    with pytest.raises(pruneexp.ConfigError, match="folder='applied': is not empty; expected a new folder"):
        pruneexp.apply(model, result.plan, "applied")


def test_a_plan_of_another_model_is_refused(model: Any, tokenizer: Any, tokens: torch.Tensor) -> None:
    plan = pruneexp.prune(model, tokenizer, tokens).plan
    with pytest.raises(pruneexp.ConfigError, match="plan: model.layers.0.* expected a plan of the same model"):
        pruneexp.apply(tiny_model("granite").eval(), plan)
    for rounds in ([], ["sparsity=linear", "sparsity.rounds=2"]):
        plan = pruneexp.prune(fewer_layers(model), tokenizer, tokens, overrides=rounds).plan
        with pytest.raises(
            pruneexp.ConfigError, match=r"plan: of a decoder of 461312 parameters, this one has 1383936; "
        ):
            pruneexp.apply(model, plan)
    with pytest.raises(pruneexp.ConfigError, match="plan='none.json': No such file"):
        pruneexp.apply(model, "none.json")
    for text in ("{}", '{"version": 1, "sites": {}, "budget": 3}'):
        Path("odd.json").write_text(text)
        with pytest.raises(pruneexp.ConfigError, match="plan='odd.json': no plan"):
            pruneexp.apply(model, "odd.json")


def fewer_layers(model: Any) -> Any:
    """The first two layers of six."""
    from copy import deepcopy

    made = deepcopy(model)
    del made.model.layers[2:]
    made.config.num_hidden_layers = made.model.config.num_hidden_layers = 2
    return made


def test_in_place_spends_the_callers(tokens: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    result = pruneexp.prune(own, None, tokens, in_place=True)
    assert result.model is own
    assert sum(p.numel() for p in own.parameters()) == result.metrics["pruned/params"]


@pytest.mark.slow
def test_the_callers_world_is_untouched(model: Any, tokenizer: Any, tokens: torch.Tensor) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from transformers.utils import logging as messages

    Path("conf").mkdir()
    Path("conf", "mine.yaml").write_text("answer: 42\n")
    logger = logging.getLogger("pruneexp")
    world = logger.level, list(logger.handlers), messages.get_verbosity(), logging.getLogger().level
    with initialize_config_dir(str(Path("conf").absolute()), version_base=None):
        hydra = GlobalHydra.instance().hydra
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        drawn = torch.rand(1).item(), random.random(), np.random.rand()
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        pruneexp.prune(model, tokenizer, tokens, overrides=["run.prove=off"], folder="run")
        assert (torch.rand(1).item(), random.random(), np.random.rand()) == drawn
        assert GlobalHydra.instance().hydra is hydra and compose("mine").answer == 42
    assert (logger.level, list(logger.handlers), messages.get_verbosity(), logging.getLogger().level) == world


@pytest.mark.slow
def test_twice_in_a_row_from_threads_and_at_the_same_time(model: Any, tokenizer: Any, tokens: torch.Tensor) -> None:
    plans, errors = [], []

    def work() -> None:
        try:
            plans.append(pruneexp.prune(model, tokenizer, tokens).plan)
        except Exception as error:  # shown below, in the main thread
            errors.append(error)

    work()
    work()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(plans) == 4 and all(plan == plans[0] for plan in plans)


@pytest.mark.slow
def test_sweeps_give_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["evaluator=[size]", "dataset.samples=4", "sweep.dir=sweep"]
    jobs = pruneexp.run(["--multirun", "sparsity.ratio=0.2,0.4", *typed])
    assert [one.metrics["sparsity/decoder"] for one in jobs] == pytest.approx([0.2, 0.4], abs=0.03)
    assert all(one.model is None and one.plan.sites and (one.folder / "metrics.json").is_file() for one in jobs)
    with pytest.raises(pruneexp.ConfigError, match="sparsity.ratio=2"):
        pruneexp.run(["--multirun", "sparsity.ratio=0.2,2", *typed])
    with pytest.raises(pruneexp.ConfigError, match="expected a list"):
        pruneexp.run("recipe=flap")
    for option in ("--config-dir", "--cfg"):
        with pytest.raises(pruneexp.ConfigError, match=f"{option}: an option of the command.*config_dir='DIR'"):
            pruneexp.run([option, "mine"])
    dry = pruneexp.run(["run.dry=true", "dataset.samples=4"])
    assert dry.model is None and dry.plan is None and dry.metrics["forecast/params"] > 0
    with pytest.raises(pruneexp.ConfigError, match="holds no model"):
        dry.save("nowhere")


@pytest.mark.slow
def test_a_given_model_is_the_model() -> None:
    """Mixtures too, whose fused experts get linear layers of their own."""
    for name in sorted(TINY):
        check_given(name)


def check_given(name: str) -> None:
    given = tiny_model(name).float().eval()
    tokens_NT = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    source = GivenModel(given, None, 4, in_place=False)
    source.check()
    with torch.no_grad():
        logits = given(tokens_NT).logits
        model = source.load()
        torch.testing.assert_close(model.module(tokens_NT).logits, logits, rtol=1e-5, atol=1e-5, msg=name)
    outline = source.outline()
    assert outline.sites() == model.sites() and outline.params == model.params
    assert all(parameter.is_meta for parameter in outline.module.parameters())


def test_a_pruned_model_is_pruned_again(model: Any, tokenizer: Any, tokens: torch.Tensor) -> None:
    once = pruneexp.prune(model, tokenizer, tokens, ratio=0.2)
    twice = pruneexp.prune(once.model, tokenizer, tokens, ratio=0.2)
    assert twice.metrics["dense/params"] == once.metrics["pruned/params"] > twice.metrics["pruned/params"]


def test_merged_adapters_are_weights_like_others(model: Any, tokenizer: Any, tokens: torch.Tensor) -> None:
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        deepcopy(model), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    with pytest.raises(pruneexp.ConfigError, match=r"model: is a Peft.*merge_and_unload"):
        pruneexp.prune(adapted.eval(), tokenizer, tokens)
    merged = adapted.merge_and_unload().eval()
    result = pruneexp.prune(merged, tokenizer, tokens)
    assert result.metrics["pruned/params"] < result.metrics["dense/params"]
    assert result.plan != pruneexp.prune(model, tokenizer, tokens).plan


def wrong_models(model: Any) -> dict[str, tuple[Any, str]]:
    from copy import deepcopy

    training, hooked, meta, half, compiled, layers, dynamic = (deepcopy(model) for _ in range(7))
    training.train()
    hooked.model.layers[1].register_forward_hook(lambda *_: None)
    eight_bits = torch.ones(128, 344, dtype=torch.int8)
    half.model.layers[0].mlp.down_proj.weight = nn.Parameter(eight_bits, requires_grad=False)
    for layer in layers.model.layers:
        layer.compile()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch would rather have torchao do it
        dynamic = torch.ao.quantization.quantize_dynamic(dynamic, {nn.Linear})
    by_torchao = {"quantised by torchao": (quantised(model), "model: is quantised")} if find_spec("torchao") else {}
    return {
        "training": (training, "model: is in training mode; expected model.eval()"),
        "hooked": (hooked, "model: has a hook of somebody else's on model.layers.1"),
        "meta": (meta.to("meta"), "model: has weights on the meta device"),
        "quantised": (half, "model: is quantised; expected the full-precision model"),
        "quantised layers": (dynamic, "model: is quantised; expected the full-precision model"),
        **by_torchao,
        "compiled": (torch.compile(compiled), "model: is compiled; expected the model as it was"),
        "compiled layers": (layers, "model: is compiled; expected the model as it was"),
        "a class": (type(model), "model: is the class LlamaForCausalLM; expected a model of it"),
        "no model": (nn.Linear(2, 2), "model: is a Linear; expected a transformers PreTrainedModel"),
        "no head": (model.model, "model: is a LlamaModel; expected LlamaForCausalLM"),
        "another family": (other_family(), "model: model_type 'mamba' is not supported; expected one of"),
    }


def quantised(model: Any) -> Any:
    from copy import deepcopy

    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]

    quantize_(made := deepcopy(model), Int8WeightOnlyConfig())
    return made


def other_family() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4)).eval()


@pytest.mark.slow
def test_what_cannot_be_pruned_is_one_line_and_untouched(model: Any, tokenizer: Any, tokens: torch.Tensor) -> None:
    for name, (wrong, message) in wrong_models(model).items():
        for in_place in (False, True):
            with pytest.raises(pruneexp.ConfigError) as caught:
                pruneexp.prune(wrong, tokenizer, tokens, in_place=in_place)
            assert str(caught.value).startswith(message) and "\n" not in str(caught.value), name
        with pytest.raises(pruneexp.ConfigError):
            pruneexp.apply(wrong, pruneexp.Plan({}))
    too_long = torch.zeros(2, model.config.max_position_embeddings + 1, dtype=torch.long)
    for wrong, message in (
        (tokens.float(), "tokens: of type float32"),
        (tokens[0], r"tokens: of shape \[48\]"),
        (tokens[:0], r"tokens: of shape \[0, 48\]"),
        (tokens[:, :1], r"tokens: of shape \[12, 1\]"),
        ("text", "tokens: a str; expected token windows"),
        (tokens + 10_000, "tokens: token id .* out of the model's vocabulary"),
        (-tokens, "tokens: token id .* out of the model's vocabulary"),
        (too_long, "tokens: windows of 513 tokens"),
    ):
        with pytest.raises(pruneexp.ConfigError, match=message):
            pruneexp.prune(model, tokenizer, wrong)
    for settings, message in (
        ({"recipe": "flapp"}, "recipe=flapp: expected one of .*; did you mean recipe=flap"),
        ({"recipe": ["search.effort=3"]}, r"recipe=\['search.effort=3'\]: expected a recipe's name; settings are ov"),
        ({"ratio": 2}, "sparsity.ratio=2"),
        ({"overrides": ["model=hf"]}, "model=hf: the model is given"),
        ({"overrides": ["+sweep=grid"]}, r"\+sweep=grid: a sweep is of many runs"),
        ({"overrides": ["run.dir=x"]}, "run.dir=x: .*`folder` says"),
        ({"overrides": ["run={dry:true}"]}, "run={dry:true}: .*`folder` says"),
        ({"overrides": ["dataset.samples=4"]}, "dataset.samples=4: calibration windows are given"),
        ({"overrides": ["tracker=wandb"]}, "tracker=wandb: .*expected folder='PATH'"),
        ({"folder": ""}, "folder='': expected the path of a folder"),
        ({"overrides": ["evaluator=[perplexity]"]}, "dataset.evaluation=null"),
        ({"criterio": object()}, "criterio=.*: unknown; expected one of criterion"),
        ({"criterion": object()}, "criterion: object has no evidence, __call__"),
        ({"criterion": Energy(judges="attention")}, "criterion.judges='attention': expected a tuple of attention, mlp"),
        ({"criterion": Energy(sequential="yes")}, "criterion.sequential='yes': expected True, False or 'always'"),
        ({"criterion": Energy(evidence="Moments")}, "criterion.evidence: 'Moments' has no source and no empty; exp"),
        ({"search": Lowest(granularity="heads")}, "search.granularity='heads': expected a list of heads, channels"),
        ({"search": Lowest(granularity=["rows"])}, r"search.granularity=\['rows'\]: expected a list of heads"),
        ({"search": Lowest(held_out=2)}, r"search.held_out=2: expected a share of the windows, in \[0, 1\)"),
        ({"search": Lowest(objective="loss")}, "search.objective='loss': expected next_token or kl"),
        ({"search": Lowest(starts=["flap"])}, r"search.starts=\['flap'\]: expected criteria by name"),
        ({"search": Lowest(starts={"one": object()})}, "search.starts.one: object has no evidence, __call__"),
        ({"criterion": nn.Linear}, r"criterion: got the class Linear; expected an object of it, Linear\(...\)"),
    ):
        with pytest.raises(pruneexp.ConfigError, match=message):
            pruneexp.prune(model, tokenizer, tokens, **settings)
    assert not list(Path().iterdir())


@pytest.mark.slow
def test_the_card_of_a_given_model_names_no_command(model: Any, tokens: torch.Tensor) -> None:
    pruneexp.prune(model, None, tokens).save("by_recipe")
    pruneexp.prune(model, None, tokens, criterion=Energy()).save("by_object")
    cards = [Path(folder, "README.md").read_text() for folder in ("by_recipe", "by_object")]
    assert not any("## The command" in text for text in cards)
    assert ["(recipe `flap`)" in text for text in cards] == [True, False]


def test_objects_of_ones_own_prune(model: Any, tokenizer: Any, tokens: torch.Tensor) -> None:
    """With no more than their protocols ask for; beside each other, and with a start that is one's own, too."""
    own = {"criterion": Energy(), "search": Lowest(), "compensator": Slice()}
    together = pruneexp.prune(model, tokenizer, tokens, **own)
    for alone in own:
        result = pruneexp.prune(model, tokenizer, tokens, **{alone: own[alone]})
        assert result.metrics["sparsity/decoder"] > 0.1
    plan = pruneexp.prune(model, tokenizer, tokens, **{**own, "search": Lowest(starts={"mine": Energy()})}).plan
    assert plan == together.plan and together.plan is not None


@pytest.mark.parametrize("error", [NotImplementedError, StopIteration])
def test_an_object_that_raises_without_a_word_is_told_by_its_place(
    error: type[Exception], model: Any, tokenizer: Any, tokens: torch.Tensor
) -> None:
    def unfinished(*_: Any) -> Any:
        raise error

    def misspelt(self: Any, weight_OC: Any, bias_O: Any, evidence: Any, keep_C: Any) -> Any:
        return weight_OC.shap

    for method, said in ((unfinished, ""), (misspelt, ".*has no attribute 'shap', ")):
        own = type("Unfinished", (Slice,), {"__call__": method})()
        kind = "AttributeError" if said else error.__name__
        place = rf"raised in {method.__name__} \(.*test_api\.py, line \d+\)"
        with pytest.raises(pruneexp.RunError, match=f"^{kind}: {said}{place}"):
            pruneexp.prune(model, tokenizer, tokens, compensator=own)


def test_an_object_asks_for_scores_behind_pruned_layers_where_there_are_some(
    model: Any, tokenizer: Any, tokens: torch.Tensor
) -> None:
    own = Flap("WIFV", sequential=True)
    with pytest.raises(pruneexp.ConfigError, match=r"^criterion.sequential=True: search=al_am decides over all layers"):
        pruneexp.prune(model, tokenizer, tokens, criterion=own)
    local = pruneexp.prune(model, tokenizer, tokens, overrides=["search=uniform"], criterion=own)
    dense = pruneexp.prune(model, tokenizer, tokens, overrides=["search=uniform"])
    assert local.plan.sites != dense.plan.sites
    assert pruneexp.prune(model, tokenizer, tokens, "wanda_sp", overrides=["search=global"]).plan, "its choice's own"


def test_other_windows_are_evaluated_where_a_dataset_is_named(
    model: Any, tokenizer: Any, tokens: torch.Tensor, build_from: Callable[..., Any]
) -> None:
    settings = ["dataset=embedded", "dataset.evaluation_samples=8", "evaluator=[perplexity]"]
    result = pruneexp.prune(model, tokenizer, tokens, overrides=settings)
    assert 1 < result.metrics["dense/ppl/embedded@128"] < result.metrics["pruned/ppl/embedded@128"]


def test_a_text_of_ones_own_is_evaluated_and_nothing_else_asked_of_it(
    model: Any, tokenizer: Any, tokens: torch.Tensor
) -> None:
    Path("test.txt").write_text("the dog sees the cat . " * 400)
    settings = ["dataset=text", "dataset.evaluation=test.txt", "dataset.length=32", "evaluator=[perplexity]"]
    result = pruneexp.prune(model, tokenizer, tokens, overrides=settings)
    assert result.metrics["pruned/ppl/test@32"] > 1


def test_weights_are_hashed_where_somebody_asks(
    model: Any, tokenizer: Any, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[GivenModel] = []
    first = GivenModel.fingerprint
    monkeypatch.setattr(GivenModel, "fingerprint", lambda self: hashed.append(self) or first(self))
    pruneexp.prune(model, tokenizer, tokens)
    assert not hashed
    pruneexp.prune(model, tokenizer, tokens, overrides=["cache=on", "cache.dir=kept"])
    assert len(hashed) == 1 and list(Path("kept").glob("*.safetensors"))


def test_a_head_that_holds_nan_is_named(model: Any, tokens: torch.Tensor) -> None:
    from copy import deepcopy

    broken = deepcopy(model)
    broken.lm_head.weight.data[3, 3] = float("nan")  # tied: the embedding, too
    with pytest.raises(pruneexp.RunError, match="embed_tokens.weight: weights hold NaN or Inf"):
        pruneexp.prune(broken, None, tokens)


@pytest.mark.slow
def test_the_import_is_light() -> None:
    code = (
        "import sys, pruneexp; assert not {'torch', 'hydra', 'transformers'} & set(sys.modules); pruneexp.ConfigError"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

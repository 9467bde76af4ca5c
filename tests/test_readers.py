"""Checkpoints with pruned layers in other hands: what servers, quantisers and other auto classes ask of them."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pruneexp.model import Model, modeling_pruned
from pruneexp.model.given import check_module
from pruneexp.surgery import save, shrink_
from pruneexp.types import Plan, SitePlan
from tests.cases import each

pytestmark = pytest.mark.usefixtures("modules_cache")

Loaded = Callable[..., Model]


def uneven_(model: Model, empty: bool = True) -> Model:
    """Other widths in every layer; `empty`: the first loses its attention, the second its FFN, the last both."""
    gone = {(0, "attention"), (1, "mlp"), (2, "attention"), (2, "mlp")} if empty else set()
    kept = {s.name: 0 if (s.layer, s.kind) in gone else max(1, s.units - 1 - s.layer) for s in model.sites()}
    shrink_(model, Plan({s.name: SitePlan(s.kind, s.units, tuple(range(kept[s.name]))) for s in model.sites()}))
    return model


def tokens() -> torch.Tensor:
    return torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(module: Any) -> torch.Tensor:
    return module(tokens()).logits


@each("stock", sorted({family.stock for family in modeling_pruned.FAMILIES.values()}))
def test_servers_compare_arguments_with_annotations_that_are_no_strings(stock: str) -> None:
    """vLLM's compiler tells a model's arguments apart by the annotations of `__init__`, if there are any."""
    for suffix in modeling_pruned.AUTO_CLASSES.values():
        made = getattr(modeling_pruned, f"Pruned{stock}{suffix}", None)
        if made is None:
            continue
        assert inspect.isfunction(made.__dict__["__init__"])  # signature() of anything else may come from elsewhere
        parameters = inspect.signature(made.__init__).parameters
        assert [p.annotation for p in parameters.values()] == [inspect.Parameter.empty] * len(parameters)
    forward = inspect.signature(getattr(modeling_pruned, f"Pruned{stock}Model").forward)
    assert not [p for p in forward.parameters.values() if isinstance(p.annotation, str)]


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])  # whose stock classes are called otherwise
def test_a_reloaded_model_is_one_to_prune_again(name: str, loaded: Loaded, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save(uneven_(loaded(name)), tmp_path / "model")
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    assert type(module).__name__.startswith("Pruned")
    check_module(module)


@pytest.mark.parametrize("name", ["bloom", "falcon_rw"])
def test_a_pruned_model_with_alibi_can_be_pickled(name: str, loaded: Loaded) -> None:
    module = uneven_(loaded(name), empty=False).module
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(logits(again), logits(module))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "qwen2"])
def test_a_classifier_starts_from_the_pruned_layers(name: str, loaded: Loaded, tmp_path: Path) -> None:
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    model = uneven_(loaded(name))
    save(model, tmp_path / "model")
    kinds = [(AutoModelForSequenceClassification, (2, 5)), (AutoModelForTokenClassification, (2, 12, 5))]
    settings = {"trust_remote_code": True, "dtype": torch.float64}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **settings)
    with torch.no_grad():
        expected = plain.base_model(tokens()).last_hidden_state
    for auto_class, shape in kinds[:1] if name == "opt" else kinds:  # transformers has no token classifier of OPT
        classifier = auto_class.from_pretrained(tmp_path / "model", num_labels=5, **settings).eval()
        assert logits(classifier).shape == shape
        assert torch.equal(classifier.base_model(tokens()).last_hidden_state, expected)


def test_a_folder_names_the_classes_that_there_are(loaded: Loaded, tmp_path: Path) -> None:
    for name, count in (("granite", 3), ("opt", 4), ("llama", 5)):
        save(uneven_(loaded(name)), tmp_path / name / "model")
        auto_map = json.loads((tmp_path / name / "model" / "config.json").read_text())["auto_map"]
        assert len(auto_map) == count
        for path in auto_map.values():
            assert isinstance(getattr(modeling_pruned, path.removeprefix("modeling_pruned.")), type)


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "mixtral", "gpt2", "gemma3"])
def test_checkpoints_of_older_versions_hold_empty_weights(name: str, loaded: Loaded, tmp_path: Path) -> None:
    """They had linear layers without inputs where a sublayer was gone."""
    model = uneven_(loaded(name))
    expected, folder = logits(model.module), tmp_path / "model"
    save(model, folder)
    tensors, hidden = load_file(folder / "model.safetensors"), model.config.hidden_size
    family, count = model.family, len(tensors)
    for index in (0, 2):
        prefix = f"{model.layers_path}.{index}."
        tensors[f"{prefix}{family.attention_out}.weight"] = torch.empty(hidden, 0, dtype=torch.float64)
    if not family.experts:
        for index in (1, 2):
            prefix = f"{model.layers_path}.{index}."
            tensors[f"{prefix}{family.mlp_out}.weight"] = torch.empty(hidden, 0, dtype=torch.float64)
            for in_projection in family.mlp_in:
                tensors[f"{prefix}{in_projection.path}.weight"] = torch.empty(0, hidden, dtype=torch.float64)
    assert len(tensors) > count
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(logits(loaded(name, folder).module), expected)


def test_servers_find_an_attention_in_every_layer(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM makes a cache of each layer's heads and hands it to the module that calls the attention interface under the
    layer's number: a layer without attention has a module that would, and heads."""
    from transformers import AutoConfig, AutoModel
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = uneven_(loaded("qwen3"))
    expected = logits(model.module)
    save(model, tmp_path / "model")
    again = loaded("qwen3", tmp_path / "model")
    assert again.kv_elements == model.kv_elements == 2 * 16 * 1  # the middle layer's
    assert torch.equal(logits(again.module), expected)
    config = AutoConfig.from_pretrained(tmp_path / "model", trust_remote_code=True)
    heads = [(layer.num_attention_heads, layer.num_key_value_heads) for layer in config.per_layer_config]
    assert heads == [(2, 1)] * 3
    assert [layer.attention_removed for layer in config.per_layer_config] == [True, False, True]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", ALL_ATTENTION_FUNCTIONS["sdpa"])
    config._attn_implementation = "vllm"
    with torch.device("meta"):
        served = AutoModel.from_config(config, trust_remote_code=True)
    for index, layer in enumerate(served.layers):
        assert layer.self_attn.layer_idx == index and layer.self_attn.config._attn_implementation == "vllm"
        source = inspect.getsource(type(layer.self_attn).forward)
        assert "attention_interface" in source and source.count("ALL_ATTENTION_FUNCTIONS") >= 1


def test_heads_are_of_one_size_for_readers_that_divide(loaded: Loaded, tmp_path: Path) -> None:
    save(uneven_(loaded("opt")), tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["head_dim"] == 8


def test_what_vllm_does_not_serve_says_what_to_type(loaded: Loaded, tmp_path: Path) -> None:
    from pruneexp.surgery import vllm_note

    said = {
        name: vllm_note(save(uneven_(loaded(name)), tmp_path / f"pruned_{name}").config)
        for name in ("bloom", "mixtral", "opt")
    }
    assert said["bloom"].endswith("expected pruneexp-export RUN_FOLDER format=padded out=PATH")
    assert said["mixtral"].endswith("expected a run with search=uniform search.alike=true")
    assert said["opt"] == ""
    assert vllm_note(save(loaded("bloom"), tmp_path / "dense").config) == ""  # stock: vLLM has a class of its own


def with_tokenizer(model: Model) -> Model:
    """With one of a word for each token, w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2")
    return model


@pytest.mark.parametrize("terminal", [False, True])
def test_a_tokenizer_needs_no_code(
    terminal: bool, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5 reads config.json before it looks whose tokenizer it is: with `trust_remote_code=False` it asks
    nobody, and without a terminal the question is answered with no."""
    import builtins

    from transformers import AutoTokenizer

    save(with_tokenizer(uneven_(loaded("llama"))), tmp_path / "model")

    def ask(_question: str) -> str:
        assert not terminal, "somebody was asked"
        raise EOFError

    monkeypatch.setattr(builtins, "input", ask)
    settings = {"trust_remote_code": False} if terminal else {}
    assert AutoTokenizer.from_pretrained(tmp_path / "model", **settings)("w5 w9").input_ids == [5, 9]
    named = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert named["tokenizer_class"] and "auto_map" not in named


@each("name", ("bloom", "gpt2", "phi4_mini"))
def test_a_tokenizer_needs_no_code_where_one_layer_keeps_all(name: str, loaded: Loaded, tmp_path: Path) -> None:
    """Numbers of heads stand in config.json under the class's own name of them, or rotations are checked by them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = with_tokenizer(loaded(name))
    kept = {s.name: s.units - (s.layer > 0) for s in model.sites()}
    shrink_(model, Plan({s.name: SitePlan(s.kind, s.units, tuple(range(kept[s.name]))) for s in model.sites()}))
    save(model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=False)
    assert tokenizer("w5 w9").input_ids == [5, 9]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    torch.testing.assert_close(logits(again.eval()), logits(model.module))
    assert loaded(f"{name} again", tmp_path / "model").structures == model.structures

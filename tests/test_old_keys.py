"""config.json as readers older than transformers 5 know it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pruneexp
from pruneexp.model import ModelSource, modeling_pruned
from pruneexp.surgery import remote_code_form, save
from pruneexp.surgery.old_keys import with_old_keys
from tests.cases import each
from tests.tiny_families import TINY, random_model

EMBEDDED = Path(pruneexp.__file__).parent / "embedded" / "llama"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 2.0, 4.0]}
_QWEN2 = {name: value for name, value in TINY["qwen2"][1].items() if name != "tie_word_embeddings"}


def rotated(name: str, rope: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return TINY[name][0], {**TINY[name][1], "rope_parameters": rope}


CASES: dict[str, tuple[tuple[str, dict[str, Any]], dict[str, Any]]] = {  # model, what readers of old look for
    "theta": (
        ("Llama", {**_QWEN2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
        {"rope_theta": 1e5},
    ),
    "llama3": (
        ("Llama", {**_QWEN2, "rope_parameters": LLAMA3}),
        {"rope_theta": 5e5, "rope_scaling": {name: v for name, v in LLAMA3.items() if name != "rope_theta"}},
    ),
    "gemma3": (
        rotated(
            "gemma3",
            {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e5},
            },
        ),
        {
            "rope_theta": 3e5,
            "rope_local_base_freq": 5e3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "phi3": (
        TINY["phi4_mini"],
        {
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 32,
            "rope_scaling": {"type": "longrope", **LONG},
        },
    ),
    "stablelm": (
        rotated("stablelm", {"rope_type": "default", "rope_theta": 7e4, "partial_rotary_factor": 0.5}),
        {"rope_theta": 7e4, "partial_rotary_factor": 0.5},
    ),
    "pythia": (
        rotated("pythia", {"rope_type": "default", "rope_theta": 7e4, "partial_rotary_factor": 0.5}),
        {"rotary_emb_base": 7e4, "rotary_pct": 0.5},
    ),
    "qwen3_moe": (TINY["qwen3_moe"], {"num_experts": 4, "num_local_experts": 4, "rope_theta": 1e4}),
    "gpt2": (TINY["gpt2"], {"n_embd": 48}),
}


@each("case", CASES)
def test_old_names_stand_beside_the_new_ones(case: str, tmp_path: Path) -> None:
    made, old = CASES[case]
    random_model(*made).save_pretrained(tmp_path / "dense")
    model = ModelSource(case, str(tmp_path / "dense"), None, "float64", "cpu", False, False, 4).load()
    assert save(model, tmp_path / "model").kind == "stock"
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert old.items() <= written.items() and written["torch_dtype"] == "float64"
    assert ("rope_scaling" in written) == (case in ("llama3", "gemma3", "phi3"))  # nobody warns of what is not there


@each("case", CASES)
def test_the_reader_of_today_takes_the_same_from_both(case: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    made, _ = CASES[case]
    config = random_model(*made).config
    config.save_pretrained(tmp_path)
    plain = AutoConfig.from_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(with_old_keys(json.loads(file.read_text()))))
    both = AutoConfig.from_pretrained(tmp_path)
    rope_parameters = getattr(both, "rope_parameters", None) or {}
    if case == "phi3":  # keeps the old name of the type, too
        rope_parameters = {name: value for name, value in rope_parameters.items() if name != "type"}
    assert rope_parameters == (getattr(plain, "rope_parameters", None) or {})
    assert both.dtype == plain.dtype


YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 16}
PRUNED = {  # rotations that transformers 5 takes up only where it knows the longest window
    "llama3": CASES["llama3"],
    "phi3": CASES["phi3"],
    "olmo3": (
        rotated("olmo3", {"sliding_attention": {"rope_type": "default", "rope_theta": 5e5}, "full_attention": YARN}),
        {"rope_theta": 5e5, "rope_scaling": {name: v for name, v in YARN.items() if name != "rope_theta"}},
    ),
}


@each("case", PRUNED)
def test_tokenizers_of_pruned_layers_need_no_code_however_they_rotate(case: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made, old = PRUNED[case]
    random_model(*made).save_pretrained(tmp_path / "dense")
    for file in EMBEDDED.glob("tokenizer*"):
        (tmp_path / "dense" / file.name).write_bytes(file.read_bytes())
    model = ModelSource(case, str(tmp_path / "dense"), None, "float64", "cpu", False, False, 4).load()
    save(model, tmp_path / "model", remote_code_form(model, "asked for"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=False)
    assert tokenizer.get_vocab() == model.tokenizer.get_vocab()

    def stock(self: Any, **values: Any) -> None:
        self.values = values

    written = json.loads((tmp_path / "model" / "config.json").read_text())
    before = type("Stock", (), {"__init__": stock})  # a config's class of transformers 4
    pruned = type("Pruned", (before,), {"__init__": modeling_pruned._old_init_of(before)})
    assert old.items() <= pruned(**written).values.items()


def test_what_is_there_is_kept() -> None:
    assert with_old_keys({"model_type": "bloom", "dtype": None}) == {"model_type": "bloom", "dtype": None}
    given = {"model_type": "llama", "rope_parameters": {"rope_theta": 2.0}, "rope_theta": 3.0}
    assert with_old_keys(given)["rope_theta"] == 3.0


def test_an_older_transformers_is_told_which_version_it_takes(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    config = remote_code_form(tiny("llama"), "asked for").config
    monkeypatch.setattr(transformers, "__version__", "4.56.2")
    with pytest.raises(ImportError, match=r"^Llama models with pruned layers need transformers >= 4\.57; 4\.56\.2 is"):
        modeling_pruned.__getattr__("PrunedLlamaForCausalLM")(config)


def test_layers_are_read_where_transformers_knows_nothing_of_them(tiny: Callable[..., Any]) -> None:
    from types import SimpleNamespace

    model = tiny("llama")
    config = remote_code_form(model, "asked for").config
    layout = modeling_pruned.head_layout(model.family, model.config)
    plain = SimpleNamespace(**{**config.to_dict(), "num_hidden_layers": 3})  # `per_layer_config` is a dict of strings
    plain.per_layer_config = {"1": {"intermediate_size": 7}, **{str(i): {} for i in (0, 2)}}
    plain.attention_output_bias = plain.mlp_output_bias = False
    assert [s.intermediate_size for s in modeling_pruned.layer_structures(plain, layout)] == [40, 7, 40]

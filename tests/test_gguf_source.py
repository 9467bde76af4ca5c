"""A GGUF file as the model to prune: the model that transformers reads from it; one line where that cannot be."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pruneexp.__main__ import main
from pruneexp.export.gguf_vocabulary import _split_name
from pruneexp.files import process_name
from pruneexp.model import ModelSource
from pruneexp.model.gguf_source import converted_folder
from pruneexp.model.gguf_words import SPLITS, restore_split_
from pruneexp.types import ConfigError
from tests.cases import each
from tests.real_models import smollm2_folder, smollm2_gguf
from tests.tiny_families import random_model

gguf = pytest.importorskip("gguf")

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
TINY = {
    **{"vocab_size": 64, "hidden_size": 48, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6},
    **{"num_key_value_heads": 3, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2},
}
STRETCHED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


@pytest.fixture
def tokens_BT() -> torch.Tensor:
    return torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))


def llama(**values: Any) -> Any:
    return random_model("Llama", {**TINY, **values}).float()


def write(model: Any, file: Path, without: tuple[str, ...] = (), **changes: Any) -> Path:
    """A LLaMA as llama.cpp's converter writes it, in float32; `changes`: values of the header."""
    config, architecture = model.config, changes.pop("architecture", "llama")
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("Tiny")
    for add, value in (
        (writer.add_context_length, config.max_position_embeddings),
        (writer.add_embedding_length, config.hidden_size),
        (writer.add_block_count, config.num_hidden_layers),
        (writer.add_feed_forward_length, config.intermediate_size),
        (writer.add_rope_dimension_count, config.head_dim),
        (writer.add_head_count, config.num_attention_heads),
        (writer.add_head_count_kv, config.num_key_value_heads),
        (writer.add_layer_norm_rms_eps, config.rms_norm_eps),
        (writer.add_rope_freq_base, config.rope_parameters["rope_theta"]),
        (writer.add_vocab_size, config.vocab_size),
        (writer.add_eos_token_id, 2),
        (writer.add_eot_token_id, 5),
        *((getattr(writer, f"add_{name}"), value) for name, value in changes.items() if name != "rope_freqs"),
    ):
        add(value)
    names = {
        **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
        **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"},
        **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
        **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
        "model.layers.": "blk.",
    }
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp turns neighbours, transformers halves
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        for own, other in names.items():
            name = name.replace(own, other)
        if name not in without:
            writer.add_tensor(name, tensor.contiguous().numpy())
    if "rope_freqs" in changes:
        writer.add_tensor("rope_freqs.weight", changes["rope_freqs"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def llama3_factors(model: Any) -> torch.Tensor:
    """What the rotary frequencies are divided by."""
    size = model.config.head_dim
    plain = model.config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    return plain / model.model.rotary_emb.inv_freq


def source(file: Path, **settings: Any) -> ModelSource:
    plain = {"name": "tiny", "revision": None, "dtype": "float32", "device": "cpu", "stream": False}
    return ModelSource(path=str(file), **{**plain, "trust_remote_code": False, "batch_size": 4, **settings})


CASES = {
    "tied": ({"tie_word_embeddings": True}, {}),
    "head": ({}, {}),
    "linear": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": 4.0},
    ),
    "llama3": ({"rope_parameters": STRETCHED, "head_dim": 32}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_model_that_the_file_was_made_from(case: str, tokens_BT: torch.Tensor, tmp_path: Path) -> None:
    values, changes = CASES[case]
    model = llama(**values)
    if case == "llama3":
        changes = {"rope_freqs": llama3_factors(model)}
        assert changes["rope_freqs"].unique().numel() > 2, "some are stretched, some are not, some in between"
    file = write(model, tmp_path / "Tiny.gguf", **changes)
    loaded = source(file).load()
    assert loaded.config.tie_word_embeddings == (case == "tied")
    with torch.no_grad():
        logits, expected = (each(tokens_BT).logits for each in (loaded.module, model))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_it_is_kept_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(llama(), tmp_path / "Tiny.gguf")
    one = source(file, dtype="auto")
    assert one.local_folder() is None, "nothing is converted before it is asked for"
    folder = one.folder()
    assert folder.is_relative_to(tmp_path / "home") and one.local_folder() == folder
    monkeypatch.setattr("pruneexp.model.gguf_source._write", None)  # not a second time
    assert one.load().dtype == torch.bfloat16 and source(file, dtype="auto").outline().params == one.outline().params
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
    fingerprint = one.fingerprint()
    assert fingerprint["path"] == str(file) and fingerprint["gguf"]["file"] == "Tiny.gguf"
    assert len(fingerprint["gguf"]["sha256"]) == 64 and "dequantised" in fingerprint["gguf"]["made"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "weights are as open to others as the rest"
    assert [path.name for path in folder.parent.iterdir() if not path.name.endswith(".lock")] == [folder.name]


def test_what_killed_processes_left_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their numbers may be in use again: ours, in a container. And what is there is read where nothing is written."""
    one = source(write(llama(), tmp_path / "Tiny.gguf"))
    place = converted_folder(tmp_path / "Tiny.gguf", one.dtype)
    number, machine = process_name().split("-")
    for left in (number, str(2**22 + 1)):
        (place.parent / f".{place.name}.{left}-{machine}.tmp").mkdir(parents=True)
    elsewhere = place.parent / f".{place.name}.{number}-abcdef.tmp"
    elsewhere.mkdir()
    assert one.folder() == place
    assert sorted(path.name for path in place.parent.iterdir() if path.is_dir()) == sorted([place.name, elsewhere.name])

    def read_only(*_args: Any, **_keys: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("filelock.FileLock.acquire", read_only)
    assert one.folder() == place


@pytest.mark.slow
def test_a_run_prunes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy

    monkeypatch.chdir(tmp_path)
    write(llama(), tmp_path / "Tiny.gguf")
    numpy.save("tokens.npy", numpy.random.default_rng(0).integers(3, 64, (4, 16)))
    texts = ["dataset=tokens", "dataset.calibration=tokens.npy", "dataset.evaluation=tokens.npy"]
    typed = ["model=hf", "model.path=Tiny.gguf", *texts, "evaluator=[size]", "cache=off", "run.prove=in_place"]
    assert main([*typed, "run.dir=run"]) == 0
    environment, proof = (json.loads(Path("run", f"{n}.json").read_text()) for n in ("environment", "proof"))
    assert environment["model"]["gguf"]["file"] == "Tiny.gguf"
    assert proof["source"]["compared"] and proof["source"]["relative_difference"] < 0.01
    assert main([*typed, "run.dir=dry", "run.dry=true"]) == 0


def damaged(content: bytes, file: Path) -> Path:
    file.write_bytes(content)
    return file


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not_there": (lambda file: file, "no such file; expected"),
    "no_gguf": (lambda file: damaged(b"something else", file), "it is no GGUF file"),
    "old": (lambda file: damaged(b"GGUF\1\0\0\0", file), "version 1 of the format"),
    "header": (lambda file: damaged(write(llama(), file).read_bytes()[:200], file), "cut short"),
    "tensors": (lambda file: damaged(write(llama(), file).read_bytes()[:9000], file), "cut short"),
    "family": (lambda file: write(llama(), file, architecture="mamba"), "architecture 'mamba'; expected one of bloom"),
    "mixture": (lambda file: write(llama(), file, expert_count=4), "a mixture of experts"),
    "yarn": (
        lambda file: write(llama(), file, rope_scaling_type=gguf.RopeScalingType.YARN),
        "stretches rotary positions \\(rope.scaling.type=yarn\\)",
    ),
    "factors": (lambda file: write(llama(), file, rope_freqs=torch.tensor([1.0, 3, 2, 8])), "\\(rope_freqs.weight\\)"),
    "split": (lambda file: write(llama(), file, custom_alignment=64, split=2), "is one of 2 files"),
}


@each("case", REFUSED)
def test_what_its_header_tells_is_told_at_once(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, said = REFUSED[case]
    monkeypatch.setattr(gguf.GGUFWriter, "add_split", lambda self, n: self.add_uint16("split.count", n), raising=False)
    file = tmp_path / "Tiny.gguf"
    make(file)
    monkeypatch.setattr("pruneexp.model.source.convert", None)
    with pytest.raises(ConfigError, match=f"model.path='{file}': .*{said}"):
        source(file).check()


def test_it_is_not_streamed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.stream=true: expected false with a GGUF file"):
        source(write(llama(), tmp_path / "Tiny.gguf"), stream=True).check()


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(llama(), tmp_path / "Tiny.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package gguf: pip install 'pruneexp\[gguf\]'"):
        source(file).check()


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    file = write(llama(), tmp_path / "Tiny.gguf", without=("blk.1.ffn_up.weight",))
    with pytest.raises(ConfigError, match=r"holds no weights for model.layers.1.mlp.up_proj.weight"):
        source(file).load()


def test_what_transformers_has_against_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fails(*args: Any, **settings: Any) -> None:
        raise ValueError("a reason\nof two lines")

    file = write(llama(), tmp_path / "Tiny.gguf")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(ConfigError, match=r"cannot dequantise it \(ValueError: a reason of two lines\)$"):
        source(file).outline()
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize("name", [name for name, _ in SPLITS.values()])
def test_words_are_split_as_the_file_says(name: str) -> None:
    """What an export finds in the tokenizer is what the file called it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    restore_split_(tokenizer, name, "Tiny.gguf")
    assert _split_name(json.loads(tokenizer.backend_tokenizer.to_str())) == name


def test_a_way_of_splitting_words_that_is_not_known_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "pruneexp"):
        restore_split_(None, "tekken", "Tiny.gguf")
    assert "model.path='Tiny.gguf'" in caplog.text and "'tekken'" in caplog.text


@pytest.mark.slow
def test_smollm2_is_what_plain_transformers_reads(monkeypatch: pytest.MonkeyPatch, dtype: str = "bfloat16") -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("GGUFReader", "get_tensor_name_map"):  # transformers asks for the same again and again
        monkeypatch.setattr(gguf, name, cache(getattr(gguf, name)))
    file, folder = smollm2_gguf(), smollm2_folder(dtype)
    written = json.loads((folder / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows no other of its kind
    place = {"gguf_file": file.name}
    tokenizer, plain_tokenizer = (AutoTokenizer.from_pretrained(*each, **how) for each, how in (
        ((folder,), {}), ((file.parent,), place)
    ))  # fmt: skip
    text = "Whole attention heads leave the model.\nWhat remains is smaller."
    tokens = torch.tensor([tokenizer(text).input_ids])
    assert tokens[0].tolist() == plain_tokenizer(text).input_ids and tokens.shape[1] > 10
    counted = [len(tokenizer(words).input_ids) for words in ("a  2019 and   42", "List:\n\n1. one\n\n2. two", "x = 3")]
    assert counted == [10, 10, 4]  # llama.cpp's of the same file: digits stand alone, which transformers passes over
    assert tokenizer.chat_template == plain_tokenizer.chat_template and "<|im_start|>" in tokenizer.chat_template
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    model = source(folder, dtype=dtype).load()
    assert model.params == 134_515_008 and model.config.tie_word_embeddings
    with torch.no_grad():
        logits = model.module(tokens).logits
        del model
        plain: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=getattr(torch, dtype), **place)
        assert torch.equal(logits, plain(tokens).logits)

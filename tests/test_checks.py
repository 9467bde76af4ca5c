"""What is wrong with a checkpoint, told from its config and its files' headers before a weight is loaded."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pruneexp.model import ModelSource, checkpoint, checks, hub
from pruneexp.types import ConfigError
from tests.conftest import PARITY

Source = Callable[..., ModelSource]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a small LLaMA checkpoint (LLaMA, 64 hidden, 4 layers), to be damaged."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(PARITY / name, copy)
    return copy


def edit_config(folder: Path, **values: Any) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **values}
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(source: Source, folder: Path) -> str:
    """What a run says before it tokenises anything, without the path."""
    made = source(folder)
    with pytest.raises(ConfigError) as error:
        made.check()
        made.outline()
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"model.path={str(folder)!r}: ")


# Files


def header(entries: dict[str, Any]) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda whole: b"", "it is empty"),
    "cut in the data": (lambda whole: whole[:-100], "it is cut short: {cut:,} of {whole:,} bytes"),
    "cut in the header": (lambda whole: whole[:200], "it is cut short: 200 bytes, not even its whole header"),
    "noise": (lambda whole: bytes(range(256)) * 8, "it is no safetensors file"),
    "a web page": (lambda whole: b"<!doctype html><p>not found</p>", "it is no safetensors file"),
    "header no JSON": (lambda whole: whole[:8] + b"{" * 64 + whole[72:], "its header is damaged: ..."),
    "header of other shapes": (
        lambda whole: whole.replace(b"[64]", b"[65]", 1),
        "its header is damaged: model.layers.0.input_layernorm.weight has 256 bytes, its shape is of 260",
    ),
    "header of less": (lambda whole: whole + b"0000", "its header is damaged: it speaks of ..."),
    "header of other things": (lambda whole: header({"a": 3}), "its header is damaged: ..."),
    "a Git LFS pointer": (
        lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n",
        "it is a Git LFS pointer in the place of the weights, which `git lfs pull` fetches",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_read(case: str, source: Source, folder: Path) -> None:
    damage, reason = BROKEN[case]
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    reason = reason.format(cut=len(whole) - 100, whole=len(whole))
    said = refusal(source, folder)
    if reason.endswith("..."):
        assert said.startswith(f"model.safetensors cannot be read ({reason.removesuffix('...')}")
    else:
        assert said == f"model.safetensors cannot be read ({reason})"


@pytest.mark.parametrize("weight_map", [{}, {"a": 3}, ["model.safetensors"]])
def test_an_index_that_is_none(weight_map: Any, source: Source, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(source, folder).startswith("model.safetensors.index.json is no index of tensors (")


def test_an_index_that_names_what_its_shards_lack(source: Source, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model-00001-of-00001.safetensors")
    said = refusal(source, folder)
    assert said == "the checkpoint does not fit its config: it lacks model.layers.1.mlp.up_proj.weight"


# Configs


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_hidden_layers": 0}, "config.json says num_hidden_layers=0; expected an integer >= 1"),
        ({"vocab_size": -3}, "config.json says vocab_size=-3; expected an integer >= 1"),
        ({"num_key_value_heads": 0}, "config.json says num_key_value_heads=0; expected an integer >= 1"),
        (
            {"num_key_value_heads": 3},
            "config.json says num_attention_heads=4, which is no multiple of num_key_value_heads=3",
        ),
        ({"num_hidden_layers": "two"}, "config.json does not describe a llama model ("),
        ({"num_hidden_layers": 5}, "the checkpoint does not fit its config: it lacks model.layers.4."),
        ({"num_hidden_layers": 3}, "the checkpoint does not fit its config: it has besides model.layers.3."),
        ({"hidden_act": "nonsense"}, "transformers 5."),
        ({"rope_theta": "x"}, "transformers 5."),
        ({"model_type": ...}, "config.json names no model_type; expected one of apertus, "),
    ],
    ids=str,
)
def test_configs_that_cannot_be(values: dict[str, Any], said: str, source: Source, folder: Path) -> None:
    edit_config(folder, **values)
    message = refusal(source, folder)
    assert message.startswith(said)
    if said == "transformers 5.":
        assert "cannot make a llama model of this config.json (" in message


def test_counts_go_by_the_names_in_the_file(source: Source, folder: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_embd=48, n_head=6, n_layer=0).save_pretrained(folder)
    assert refusal(source, folder) == "config.json says n_layer=0; expected an integer >= 1"


def test_a_config_that_is_no_text(source: Source, folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00{")
    assert refusal(source, folder).startswith("config.json is not JSON (")


@pytest.mark.parametrize("architectures", [..., None, ["SomethingElse"]])
def test_architectures_are_not_needed(architectures: Any, source: Source, folder: Path) -> None:
    edit_config(folder, architectures=architectures, quantization_config=None)
    made = source(folder)
    made.check()
    assert len(made.outline().layers) == 4


# Precision


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, " (GPTQ, 4 bits)"),
        ({"quant_method": "awq", "bits": 4}, " (AWQ, 4 bits)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, " (bitsandbytes, 8 bits)"),
        ({"quant_method": "fp8"}, " (FP8)"),
        ({"quant_method": "compressed-tensors"}, " (compressed-tensors)"),
        ("yes", ""),
    ],
)
def test_quantised_by_its_config(settings: Any, how: str, source: Source, folder: Path) -> None:
    edit_config(folder, quantization_config=settings)
    expected = f"is quantised{how}; expected the full-precision checkpoint that it was made from"
    assert refusal(source, folder) == expected


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32])
def test_quantised_by_its_tensors(kind: torch.dtype, source: Source, folder: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(kind)}))
    said = refusal(source, folder)
    assert said.startswith(f"{name} is stored as ") and "the checkpoint is quantised; expected the full-prec" in said


def test_packed_weights_are_called_quantised_not_missing(source: Source, folder: Path) -> None:
    name = "model.layers.2.mlp.up_proj.{}"

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(name.format("weight"))
        tensors[name.format("qweight")] = torch.ones(8, 172, dtype=torch.int32)

    edit_tensors(folder, pack)
    assert refusal(source, folder).startswith(f"{name.format('qweight')} is stored as I32: the checkpoint is quantised")


@pytest.mark.parametrize("stream", [False, True])
def test_mixed_floats_become_the_models(
    stream: bool, source: Source, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors)[3:]:
            tensors[name] = tensors[name].bfloat16()

    edit_tensors(folder, halve)
    count = len(load_file(folder / "model.safetensors"))
    made = source(folder, stream=stream)
    made.check()
    made.outline()
    with caplog.at_level(logging.INFO, "pruneexp"):
        model = made.load()
    with model.loaded(1) as layer:
        assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    lines = [record.getMessage() for record in caplog.records if "mixed precision" in record.getMessage()]
    held = f"({count - 3} tensors as BF16, 3 as F32), held as torch.float32"
    assert lines == [f"model.path={str(folder)!r}: stored in mixed precision {held}"]


@pytest.mark.parametrize("named", ["torch_dtype", "dtype", None])
def test_a_config_that_names_no_dtype_is_told(
    named: str | None, source: Source, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_tensors(folder, lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    edit_config(folder, dtype=..., torch_dtype=...)
    if named:
        edit_config(folder, **{named: "bfloat16"})
    with caplog.at_level(logging.INFO, "pruneexp"):
        model = source(folder).load()
        source(folder, dtype="float64").load()
    assert model.dtype == (torch.bfloat16 if named else torch.float32)
    lines = [record.getMessage() for record in caplog.records if "names no dtype" in record.getMessage()]
    line = (
        f"model.path={str(folder)!r}: config.json names no dtype: stored as BF16, held as torch.float32 (model.dtype)"
    )
    assert lines == ([] if named else [line])


def test_a_type_with_code_of_its_own_is_promised_nothing(source: Source, folder: Path) -> None:
    edit_config(folder, model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    assert "trust_remote_code" not in refusal(source, folder)


def test_one_precision_is_nothing_to_speak_of() -> None:
    assert checks.precisions({"a": "F16", "b": "F16", "mask": "BOOL"}) == ""
    assert checks.precisions({}) == ""


def test_masks_that_old_checkpoints_carry_are_no_quantised_weights(source: Source, folder: Path) -> None:
    before = source(folder).outline().params
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.bias": torch.ones(4, 4, dtype=torch.bool)}))
    made = source(folder)
    made.check()
    assert made.outline().params == before, "a mask is no parameter"


# The Hub


def test_a_hub_model_is_described_before_its_weights_come(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    patterns_of: list[list[str]] = []

    def fetched(path: str, revision: str | None, allow_patterns: list[str], **_: Any) -> str:
        patterns_of.append(allow_patterns)
        return str(PARITY)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    made = source("some/model")
    made.check()
    made.outline()
    made.describe()
    assert patterns_of and not any("*.safetensors" in patterns for patterns in patterns_of)
    made.load()
    assert "*.safetensors" in patterns_of[-1]


def test_weights_that_are_there_twice_come_once(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    came: list[str] = []
    there = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "additional_chat_templates/a.jinja"]
    twice = ["consolidated.safetensors", "original/model.safetensors", "original/consolidated.00.safetensors"]

    def fetched(path: str, revision: str | None, **patterns: Any) -> str:
        came[:] = filter_repo_objects([*there, *twice], **patterns)
        return str(PARITY)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    source("some/model").load()
    assert came == there


@pytest.mark.parametrize(
    ("files", "early", "said"),
    [
        (
            ["config.json", "pytorch_model.bin", "original/model.safetensors"],
            True,
            "its repository has no safetensors that transformers reads but pickled weights (pytorch_model.bin), ",
        ),
        (["config.json"], False, "its repository has no safetensors that transformers reads; expected a model."),
        (None, False, "no safetensors came with it; expected a model.revision"),
    ],
)
def test_a_repository_without_safetensors(
    files: list[str] | None, early: bool, said: str, source: Source, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def listed(path: str, revision: str | None) -> list[str]:
        if files is None:
            raise OSError("offline")
        return files

    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", listed)
    hub._listed.cache_clear()
    made = source("some/model", revision="main")
    if not early:
        made.describe()
    with pytest.raises(ConfigError) as error:
        made.describe() if early else made.load()
    message = str(error.value)
    assert message.startswith(f"model.path='some/model': {said}") and "\n" not in message
    assert "refs/pr/N" in message and "M.from_pretrained('some/model', dtype='auto')" in message


def test_a_folder_without_weights(source: Source, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    made = source(folder)
    with pytest.raises(ConfigError, match="holds no weights"):
        made.check()
    made.check(weights=False)
    assert made.outline().params == source(PARITY).outline().params
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="it is empty"):
        made.check(weights=False)
    assert checkpoint.holds_weights(folder)

"""A checkpoint for vLLM: its config by the rules of vLLM's loader, its weights the model's. vLLM itself is not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pruneexp.export import main
from pruneexp.export.vllm_proof import check_loader_rules
from pruneexp.types import RunError
from tests.llama_like import MODELS, fewer_query_heads, model_logits, pruned_folder

pytestmark = pytest.mark.slow

EVEN = ((0, 5), (2, 0), (2, 7))  # attention units and FFN channels that stay in each layer


def decilm_logits(folder: Path, tokens_T: Tensor) -> Tensor:
    """What vLLM's DeciLM computes from the files [T, V]: written from its description, residuals carried as it does."""
    config = json.loads((folder / "config.json").read_text())
    tensor = load_file(folder / "model.safetensors")
    size = config["head_dim"]
    rope = config["rope_parameters"]
    frequencies = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(len(tokens_T))[:, None] * frequencies
    cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))

    def linear(x: Tensor, name: str, biased: bool) -> Tensor:
        return x @ tensor[f"{name}.weight"].T + (tensor[f"{name}.bias"] if biased else 0)

    def rotated(x_THS: Tensor) -> Tensor:
        first, second = x_THS.chunk(2, -1)
        return x_THS * cos + torch.cat([-second, first], -1) * sin

    def normed(hidden: Tensor, residual: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
        total = hidden if residual is None else hidden + residual
        rms = (total.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt()
        return total * rms * tensor[f"{name}.weight"], total

    def attention(x_TD: Tensor, name: str, heads: int, kv_heads: int) -> Tensor:
        counts = {"q": heads, "k": kv_heads, "v": kv_heads}
        q, k, v = (
            linear(x_TD, f"{name}.{part}_proj", config["qkv_bias"]).unflatten(-1, (n, size))
            for part, n in counts.items()
        )
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (rotated(k), v))
        scores = torch.einsum("ths,uhs->htu", rotated(q), k) * size**-0.5
        causal = torch.ones(len(x_TD), len(x_TD), dtype=torch.bool).tril()
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        mixed = torch.einsum("htu,uhs->ths", weights, v).flatten(1)
        return linear(mixed, f"{name}.o_proj", config["attention_bias"])

    hidden, residual = tensor["model.embed_tokens.weight"][tokens_T], None
    for index, block in enumerate(config["block_configs"]):
        name = f"model.layers.{index}"
        if not block["attention"]["no_op"]:
            hidden, residual = normed(hidden, residual, f"{name}.input_layernorm")
            heads = config["num_attention_heads"]
            group = block["attention"]["n_heads_in_group"]
            hidden = attention(hidden, f"{name}.self_attn", heads, heads // group)
        if not block["ffn"]["no_op"]:
            assert residual is not None
            hidden, residual = normed(hidden, residual, f"{name}.post_attention_layernorm")
            gate, up = (linear(hidden, f"{name}.mlp.{part}_proj", config["mlp_bias"]) for part in ("gate", "up"))
            assert gate.shape[-1] == block["ffn"]["intermediate_size"]
            hidden = linear(torch.nn.functional.silu(gate) * up, f"{name}.mlp.down_proj", config["mlp_bias"])
    head = tensor.get("lm_head.weight", tensor["model.embed_tokens.weight"])
    return normed(hidden, residual, "model.norm")[0] @ head.T


@pytest.mark.parametrize(
    ("name", "biases"),
    [
        ("llama", False),
        ("llama", True),
        ("llama_biased", True),
        ("llama_multi_query", False),
        ("mistral_sliding", False),
        ("qwen2", True),
        ("phi3", False),
    ],
)
def test_the_files_are_the_model(name: str, biases: bool, tmp_path: Path) -> None:
    folder, out = pruned_folder(tmp_path, name, EVEN, biases), tmp_path / "out"
    assert main([str(folder), "format=vllm", f"out={out}", "prove=in_place"]) == 0
    config = json.loads((out / "config.json").read_text())
    length = config["max_position_embeddings"]
    assert length == MODELS[name][1].get("sliding_window") or length == 64
    tokens_T = torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        decilm_logits(out, tokens_T).float(), model_logits(folder, tokens_T), rtol=1e-4, atol=1e-4
    )
    record = json.loads((out / "export.json").read_text())
    assert record["prove"] == "own_modeling" and record["served"] is False and record["max_logit_difference"] < 1e-4
    assert any("not served by vLLM here" in note for note in record["notes"])


def test_widths_and_biases_in_the_config(tmp_path: Path) -> None:
    folder, out = pruned_folder(tmp_path, "llama", ((2, 5), (2, 0), (0, 0))), tmp_path / "out"
    assert main([str(folder), "format=vllm", f"out={out}"]) == 0  # the config read in a clean process
    config = json.loads((out / "config.json").read_text())
    assert [block["ffn"]["intermediate_size"] for block in config["block_configs"]] == [5, None]
    assert [block["ffn"]["no_op"] for block in config["block_configs"]] == [False, True]
    assert [block["attention"]["n_heads_in_group"] for block in config["block_configs"]] == [2, 2]
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
    assert not config["attention_bias"] and not config["qkv_bias"] and not config["mlp_bias"]


def test_layers_with_groups_of_other_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = fewer_query_heads(tmp_path / "a", "llama", ((3, 2), (2, 3), (3, 2))), tmp_path / "out"
    assert main([str(folder), "format=vllm", f"out={out}", "prove=in_place"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert [block["attention"]["n_heads_in_group"] for block in config["block_configs"]] == [2, 3, 2]
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (6, 3)
    tokens_T = torch.randint(3, 64, (32,), generator=torch.Generator().manual_seed(1))
    expected = model_logits(folder, tokens_T)
    torch.testing.assert_close(decilm_logits(out, tokens_T).float(), expected, rtol=1e-4, atol=1e-4)
    nine = fewer_query_heads(tmp_path / "nine", "llama", ((3, 3),) * 3)  # they do not divide the hidden size, 48
    assert main([str(nine), "format=vllm", f"out={tmp_path / 'of nine'}", "prove=in_place"]) == 0
    uneven = fewer_query_heads(tmp_path / "b", "llama", ((3, 2), (3, 3), (3, 3)))
    assert "query heads differ between layers (9 in most, others in layers 0)" in refused(capsys, uneven, out / "b")


def test_ffn_widths_rounded_up(tmp_path: Path) -> None:
    folder, out = pruned_folder(tmp_path, "llama_biased", EVEN, biases=True), tmp_path / "out"
    assert main([str(folder), "format=vllm", "multiple=16", f"out={out}", "prove=in_place"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert [block["ffn"]["intermediate_size"] for block in config["block_configs"]] == [16, 64, 16]
    tokens_T = torch.randint(3, 64, (64,), generator=torch.Generator().manual_seed(1))
    expected = model_logits(folder, tokens_T)
    torch.testing.assert_close(decilm_logits(out, tokens_T).float(), expected, rtol=1e-4, atol=1e-4)


def refused(capsys: pytest.CaptureFixture[str], folder: Path, out: Path) -> str:
    assert main([str(folder), "format=vllm", f"out={out}"]) == 2
    assert not out.exists()
    return capsys.readouterr().err


def test_plans_that_it_cannot_express(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, pruned_folder(tmp_path / "a", "llama", ((1, 5), (2, 9), (2, 7))), tmp_path / "out")
    assert "query heads differ between layers (4 in most, others in layers 0)" in line
    assert (
        "expected a run with search=serve_safe, or format=remote_code (a run's model/), which `vllm serve PATH" in line
    )
    folder = pruned_folder(tmp_path / "b", "llama", ((0, 5), (0, 9), (0, 7)))
    assert "no layer has attention" in refused(capsys, folder, tmp_path / "out")


def change(config: dict[str, Any], tensors: dict[str, Tensor], what: str) -> None:
    blocks = config["block_configs"]
    if what == "layers":
        config["num_hidden_layers"] = 4
    elif what == "first":
        blocks[0]["attention"]["no_op"] = True
    elif what == "group":
        blocks[1]["attention"]["n_heads_in_group"] = 3
    elif what == "mult":
        blocks[0]["ffn"]["ffn_mult"] = 1.0
    elif what == "width":
        blocks[2]["ffn"]["intermediate_size"] = 8
    elif what == "bias":
        config["mlp_bias"] = True
    elif what == "extra":
        tensors["model.layers.0.mlp.gate_proj.bias"] = torch.zeros(5)


@pytest.mark.parametrize(
    ("what", "rule"),
    [
        ("layers", "3 block_configs for 4 layers"),
        ("first", "the first layer has no attention"),
        ("group", "n_heads_in_group=3 in layer 1: no divisor"),
        ("mult", "layer 0 wants an intermediate_size, and no ffn_mult"),
        ("width", "wants another shape of model.layers.2.mlp.gate_proj.weight"),
        ("bias", "it lacks model.layers.0.mlp.gate_proj.bias"),
        ("extra", "it does not know model.layers.0.mlp.gate_proj.bias"),
    ],
)
def test_the_rules_of_the_loader(what: str, rule: str, tmp_path: Path) -> None:
    folder, out = pruned_folder(tmp_path, "llama", ((2, 5), (2, 0), (2, 7))), tmp_path / "out"
    assert main([str(folder), "format=vllm", f"out={out}", "prove=off"]) == 0
    check_loader_rules(out)
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    change(config, tensors, what)
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(RunError, match=rule):
        check_loader_rules(out)

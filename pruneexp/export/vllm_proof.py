"""Proof of an export for vLLM, which is not run: its loader's rules, and the weights by pruneexp's own modeling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneexp.export.checkpoint import TOLERANCE, check_difference, proof_tokens
from pruneexp.export.folders import exact_source
from pruneexp.files import scratch_folder
from pruneexp.model import Checkpoint, Model, modeling_pruned
from pruneexp.model.weights import tied_names
from pruneexp.surgery.prove import greedy_tokens, logits_of
from pruneexp.types import RunError

BIASES = {  # flag of the config -> the linear layers that have a bias then
    "attention_bias": ("self_attn.o_proj",),
    "qkv_bias": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp_bias": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}


def read_back(parts: Iterable[dict[str, Tensor]], folder: Path) -> dict[str, Any]:
    """Every tensor of the files against those that were to be written, to the bit. Raises RunError, naming one that
    differs."""
    files, count = Checkpoint(folder), 0
    for part in parts:
        for name, tensor in part.items():
            if not torch.equal(files[name], tensor):
                raise RunError(f"tensor {name} is not the model's; nothing was kept")
            count += 1
    return {"prove": "read_back", "served": False, "tensors_equal": count}


def prove_by_own_modeling(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Reloads the weights by the written config alone, with pruneexp's own modeling, and compares logits and greedy
    tokens. Raises RunError."""
    model = exact_source(checkpoint).load()
    reloaded = own_model(folder, model)
    tokens_BT = proof_tokens(model)[:, : reloaded.max_length]
    difference = (logits_of(reloaded, tokens_BT) - logits_of(model, tokens_BT)).abs().max().item()
    check_difference(difference)
    return {
        "prove": "own_modeling",
        "served": False,
        "tolerance": TOLERANCE,
        "max_logit_difference": difference,
        "greedy_tokens_equal": torch.equal(greedy_tokens(reloaded, tokens_BT), greedy_tokens(model, tokens_BT)),
        "windows": list(tokens_BT.shape),
    }


def check_loader_rules(folder: Path) -> None:
    """What vLLM's loader asks of the files: every layer of the config by its rules, and exactly the tensors, in the
    shapes, that such layers have. Raises RunError, naming the rule."""
    config = json.loads((folder / "config.json").read_text())
    blocks, hidden, size = config["block_configs"], config["hidden_size"], config["head_dim"]
    if len(blocks) != config["num_hidden_layers"]:
        raise _broken(f"{len(blocks)} block_configs for {config['num_hidden_layers']} layers")
    if blocks[0]["attention"]["no_op"]:
        raise _broken("the first layer has no attention")
    expected = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        expected["lm_head.weight"] = (config["vocab_size"], hidden)
    for index, block in enumerate(blocks):
        rows: dict[str, tuple[int, ...]] = {}
        if not block["attention"]["no_op"]:
            group = block["attention"]["n_heads_in_group"]
            if not group or config["num_attention_heads"] % group:
                raise _broken(f"n_heads_in_group={group} in layer {index}: no divisor of num_attention_heads")
            queries, keys = config["num_attention_heads"] * size, config["num_attention_heads"] // group * size
            rows |= {"self_attn.q_proj": (queries, hidden), "self_attn.o_proj": (hidden, queries)}
            rows |= {"self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden)}
            rows |= {"input_layernorm": (hidden,)}
        if not block["ffn"]["no_op"]:
            width = block["ffn"].get("intermediate_size")
            if "ffn_mult" in block["ffn"] or not isinstance(width, int) or width < 1:
                raise _broken(f"layer {index} wants an intermediate_size, and no ffn_mult, which would be rounded")
            rows |= {"mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width)}
            rows |= {"post_attention_layernorm": (hidden,)}
        biased = {path for flag, paths in BIASES.items() if config[flag] for path in paths}
        for path, shape in rows.items():
            expected[f"model.layers.{index}.{path}.weight"] = shape
            if path in biased:
                expected[f"model.layers.{index}.{path}.bias"] = shape[:1]
    _check_tensors(folder, expected)


def _check_tensors(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    files = Checkpoint(folder)
    missing = [name for name in expected if name not in files]
    extra = files.names_beside(name for name in expected if name in files)
    misshapen = [name for name, shape in expected.items() if name in files and files.shape(name) != shape]
    for what, names in (("lacks", missing), ("does not know", extra), ("wants another shape of", misshapen)):
        if names:
            raise _broken(f"it {what} {names[0]}")


def _broken(reason: str) -> RunError:
    return RunError(f"format=vllm: vLLM's loader would not take this ({reason}); nothing was kept")


READ_CONFIG = """
import json, sys
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
blocks = [
    [b.attention.no_op, b.attention.n_heads_in_group, b.ffn.no_op, b.ffn.intermediate_size, hasattr(b.ffn, "ffn_mult")]
    for b in config.block_configs
]
print(json.dumps([config.num_attention_heads, config.head_dim, config.rope_parameters["rope_theta"], blocks]))
"""


def check_config_class(folder: Path) -> None:
    """The config as transformers hands it to vLLM, from a process without this package. Raises RunError."""
    with scratch_folder() as scratch:
        done = subprocess.run(
            [sys.executable, "-I", "-c", READ_CONFIG, str(folder.resolve())],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"},
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"the config does not load in a clean process ({reason}); nothing was kept")
    config = json.loads((folder / "config.json").read_text())
    written = [config["num_attention_heads"], config["head_dim"], config["rope_parameters"]["rope_theta"]]
    parts = [(block["attention"], block["ffn"]) for block in config["block_configs"]]
    blocks = [[a["no_op"], a["n_heads_in_group"], f["no_op"], f["intermediate_size"], False] for a, f in parts]
    if json.loads(done.stdout) != [*written, blocks]:
        raise RunError("the config is read as something else in a clean process; nothing was kept")


def own_model(folder: Path, like: Model) -> Model:
    """The written checkpoint as a model, from its config.json and its tensors alone, in `like`'s dtype."""
    config = json.loads((folder / "config.json").read_text())
    per_layer = {}
    for index, block in enumerate(config["block_configs"]):
        no_attention, no_ffn = block["attention"]["no_op"], block["ffn"]["no_op"]
        heads = 0 if no_attention else config["num_attention_heads"]
        per_layer[index] = {
            "num_attention_heads": heads,
            "num_key_value_heads": 0 if no_attention else heads // block["attention"]["n_heads_in_group"],
            "intermediate_size": 0 if no_ffn else block["ffn"]["intermediate_size"],
            "attention_output_bias": not no_attention,
            "mlp_output_bias": not no_ffn,
        }
    wanted = ("hidden_size", "vocab_size", "hidden_act", "rms_norm_eps", "rope_parameters", "tie_word_embeddings")
    wanted += ("num_hidden_layers", "head_dim", "intermediate_size", "max_position_embeddings")
    values = {name: config[name] for name in wanted}
    values |= {"num_attention_heads": 1, "num_key_value_heads": 1}  # layers say theirs; these must divide hidden_size
    biased = {"attention_bias": True, "mlp_bias": True}  # of zeros, where the files have none
    pruned = modeling_pruned.__getattr__("PrunedLlamaConfig")(**values, **biased, per_layer_config=per_layer)
    module: Any = modeling_pruned.__getattr__("PrunedLlamaForCausalLM")._from_config(pruned, dtype=like.dtype)
    files = Checkpoint(folder)
    tied = tied_names(module)
    for name, tensor in module.state_dict().items():
        if name not in tied and tensor.numel():
            tensor.copy_(torch.zeros(()) if name.endswith(".bias") and name not in files else files[name])
    module.eval().requires_grad_(False)
    return Model(module, None, name="reloaded", device=torch.device("cpu"), batch_size=1)

"""`format=vllm`: a checkpoint for vLLM's own class of LLaMAs whose layers differ (DeciLM, model type nemotron-nas).

What its loader and model do, and what is done about it here:
- every layer with attention has `num_attention_heads` query heads: plans with other numbers are refused;
- the FFN's width is read from `intermediate_size` where there is no `ffn_mult`, and is exact then;
- `attention_bias` gives a bias to the output projection, `qkv_bias` to queries, keys and values, `mlp_bias` to the
  whole FFN, in every layer: zeros where the model has none, and a sublayer of zeros to carry one that is left alone;
- a layer without attention adds to what an earlier one started: the first layer always has some, of zeros if need be.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pruneexp.export import llama_like, vllm_proof
from pruneexp.export.checkpoint import layers_text
from pruneexp.export.folders import stored_source
from pruneexp.export.llama_like import LlamaLayer
from pruneexp.model import Model
from pruneexp.model.companions import carry
from pruneexp.model.modeling_pruned import head_size
from pruneexp.surgery.save import SHARD_BYTES, STREAMED_SHARD_BYTES, ShardWriter
from pruneexp.types import ConfigError

CODE = Path(__file__).with_name("configuration_blocks.py")
ZERO_CHANNELS = 64  # of an FFN that only carries a bias: a width that tensor parallelism divides
INSTEAD = "format=remote_code (a run's model/), which `vllm serve PATH --trust-remote-code` takes"
NOT_SERVED = (
    "not served by vLLM here: its config was checked against the rules of vLLM's loader; serving it wants "
    "--trust-remote-code (for the config alone)"
)


def vllm_exporter(model: Model, multiple: int) -> VllmExporter:
    """What writes the files, made of the model's structure alone. FFN widths are rounded up to `multiple` with channels
    of zeros.

    Raises ConfigError where vLLM's class cannot hold the model.
    """
    llama_like.check_llama_like(model, "vllm")
    heads = _query_heads(model)
    layers = tuple(_layers(model, heads, multiple))
    rounded = llama_like.rounded_note(model, layers, multiple)
    names = {name for layer in layers for name in llama_like.layer_tensors(model, layer)}
    flags = {flag: any(f"{path}.bias" in names for path in paths) for flag, paths in vllm_proof.BIASES.items()}
    exporter = VllmExporter(layers, heads, flags, 0, rounded)
    size = sum(tensor.numel() for part in exporter.tensors(model) for tensor in part.values())
    return replace(exporter, bytes=size * model.dtype.itemsize)


@dataclass(frozen=True)
class VllmExporter:
    """`layers`: as vLLM sees them. `heads`: query heads where there is attention. `flags`: which biases there are."""

    layers: tuple[LlamaLayer, ...]
    heads: int
    flags: Mapping[str, bool]
    bytes: int
    rounded: str
    form: str = "vllm"

    @property
    def why(self) -> str:
        widths = f"FFN widths of their own{self.rounded}"
        return f"DeciLMForCausalLM, {len(self.layers)} layers of {self.heads} query heads, {widths}"

    def write(self, model: Model, folder: Path) -> list[str]:
        folder.mkdir(parents=True)
        shards = ShardWriter(folder, shard_bytes=STREAMED_SHARD_BYTES if model.streamed else SHARD_BYTES)
        for part in self.tensors(model):
            shards.add(part)
        shards.close()
        config = self.config(model)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        shutil.copyfile(CODE, folder / CODE.name)
        carry(model.source_folder, model.tokenizer, None, folder)
        vllm_proof.check_loader_rules(folder)
        return [*llama_like.window_note(model), NOT_SERVED]

    def config(self, model: Model) -> dict[str, Any]:
        """config.json: LLaMA's keys that DeciLM reads, and what each layer has."""
        own, blocks = model.config, []
        for layer in self.layers:
            group, width = layer.heads // layer.kv_heads if layer.heads else None, layer.channels or None
            attention = {"no_op": group is None, "n_heads_in_group": group, "replace_with_linear": False}
            ffn = {"no_op": width is None, "intermediate_size": width, "replace_with_linear": False}
            blocks.append({"attention": attention, "ffn": ffn})
        kept = ("hidden_size", "vocab_size", "hidden_act", "rms_norm_eps", "rope_parameters", "tie_word_embeddings")
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        return {
            "model_type": "nemotron-nas",
            "architectures": ["DeciLMForCausalLM"],
            "auto_map": {"AutoConfig": f"{CODE.stem}.BlocksConfig"},
            "block_configs": blocks,
            "num_hidden_layers": len(self.layers),
            "num_attention_heads": self.heads,
            "num_key_value_heads": max(layer.kv_heads for layer in self.layers),
            "head_dim": head_size(own),
            "intermediate_size": max(layer.channels for layer in self.layers),
            "max_position_embeddings": llama_like.context_length(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            **{name: getattr(own, name) for name in kept},
            **{name: getattr(own, name, None) for name in tokens},
            **self.flags,
        }

    def tensors(self, model: Model) -> Iterator[dict[str, Tensor]]:
        """Every tensor by its name in the file: those outside the layers, then layer by layer."""
        module = model.module
        outside = {
            "model.embed_tokens.weight": module.get_input_embeddings().weight,
            "model.norm.weight": module.base_model.norm.weight,
        }
        if not model.config.tie_word_embeddings:
            outside["lm_head.weight"] = module.get_output_embeddings().weight
        yield outside
        for place, layer in enumerate(self.layers):
            with model.loaded(layer.index):
                tensors = llama_like.layer_tensors(model, layer)
                for path in (path for flag, paths in vllm_proof.BIASES.items() if self.flags[flag] for path in paths):
                    if (weight := tensors.get(f"{path}.weight")) is not None:
                        tensors.setdefault(f"{path}.bias", weight.new_zeros(len(weight)))
                yield {f"model.layers.{place}.{name}": tensor for name, tensor in tensors.items()}

    def prove(self, checkpoint: Path, how: str, stream: bool, folder: Path) -> dict[str, Any]:
        vllm_proof.check_loader_rules(folder)
        if how == "process":
            vllm_proof.check_config_class(folder)
        if stream:
            return vllm_proof.read_back(self.tensors(stored_source(checkpoint, stream=True).load()), folder)
        return vllm_proof.prove_by_own_modeling(checkpoint, folder)


def _query_heads(model: Model) -> int:
    """The query heads of each layer that has attention. Raises ConfigError where layers differ, or none has any."""
    structures = model.structures
    counts = [s.num_attention_heads for s in structures if s.num_attention_heads]
    if not counts:
        raise ConfigError(f"format=vllm: no layer has attention; expected one that has, or {INSTEAD}")
    usual = max(set(counts), key=lambda count: (counts.count(count), count))
    if odd := [i for i, s in enumerate(structures) if s.num_attention_heads not in (0, usual)]:
        raise ConfigError(
            f"format=vllm: query heads differ between layers ({usual} in most, others in {layers_text(odd)}); "
            f"expected a run with search=serve_safe, or {INSTEAD}"
        )
    return usual


def _layers(model: Model, heads: int, multiple: int) -> Iterator[LlamaLayer]:
    structures = model.structures
    usual = next(s.num_key_value_heads for s in structures if s.num_attention_heads)
    kept = llama_like.layers_with_effect(model)
    for index in kept:
        own = structures[index]
        attention = own.num_attention_heads or own.attention_output_bias or index == kept[0]
        channels = own.intermediate_size or (ZERO_CHANNELS if own.mlp_output_bias else 0)
        kv_heads = own.num_key_value_heads or (usual if attention else 0)
        yield LlamaLayer(index, heads if attention else 0, kv_heads, llama_like.rounded_up(channels, multiple))

"""`format=gguf`: one file for llama.cpp, as its architecture `deci`, whose layers differ in heads and FFN width.

What its loader and graph do, and what is done about it here:
- it rotates neighbouring channels of queries and keys, transformers the two halves of a head: rows are reordered;
- the size of heads is read where layer 0 has some: without attention of its own, layer 0 gets one head of zeros;
- a layer without heads skips its output bias: a layer that owns one gets a head of zeros to carry it;
- a layer without FFN drops what its attention computed: it gets one FFN channel of zeros;
- a layer that changes nothing is left out;
- rows are quantised in blocks of 32 numbers (K-quants: 256), and a matrix whose rows are no multiple keeps its 16 bits:
  FFN widths are rounded up with channels of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from pruneexp.export import llama_like
from pruneexp.export.gguf_vocabulary import Vocabulary
from pruneexp.export.llama_like import LlamaLayer
from pruneexp.model import Model
from pruneexp.model.modeling_pruned import head_size
from pruneexp.types import RunError

BLOCK = 32  # numbers that llama.cpp quantises together, at the least
FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}  # general.file_type
GGML_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
NAMES = {  # LLaMA's names of a layer's tensors -> llama.cpp's
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class GgufLayout:
    """`layers`: as llama.cpp sees them. `dtype`: of the matrices; vectors are float32, as it wants them."""

    layers: tuple[LlamaLayer, ...]
    dtype: torch.dtype
    contents: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]  # every tensor's name, shape and dtype

    def write(self, model: Model, words: Vocabulary, file: Path) -> None:
        from gguf import GGMLQuantizationType, GGUFWriter

        writer = GGUFWriter(file, "deci")
        try:
            add_description(writer, model, self)
            words.add_to(writer)
            for name, shape, dtype in self.contents:
                kind = {2: numpy.dtype("int16"), 4: numpy.dtype("float32")}[dtype.itemsize]
                raw = GGMLQuantizationType[GGML_TYPES[dtype]]
                writer.add_tensor_info(name, shape, kind, math.prod(shape) * dtype.itemsize, raw)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in tensors(model, self.layers):
                writer.write_tensor_data(as_array(tensor, self.dtype, name))
        finally:
            writer.close()


def deci_layers(model: Model, multiple: int) -> Iterator[LlamaLayer]:
    """The layers that llama.cpp shall see. Of a model that has none left: one of zeros."""
    structures = model.structures
    kept = llama_like.layers_with_effect(model) or [0]
    for index in kept:
        own = structures[index]
        heads, kv_heads = own.num_attention_heads, own.num_key_value_heads
        if heads == 0 and (index == kept[0] or own.attention_output_bias):
            heads = kv_heads = 1
        yield LlamaLayer(index, heads, kv_heads, llama_like.rounded_up(max(1, own.intermediate_size), multiple))


def tensors(model: Model, layers: Sequence[LlamaLayer]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file, in order; a streamed model's layers one at a time."""
    module = model.module
    yield "token_embd.weight", module.get_input_embeddings().weight
    yield "output_norm.weight", module.base_model.norm.weight
    if not model.config.tie_word_embeddings:
        yield "output.weight", module.get_output_embeddings().weight
    if (factors := llama_like.rope_factors(model)) is not None:
        yield "rope_freqs.weight", factors
    for place, layer in enumerate(layers):
        with model.loaded(layer.index):
            for name, tensor in llama_like.layer_tensors(model, layer).items():
                path, _, leaf = name.rpartition(".")
                if path in ("self_attn.q_proj", "self_attn.k_proj"):
                    tensor = neighbouring(tensor, layer.heads if path.endswith("q_proj") else layer.kv_heads)
                yield f"blk.{place}.{NAMES[path]}.{leaf}", tensor


def neighbouring(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys with the channels that are rotated together next to each other: channel i of a head of
    size S and channel i + S/2 become 2i and 2i + 1."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def stored_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.ndim == 2 else torch.float32


def as_array(tensor: Tensor, dtype: torch.dtype, name: str) -> numpy.ndarray:
    """A tensor as it lies in the file: 16-bit numbers as int16. Raises RunError where the dtype cannot hold a value."""
    own = tensor.detach().to("cpu", stored_dtype(tensor, dtype)).contiguous()
    if not torch.isfinite(own).all():
        raise RunError(f"dtype={str(dtype).removeprefix('torch.')}: {name} holds values too large for it")
    return (own.view(torch.int16) if own.dtype.itemsize == 2 else own).numpy()


def add_description(writer: Any, model: Model, layout: GgufLayout) -> None:
    """What llama.cpp must know of the model beside its tensors and its vocabulary."""
    config, layers = model.config, layout.layers
    size = head_size(config)
    writer.add_file_type(FILE_TYPES[layout.dtype])
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(llama_like.context_length(model))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers))
    writer.add_head_count([layer.heads for layer in layers])
    writer.add_head_count_kv([layer.kv_heads for layer in layers])
    writer.add_feed_forward_length([layer.channels for layer in layers])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)

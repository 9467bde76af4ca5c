"""A randomly initialised LLaMA checkpoint of any size, written layer by layer: about one layer is in memory at a time.

    python -m tests.benchmarks.big_checkpoint FOLDER [--hidden 4096] [--intermediate 11008] [--layers 32] [--heads 32]
        [--kv-heads 32] [--vocab 32000] [--dtype bfloat16] [--windows 8] [--length 128] [--seed 0]

The defaults are LLaMA-2-7B's: 13.5 GB. FOLDER gets config.json, one safetensors file a layer and their index, beside
them calibration.npy, random windows of tokens: there is no tokenizer. Weights are normal, their variance 1 / inputs (of
the readers less by twice the number of layers), so that hidden states keep their size.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int


LLAMA_2_7B = Shape(hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32, vocab=32000)


def write_checkpoint(folder: Path, shape: Shape, dtype: str, seed: int) -> int:
    """Writes the checkpoint and returns the bytes of its tensors. The index comes last: without it, it is none."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )
    config.save_pretrained(folder)
    rng = torch.Generator().manual_seed(seed)
    stored: torch.dtype = getattr(torch, dtype)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        return torch.empty(rows, columns).normal_(std=std, generator=rng).to(stored)

    def part(number: int) -> dict[str, Tensor]:
        if number == 0:
            return {"model.embed_tokens.weight": normal(shape.vocab, shape.hidden, 1.0)}
        if number <= shape.layers:
            return _layer(shape, number - 1, normal, stored)
        head = normal(shape.vocab, shape.hidden, shape.hidden**-0.5)
        return {"model.norm.weight": torch.ones(shape.hidden, dtype=stored), "lm_head.weight": head}

    count = shape.layers + 2
    weight_map, total = {}, 0
    for number in range(count):
        tensors, name = part(number), f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        del tensors
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


def _layer(shape: Shape, index: int, normal, stored: torch.dtype) -> dict[str, Tensor]:
    prefix, hidden, wide = f"model.layers.{index}.", shape.hidden, shape.intermediate
    keys = hidden // shape.heads * shape.kv_heads
    deep = (2 * shape.layers) ** -0.5
    ones = torch.ones(hidden, dtype=stored)
    tensors = {
        "input_layernorm.weight": ones,
        "self_attn.q_proj.weight": normal(hidden, hidden, hidden**-0.5),
        "self_attn.k_proj.weight": normal(keys, hidden, hidden**-0.5),
        "self_attn.v_proj.weight": normal(keys, hidden, hidden**-0.5),
        "self_attn.o_proj.weight": normal(hidden, hidden, deep * hidden**-0.5),
        "post_attention_layernorm.weight": ones.clone(),
        "mlp.gate_proj.weight": normal(wide, hidden, hidden**-0.5),
        "mlp.up_proj.weight": normal(wide, hidden, hidden**-0.5),
        "mlp.down_proj.weight": normal(hidden, wide, deep * wide**-0.5),
    }
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write_tokens(file: Path, windows: int, length: int, vocab: int, seed: int) -> None:
    """Windows of tokens drawn at random, as `dataset=tokens` reads them."""
    np.save(file, np.random.default_rng(seed).integers(0, vocab, (windows, length), dtype=np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, default in vars(LLAMA_2_7B).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = Shape(**{name: getattr(args, name) for name in vars(LLAMA_2_7B)})
    total = write_checkpoint(args.folder, shape, args.dtype, args.seed)
    write_tokens(args.folder / "calibration.npy", args.windows, args.length, shape.vocab, args.seed)
    print(f"{args.folder}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

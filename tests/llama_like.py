"""Tiny models that compute what a LLaMA does, pruned to given counts: what the exports to servers share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneexp.model import ModelSource
from pruneexp.surgery import save, shrink_
from pruneexp.types import Plan, SitePlan
from tests.tiny_families import TINY, random_model

LLAMA = {**TINY["llama_multi_query"][1], "num_key_value_heads": 3}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA),
    "llama3": (
        "Llama",
        {
            **LLAMA,
            "head_dim": 16,  # heads that do not make up the hidden size
            "tie_word_embeddings": True,
            "rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 32},
        },
    ),
    "llama_biased": ("Llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "linear_rope": ("Llama", {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "granite_plain": ("Granite", {**LLAMA, "attention_multiplier": 8**-0.5}),
    "smollm3_roped": ("SmolLM3", {**LLAMA, "no_rope_layers": [1, 1, 1]}),
    **{name: TINY[name] for name in ("llama_multi_query", "mistral_sliding", "qwen2", "phi3")},
}
Kept = Sequence[tuple[int, int]]  # units that stay: attention and FFN of each layer


def pruned_(model: Any, kept: Kept, biases: bool) -> None:
    """Random units stay, so many; `biases`: both readers of every layer get one, as a compensator's."""
    rng, sites, out_projections = torch.Generator().manual_seed(3), {}, {}
    for index, counts in enumerate(kept):
        block = model.block(index)
        for site, count in zip(block.sites, counts, strict=True):
            units = torch.randperm(site.units, generator=rng)[:count].sort().values.tolist()
            sites[site.name] = SitePlan(site.kind, site.units, tuple(units))
            if biases:
                weight = block.weights[site.name].out_projection[:, site.keep_C(units)] * 1.5
                out_projections[site.name] = (weight, torch.randn(len(weight), generator=rng, dtype=weight.dtype))
    shrink_(model, Plan(sites), out_projections)


def pruned_folder(folder: Path, name: str, kept: Kept, biases: bool = False) -> Path:
    """A pruned tiny model's checkpoint, in float64."""
    prefix, values = MODELS[name]
    random_model(prefix, values).save_pretrained(folder / "dense")
    model = ModelSource(name, str(folder / "dense"), None, "float64", "cpu", False, False, 4).load()
    pruned_(model, kept, biases)
    save(model, folder / "pruned")
    return folder / "pruned"


@torch.no_grad()
def model_logits(folder: Path, tokens_T: Tensor) -> Tensor:
    model = ModelSource("own", str(folder), None, "float64", "cpu", False, False, 4).load()
    return model.module(tokens_T[None]).logits[0].float()


def fewer_query_heads(folder: Path, name: str, left: Sequence[tuple[int, int]]) -> Path:
    """A tiny model's checkpoint, in float64: how many of three groups, and how many of four query heads of each (its
    last ones), stay in each layer."""
    prefix, values = MODELS[name]
    values = {**values, "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8}  # groups of four
    random_model(prefix, values).save_pretrained(folder / "dense")
    model = ModelSource(name, str(folder / "dense"), None, "float64", "cpu", False, False, 4).load()
    sites = {}
    for site, (groups, each) in zip((s for s in model.sites() if s.kind == "attention"), left, strict=True):
        heads = tuple(4 * group + head for group in range(groups) for head in range(4 - each, 4))
        sites[site.name] = SitePlan("attention", 3, tuple(range(groups)), 12, heads)
    shrink_(model, Plan(sites))
    save(model, folder / "pruned")
    return folder / "pruned"

"""Tiny configs of every model family, and of what varies within one."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from pruneexp.model.modeling_pruned import FAMILIES, Family
from pruneexp.surgery.stock_widths import stock_widths
from tests.conftest import FAMILIES as IN_CONFTEST
from tests.conftest import tiny_config

# hidden 48, six query heads of 8, three key/value heads, 24 FFN channels, three layers, 64 tokens
_SHAPE = {"vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 64}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 24}
_LLAMA = {**_SHAPE, **_IDS, **_HEADS}
_GEMMA = {**_LLAMA, "head_dim": 16}  # heads wider than hidden size / heads
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_WINDOWS = {"sliding_window": 8, "layer_types": _SLIDING}
_CAPPED = {**_GEMMA, **_WINDOWS, "query_pre_attn_scalar": 12}
_MIXTURE = {"num_experts_per_tok": 2}
_FUSED = {**_SHAPE, **_IDS, "num_attention_heads": 6}
_NEOX = {**_FUSED, "intermediate_size": 24, "rotary_pct": 0.5}
_FALCON = {**_FUSED, "ffn_hidden_size": 24}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 4.0],
}
_NTK_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 10.0, "factor": 1.0}

TINY: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (prefix of the config class, its values)
    "mistral_sliding": ("Mistral", {**_LLAMA, "sliding_window": 8}),
    "llama_multi_query": ("Llama", {**_LLAMA, "num_key_value_heads": 1}),
    "granite": (
        "Granite",
        {**_LLAMA, "residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "mlp_bias": True},
    ),
    "qwen2": ("Qwen2", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2_sliding": ("Qwen2", {**_LLAMA, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 16}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**_LLAMA, **_MIXTURE, "head_dim": 16, "moe_intermediate_size": 24, "num_experts": 4, "mlp_only_layers": [1]},
    ),
    "mixtral": ("Mixtral", {**_LLAMA, **_MIXTURE, "num_local_experts": 4, "sliding_window": 8}),
    "gemma": ("Gemma", _GEMMA),
    "gemma_multi_query": ("Gemma", {**_GEMMA, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", {**_CAPPED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", _CAPPED),
    "phi3": ("Phi3", {**_LLAMA, "sliding_window": 8}),
    "phi4_mini": (
        "Phi3",
        {
            **_LLAMA,
            "rope_parameters": {**_LONG_ROPE, "partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 32,
            "tie_word_embeddings": True,
        },
    ),
    "gpt2": (
        "GPT2",
        {"vocab_size": 64, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64, "n_inner": 24, **_IDS},
    ),
    "pythia": ("GPTNeoX", _NEOX),
    "neox_serial": ("GPTNeoX", {**_NEOX, "use_parallel_residual": False, "attention_bias": False}),
    "stablelm": ("StableLm", {**_LLAMA, "use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "stablelm_2_12b": ("StableLm", {**_LLAMA, "use_parallel_residual": True, "qk_layernorm": True}),
    "seed_oss": ("SeedOss", {**_LLAMA, "head_dim": 16}),
    "seed_oss_plain": ("SeedOss", {**_LLAMA, "head_dim": 16, "attention_bias": False}),
    "smollm3": ("SmolLM3", {**_LLAMA, "no_rope_layers": [1, 0, 1]}),
    "falcon_7b": ("Falcon", {**_FALCON, "multi_query": True}),
    "falcon_40b": ("Falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 3}),
    "falcon_11b": (
        "Falcon",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1},
    ),
    "falcon_rw": ("Falcon", {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
    "olmo2": ("Olmo2", _LLAMA),
    "olmo3": ("Olmo3", {**_LLAMA, **_WINDOWS}),
    "exaone4": ("Exaone4", {**_LLAMA, **_WINDOWS}),
    "exaone4_full": ("Exaone4", {**_LLAMA, "sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "ernie4_5": ("Ernie4_5", {**_LLAMA, "head_dim": 16}),
    "ernie4_5_biased": ("Ernie4_5", {**_LLAMA, "head_dim": 16, "use_bias": True}),
    "hunyuan": ("HunYuanDenseV1", {**_LLAMA, "head_dim": 16, "rope_parameters": _NTK_ROPE}),
    "arcee": ("Arcee", _LLAMA),
    "starcoder2": ("Starcoder2", {**_LLAMA, "sliding_window": 8}),
    "starcoder2_plain": ("Starcoder2", {**_LLAMA, "use_bias": False}),
    "cohere": ("Cohere", {**_LLAMA, "logit_scale": 0.25}),
    "cohere2": ("Cohere2", {**_LLAMA, **_WINDOWS, "logit_scale": 0.25}),
    "phi": ("Phi", _LLAMA),
    "phi_qk_norm": ("Phi", {**_LLAMA, "qk_layernorm": True}),
    "glm4": ("Glm4", _GEMMA),
    "nemotron": ("Nemotron", _GEMMA),
    "helium": ("Helium", {**_LLAMA, "head_dim": 8}),
    "apertus": ("Apertus", {**_LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "olmo": ("Olmo", {**_LLAMA, "clip_qkv": 0.5}),
}


def model_type_of(name: str) -> str:
    """The family of a tiny model, one of conftest's too."""
    stock = TINY[name][0] if name in TINY else FAMILIES[name].stock
    return next(model_type for model_type, family in FAMILIES.items() if family.stock == stock)


def of_every_family(where: Callable[[Family], bool] = lambda family: True, conftests: bool = True) -> tuple[str, ...]:
    """A tiny model of every family, conftest's or the first here: what many tests go through, so that none is left
    out."""
    first: dict[str, str] = {}
    for name in (*IN_CONFTEST, *TINY) if conftests else TINY:
        first.setdefault(model_type_of(name), name)
    return tuple(name for model_type, name in first.items() if where(FAMILIES[model_type]))


def others(names: tuple[str, ...], tried: Container[str]) -> tuple[str, ...]:
    """Those of the names that are not tried already."""
    return tuple(name for name in names if name not in tried)


def is_mixture(name: str) -> bool:
    """Whether a tiny model is a mixture of experts."""
    return FAMILIES[model_type_of(name)].experts is not None


def says_heads(name: str) -> bool:
    """Whether a stock config can say fewer heads. `test_families` holds the table to what the classes do."""
    if name in ("phi4_mini", "phi_qk_norm"):  # rotary factors, norms: their classes count them by hidden size / heads
        return False
    model_type = model_type_of(name)
    widths = stock_widths(model_type)
    return model_type in ("llama", "mistral") or is_mixture(name) or bool(widths and widths.num_attention_heads)


def tiny_config_of(name: str) -> Any:
    """The config of a tiny model, one of conftest's too."""
    import transformers

    return getattr(transformers, f"{TINY[name][0]}Config")(**TINY[name][1]) if name in TINY else tiny_config(name)


def tiny_model(name: str) -> Any:
    """A random model in float64, weights large enough for every part to matter."""
    return random_model(*TINY[name])


def random_model(prefix: str, values: dict[str, Any]) -> Any:
    """The same of any config: `prefix` of its class, and its values."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**values)
    model = transformers.AutoModelForCausalLM.from_config(config).double()
    for path, parameter in model.named_parameters():
        norm = "norm" in path or "ln_" in path
        # those two add one to their norms' weights
        centre = 1.0 if norm and path.endswith("weight") and not prefix.startswith(("Gemma", "Nemotron")) else 0.0
        torch.nn.init.normal_(parameter, mean=centre, std=0.2)
    return model.eval()

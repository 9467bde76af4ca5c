"""What stock configs can say of layers that are all alike, as a table of families."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class StockWidths:
    """What a stock config can say of all layers: config keys, None where it cannot. A bias flag may give one to the
    sublayer's in-projections, too."""

    intermediate_size: str = "intermediate_size"
    num_attention_heads: str | None = None
    num_key_value_heads: str | None = None
    attention_output_bias: str | None = None
    mlp_output_bias: str | None = None


_HEADS = StockWidths(num_attention_heads="num_attention_heads", num_key_value_heads="num_key_value_heads")
_HEADS_BIAS = replace(_HEADS, attention_output_bias="attention_bias")
_HEADS_BIASES = replace(_HEADS_BIAS, mlp_output_bias="mlp_bias")
_ONE_FLAG = replace(_HEADS, attention_output_bias="use_bias", mlp_output_bias="use_bias")
# By model_type, of those that do not count heads and channels as LLaMA does, or have keys for biases. None: no width.
# Heads of another size than hidden size / heads need a `head_dim` that is heeded.
_STOCK_WIDTHS: dict[str, StockWidths | None] = {
    "apertus": _HEADS_BIAS,
    "arcee": _HEADS_BIASES,
    "bloom": None,
    "cohere": _HEADS_BIAS,
    "cohere2": _HEADS_BIAS,
    "ernie4_5": _ONE_FLAG,
    "falcon": StockWidths("ffn_hidden_size"),
    "gemma": _HEADS_BIAS,
    "gemma2": _HEADS_BIAS,
    "gemma3_text": _HEADS_BIAS,
    "gpt2": StockWidths("n_inner"),
    "gpt_neox": StockWidths(),
    "granite": _HEADS_BIASES,
    "helium": StockWidths(mlp_output_bias="mlp_bias"),
    "hunyuan_v1_dense": _HEADS_BIAS,
    "nemotron": _HEADS_BIASES,
    "olmo": _HEADS_BIAS,
    "olmo2": _HEADS_BIAS,
    "olmo3": _HEADS_BIAS,
    "opt": StockWidths("ffn_dim"),
    "qwen3": _HEADS_BIAS,
    "seed_oss": replace(_HEADS, attention_output_bias="attention_out_bias", mlp_output_bias="mlp_bias"),
    "smollm3": _HEADS_BIASES,
    "stablelm": StockWidths(),
    "starcoder2": _ONE_FLAG,
}


def stock_widths(model_type: str) -> StockWidths | None:
    """What the family's stock config can say; None where layers can only leave whole."""
    return _STOCK_WIDTHS.get(model_type, _HEADS)

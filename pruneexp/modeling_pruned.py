"""Language models whose decoder layers differ in width: the one file that travels beside a pruned checkpoint.

Self-contained on purpose (torch and transformers only): `save` copies it next to the weights, and
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` needs nothing else. The same functions shrink
the model in memory, so what was evaluated and what is reloaded are built by one piece of code.

A checkpoint's `config.json` keeps the *original* model's global values, its own `model_type` ("pruned_llama"), and the
structure in the `per_layer_config` schema of transformers: head counts and FFN width of every layer, whether its two
readers own a bias, and, where attention carries ALiBi slopes, which of the original heads are left.
"""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from functools import cache, partialmethod
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Writer:
    """A linear layer whose output rows belong to units; `roles` are the parts of each unit's rows, in order."""

    path: str  # below the decoder layer
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """Where a decoder-only architecture keeps its parts. Paths are relative to the decoder layer but for `layers`."""

    stock: str  # prefix of the stock classes: Llama -> LlamaConfig, LlamaForCausalLM, LlamaModel
    layers: str  # the list of decoder layers, below the base model
    attention: str
    attention_writers: tuple[Writer, ...]
    attention_reader: str
    attention_norm: str
    mlp: str  # the FFN's own module, or its reader where it has none
    mlp_writers: tuple[Writer, ...]
    mlp_reader: str
    mlp_norm: str
    head_count: str | None = None  # attribute of the attention module that holds its number of heads, if it has one
    adds_residual: bool = False  # the sublayers take the residual as second argument and add it themselves
    returns_tuple: bool = False  # the decoder layer returns (hidden states, ...)
    alibi: bool = False  # attention receives `alibi` [B*heads, 1, T], one slope a head
    learned_positions: bool = False  # positions are looked up in a table: beyond its end there is no answer
    post_norm: tuple[str, bool] | None = None  # (config attribute, value) with which the norms follow the sublayers


LLAMA = Family(
    stock="Llama",
    layers="layers",
    attention="self_attn",
    attention_writers=(
        Writer("self_attn.q_proj", ("query",)),
        Writer("self_attn.k_proj", ("key",)),
        Writer("self_attn.v_proj", ("value",)),
    ),
    attention_reader="self_attn.o_proj",
    attention_norm="input_layernorm",
    mlp="mlp",
    mlp_writers=(Writer("mlp.gate_proj", ("gate",)), Writer("mlp.up_proj", ("up",))),
    mlp_reader="mlp.down_proj",
    mlp_norm="post_attention_layernorm",
)
MISTRAL = Family(**{**LLAMA.__dict__, "stock": "Mistral"})
GRANITE = Family(**{**LLAMA.__dict__, "stock": "Granite"})
OPT = Family(
    stock="OPT",
    layers="decoder.layers",
    attention="self_attn",
    attention_writers=LLAMA.attention_writers,
    attention_reader="self_attn.out_proj",
    attention_norm="self_attn_layer_norm",
    mlp="fc2",
    mlp_writers=(Writer("fc1", ("up",)),),
    mlp_reader="fc2",
    mlp_norm="final_layer_norm",
    head_count="num_heads",
    learned_positions=True,
    post_norm=("do_layer_norm_before", False),
)
BLOOM = Family(
    stock="Bloom",
    layers="h",
    attention="self_attention",
    attention_writers=(Writer("self_attention.query_key_value", ("query", "key", "value")),),
    attention_reader="self_attention.dense",
    attention_norm="input_layernorm",
    mlp="mlp",
    mlp_writers=(Writer("mlp.dense_h_to_4h", ("up",)),),
    mlp_reader="mlp.dense_4h_to_h",
    mlp_norm="post_attention_layernorm",
    head_count="num_heads",
    adds_residual=True,
    returns_tuple=True,
    alibi=True,
    post_norm=("apply_residual_connection_post_layernorm", True),
)
FAMILIES = {"llama": LLAMA, "mistral": MISTRAL, "granite": GRANITE, "opt": OPT, "bloom": BLOOM}  # by stock model_type


@dataclass(frozen=True)
class LayerStructure:
    """Widths of one decoder layer, as they stand in `per_layer_config`."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    attention_output_bias: bool
    mlp_output_bias: bool
    kept_heads: tuple[int, ...] | None = None  # original query-head indices, where they matter (ALiBi)

    def to_config(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not None}


class RemovedAttention(nn.Module):
    """Attention that lost all its heads: what it still adds is its output bias, if it owns one."""

    def __init__(self, reader_name: str, reader: nn.Module, adds_residual: bool):
        super().__init__()
        self.reader_name, self.adds_residual = reader_name, adds_residual
        self.add_module(reader_name, reader)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        nothing = hidden_states.new_empty(*hidden_states.shape[:-1], 0)
        output = self.get_submodule(self.reader_name)(nothing)
        if self.adds_residual:
            output = output + (args[0] if args else kwargs["residual"])
        return output, None


def resize_layer_(layer: nn.Module, family: Family, structure: LayerStructure, head_dim: int, pre_norm: bool) -> None:
    """Gives the decoder layer `structure`'s widths. Resized weights are uninitialised: load them afterwards.

    A sublayer that keeps no unit leaves only its reader's bias; the norm in front of it goes too (`pre_norm`: where
    the norm serves nothing else).
    """
    heads, kv_heads = structure.num_attention_heads, structure.num_key_value_heads
    group = heads // kv_heads if kv_heads else 0
    rows = {"query": group * head_dim, "key": head_dim, "value": head_dim, "gate": 1, "up": 1}
    attention_bias = structure.attention_output_bias
    _resize_(layer, family.attention_reader, inputs=heads * head_dim, bias=attention_bias)
    _resize_(layer, family.mlp_reader, inputs=structure.intermediate_size, bias=structure.mlp_output_bias)
    for writer in family.mlp_writers:
        _resize_(layer, writer.path, outputs=structure.intermediate_size)
    if heads == 0:
        reader_name = family.attention_reader.rsplit(".", 1)[-1]
        reader = layer.get_submodule(family.attention_reader)
        layer.set_submodule(family.attention, RemovedAttention(reader_name, reader, family.adds_residual))
    else:
        for writer in family.attention_writers:
            _resize_(layer, writer.path, outputs=kv_heads * sum(rows[role] for role in writer.roles))
        attention = layer.get_submodule(family.attention)
        if structure.kept_heads is not None and structure.kept_heads != slope_heads(attention, family):
            _keep_slopes_(attention, structure.kept_heads)
        if family.head_count:
            setattr(attention, family.head_count, heads)
    if pre_norm and heads == 0:
        layer.set_submodule(family.attention_norm, nn.Identity())
    if pre_norm and structure.intermediate_size == 0:
        layer.set_submodule(family.mlp_norm, nn.Identity())


def number_caches_(layers: nn.ModuleList, family: Family) -> bool:
    """Numbers the layers' attention consecutively, so that the KV cache has no gaps: a cache tells its length by its
    first entry, which must exist. Returns whether any attention is left."""
    attentions = [layer.get_submodule(family.attention) for layer in layers]
    attentions = [a for a in attentions if not isinstance(a, RemovedAttention)]
    for index, attention in enumerate(attentions):
        attention.layer_idx = index  # pyright: ignore[reportArgumentType]
    return bool(attentions)


def is_pre_norm(family: Family, config: Any) -> bool:
    """Whether each sublayer's norm stands in front of it and feeds it alone."""
    return family.post_norm is None or getattr(config, family.post_norm[0]) != family.post_norm[1]


def head_size(config: Any) -> int:
    """Channels of one attention head, from a stock config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _resize_(
    layer: nn.Module, path: str, *, inputs: int | None = None, outputs: int | None = None, bias: bool | None = None
) -> None:
    """Replaces the linear layer at `path` by an uninitialised one where its shape or bias differs."""
    old = layer.get_submodule(path)
    assert isinstance(old, nn.Linear), path
    inputs, outputs = (
        (old.in_features if inputs is None else inputs),
        (old.out_features if outputs is None else outputs),
    )
    bias = old.bias is not None if bias is None else bias
    if (inputs, outputs, bias) == (old.in_features, old.out_features, old.bias is not None):
        return
    with torch.device("meta"):  # skips the random initialisation, which would warn of nothing to initialise
        new = nn.Linear(inputs or 1, outputs or 1, bias=bias)
    new.in_features, new.out_features = inputs, outputs
    empty = {"device": old.weight.device, "dtype": old.weight.dtype}
    new.weight = nn.Parameter(torch.empty(outputs, inputs, **empty), requires_grad=old.weight.requires_grad)
    if bias:
        new.bias = nn.Parameter(torch.zeros(outputs, **empty), requires_grad=old.weight.requires_grad)
    layer.set_submodule(path, new.train(old.training))


def slope_heads(attention: nn.Module, family: Family) -> tuple[int, ...] | None:
    """Original indices of the heads whose ALiBi slopes this attention uses; None for families without ALiBi."""
    if not family.alibi or family.head_count is None:
        return None
    kept_heads = getattr(attention, "kept_heads", None)
    return tuple(range(getattr(attention, family.head_count, 0))) if kept_heads is None else kept_heads


def _keep_slopes_(attention: nn.Module, kept_heads: tuple[int, ...]) -> None:
    """Each kept head keeps its own ALiBi slope: the model hands all of the original heads' slopes to every layer."""

    def select(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        alibi, batch = kwargs["alibi"], args[0].shape[0]
        kept = alibi.view(batch, -1, *alibi.shape[1:])[:, list(module.kept_heads)]
        return args, {**kwargs, "alibi": kept.flatten(0, 1)}

    if not hasattr(attention, "kept_heads"):
        attention.register_forward_pre_hook(select, with_kwargs=True)
    attention.kept_heads = kept_heads  # pyright: ignore[reportArgumentType]


def stock_config(config: Any) -> Any:
    """The original model's config: the pruned one without its structure."""
    model_type = config.model_type.removeprefix("pruned_")
    stock = getattr(importlib.import_module("transformers"), FAMILIES[model_type].stock + "Config")
    values = {k: v for k, v in config.to_dict().items() if k not in ("per_layer_config", "model_type", "auto_map")}
    copied = stock(**values)
    copied._attn_implementation = config._attn_implementation
    return copied


def layer_structures(config: Any) -> list[LayerStructure]:
    """The structure of every layer, read from `per_layer_config`."""
    structures = []
    for layer in config.per_layer_config:
        kept_heads = getattr(layer, "kept_heads", None)
        structures.append(
            LayerStructure(
                num_attention_heads=layer.num_attention_heads,
                num_key_value_heads=getattr(layer, "num_key_value_heads", layer.num_attention_heads),
                intermediate_size=layer.intermediate_size,
                attention_output_bias=layer.attention_output_bias,
                mlp_output_bias=layer.mlp_output_bias,
                kept_heads=None if kept_heads is None else tuple(kept_heads),
            )
        )
    return structures


def _init_pruned(model: Any, stock_class: type, config: Any, *args: Any, **kwargs: Any) -> None:
    stock = stock_config(config)
    stock_class.__init__(model, stock, *args, **kwargs)  # type: ignore[misc]
    family = FAMILIES[config.model_type.removeprefix("pruned_")]
    layers = model.base_model.get_submodule(family.layers)
    for layer, structure in zip(layers, layer_structures(config), strict=True):
        resize_layer_(layer, family, structure, head_size(stock), is_pre_norm(family, stock))
    if not number_caches_(layers, family):
        config.use_cache = stock.use_cache = False
    model.config = config


@cache
def __getattr__(name: str) -> type:
    """PrunedLlamaConfig, PrunedLlamaForCausalLM, PrunedLlamaModel ...: made from the stock class when asked for."""
    if not name.startswith("Pruned"):  # Python itself asks for names like __path__: no reason to import transformers
        raise AttributeError(name)
    transformers = importlib.import_module("transformers")
    families = {family.stock: model_type for model_type, family in FAMILIES.items()}
    for suffix in ("Config", "ForCausalLM", "Model"):
        stock = name.removeprefix("Pruned").removesuffix(suffix)
        if name != f"Pruned{stock}{suffix}" or stock not in families:
            continue
        stock_class = getattr(transformers, stock + suffix)
        body: dict[str, Any] = {"__module__": __name__, "__doc__": f"{stock_class.__name__} with pruned layers."}
        if suffix == "Config":
            strict = importlib.import_module("huggingface_hub.dataclasses").strict
            body["model_type"] = f"pruned_{families[stock]}"
            body["validate_architecture"] = lambda self: None  # heads need not divide the hidden size here
            return strict(type(name, (stock_class,), body))
        body["config_class"] = __getattr__(f"Pruned{stock}Config")
        body["__init__"] = partialmethod(_init_pruned, stock_class)
        return type(name, (stock_class,), body)
    raise AttributeError(name)

"""Layers of uneven width made alike again: zeros up to the widest, so that a stock architecture can hold them."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pruneexp.model import Model, layer_structure
from pruneexp.model.modeling_pruned import (
    FFN_ROWS,
    LayerStructure,
    RemovedAttention,
    UnitRows,
    as_matrix,
    resize_layer_,
    split_parts,
)
from pruneexp.model.sites import head_norm_rows, inputs_of
from pruneexp.model.weights import set_tensor_
from pruneexp.surgery.forms import Form, original_structure, stock_layers, uniform_form
from pruneexp.types import ConfigError


@dataclass(frozen=True)
class Padding:
    """One structure for all layers, and the stock form that holds it. `params`: of the padded model."""

    structure: LayerStructure
    form: Form
    params: int


def padding(model: Model, multiple: int = 1) -> Padding:
    """The narrowest padding that a stock config can say, FFN widths rounded up to `multiple`. Needs no weights.

    Raises ConfigError, with the reason, where there is none.
    """
    if model.mixture:
        raise ConfigError("format=padded: expected format=remote_code for a mixture of experts, which is not padded")
    structures, layout = model.structures, model.head_layout
    before = original_structure(model)
    if any(s.num_attention_heads != s.num_key_value_heads * layout.group for s in structures if not layout.shared):
        raise ConfigError(
            "format=padded: expected format=remote_code for KV groups that lost query heads, which are not padded"
        )
    heads = max(layout.group, *(s.num_attention_heads for s in structures))
    if before.kept_heads is not None:  # a slope goes with the head's place
        heads = before.num_attention_heads
    widest = max(1, *(s.intermediate_size for s in structures))
    rounded = -(-widest // multiple) * multiple
    biased = replace(
        before,
        attention_output_bias=any(s.attention_output_bias for s in structures),
        mlp_output_bias=any(s.mlp_output_bias for s in structures),
    )
    fresh = stock_layers(model)
    widths = [n for n in dict.fromkeys((rounded, before.intermediate_size)) if n >= widest and n % multiple == 0]
    for channels in widths:
        for wide in dict.fromkeys((heads, before.num_attention_heads)):
            kv_heads = layout.key_value_heads(wide)
            one = replace(biased, num_attention_heads=wide, num_key_value_heads=kv_heads, intermediate_size=channels)
            layer = padded_layer(model, 0, one, deepcopy(fresh[0]))
            if form := uniform_form(model, one, layer):
                outside = model.params - model.decoder_params
                params = outside + len(model.layers) * sum(p.numel() for p in layer.parameters())
                _check_joint_norms(model, layer, [s.num_attention_heads for s in structures], wide)
                if not any(s.num_attention_heads for s in structures):
                    form.config.use_cache = True  # which a model without any attention cannot have
                why = f"every layer padded to {wide} heads and {channels} FFN channels"
                return Padding(one, replace(form, why=why), params)
    kind = model.config.model_type
    if biased != before:
        biases = f"no stock class computes {kind} with the biases that pruning added behind its sublayers"
        raise ConfigError(f"format=padded: {biases}; expected format=remote_code")
    raise ConfigError(
        f"format=padded: {kind}'s config cannot say {rounded} FFN channels; expected format=remote_code, "
        f"or multiple=N that divides {before.intermediate_size}"
    )


def _check_joint_norms(model: Model, layer: nn.Module, heads: list[int], wide: int) -> None:
    """Raises ConfigError where `_pad_joint_norm_` would round half-precision weights once more."""
    joint = [norm for norm in model.family.head_norms if not hasattr(layer.get_submodule(norm.path), "norms")]
    exact = all(math.frexp((wide / own) ** 0.5)[0] == 0.5 for own in heads if own)
    if joint and not exact and model.dtype in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"format=padded: {model.config.model_type} normalises the queries of all heads together, and making up for "
            f"added heads is not exact in {str(model.dtype).removeprefix('torch.')}; expected format=remote_code"
        )


def pad_(model: Model, padding: Padding) -> None:
    """Pads every layer of a model in memory. It can be saved then; it computes what it did."""
    fresh = stock_layers(model)
    for index in range(len(model.layers)):
        model.layers[index] = padded_layer(model, index, padding.structure, fresh[index])


@torch.no_grad()
def padded_layer(model: Model, index: int, structure: LayerStructure, layer: Any) -> nn.Module:
    """Gives the stock `layer` the widths of `structure` and the weights of decoder layer `index`, zeros beyond them."""
    family, old = model.family, model.layers[index]
    resize_layer_(layer, family, structure, model.head_layout)
    own, device = old.state_dict(), model.module.get_input_embeddings().weight.device
    for name, tensor in layer.state_dict().items():
        if name in own and own[name].shape == tensor.shape:
            set_tensor_(layer, name, own[name])
        else:  # a norm that is gone had nothing to normalise: any weight will do
            scales = name.endswith("weight") and ("norm" in name or name.startswith("ln_"))
            fill = 1.0 - family.norm_offset if scales else 0.0
            set_tensor_(layer, name, torch.full(tensor.shape, fill, dtype=model.dtype, device=device))
    if not isinstance(old.get_submodule(family.attention), RemovedAttention):
        _pad_attention_(model, old, layer)
    for in_projection in family.mlp_in:
        _pad_in_projection_(model, old, layer, in_projection, FFN_ROWS, inputs_of(old, family.mlp_out), slots=None)
    _pad_out_projection_(old, layer, family.mlp_out, columns=None)
    return layer


def _pad_attention_(model: Model, old: Any, layer: Any) -> None:
    family, layout = model.family, model.head_layout
    units = inputs_of(old, family.attention_out) // (layout.group * layout.size)
    kept_heads = layer_structure(old, family, model.config).kept_heads
    slots = None if kept_heads is None else torch.tensor(kept_heads[:: layout.group]) // layout.group
    for in_projection in family.attention_in:
        _pad_in_projection_(model, old, layer, in_projection, layout.rows, units, slots)
    width = layout.group * layout.size
    columns = None if slots is None else (slots[:, None] * width + torch.arange(width)).flatten()
    _pad_out_projection_(old, layer, family.attention_out, columns)
    for norm in family.head_norms:
        if not hasattr(layer.get_submodule(norm.path), "norms"):
            _pad_joint_norm_(model, old, layer, norm, units)


def _pad_in_projection_(
    model: Model, old: Any, layer: Any, in_projection: UnitRows, rows: dict[str, int], units: int, slots: Tensor | None
) -> None:
    """Puts the rows of the units in their places (`slots`; None: the first ones), those of shared roles as they are."""
    if units == 0:
        return
    source, target = old.get_submodule(in_projection.path), layer.get_submodule(in_projection.path)
    shared = model.family.shared_roles
    places = torch.arange(units) if slots is None else slots
    for leaf, parameter in source.named_parameters():
        into = getattr(target, leaf)
        if into.shape == parameter.shape:  # `state_dict` gave it already
            continue
        from_rows, to_rows = parameter, torch.zeros_like(into)
        into.data = to_rows
        if parameter.ndim == 2:
            from_rows, to_rows = as_matrix(source, parameter), as_matrix(target, to_rows)
        common = sum(rows[role] for role in in_projection.roles if role in shared)
        wide = (to_rows.shape[0] - common) // (sum(rows[role] for role in in_projection.roles) - common)
        parts = split_parts(from_rows, in_projection, units, rows, shared)
        for role, part in split_parts(to_rows, in_projection, wide, rows, shared).items():
            part[slice(None) if role in shared else places.to(part.device)] = parts[role]


def _pad_out_projection_(old: Any, layer: Any, path: str, columns: Tensor | None) -> None:
    source, target, count = old.get_submodule(path), layer.get_submodule(path), inputs_of(old, path)
    if count in (0, inputs_of(layer, path)):  # `padded_layer` has set it
        return
    matrix = as_matrix(target, torch.zeros_like(target.weight))
    places = torch.arange(count) if columns is None else columns
    matrix[:, places.to(matrix.device)] = as_matrix(source, source.weight)
    target.weight.data = as_matrix(target, matrix).contiguous()


def _pad_joint_norm_(model: Model, old: Any, layer: Any, norm: UnitRows, units: int) -> None:
    """A root mean square over all heads' channels gets smaller with zeros among them: the rows in front of it grow by
    as much as makes up for it (so that its epsilon means the same), and its weight shrinks by that."""
    source, target = old.get_submodule(norm.path), layer.get_submodule(norm.path)
    had, has = source.weight.numel(), target.weight.numel()
    if had == has:
        return
    factor = (has / had) ** 0.5
    in_projection = next(w for w in model.family.attention_in if w.roles == norm.roles)
    for parameter in layer.get_submodule(in_projection.path).parameters():
        parameter.data = parameter.data * factor
    _pad_in_projection_(model, old, layer, norm, model.head_layout.rows, units, slots=None)
    target.weight.data = target.weight.data / factor
    assert len(head_norm_rows(layer, norm)) == 1, "a bias would have to stay as it is"

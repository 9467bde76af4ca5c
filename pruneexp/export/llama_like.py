"""Models for servers whose own LLaMA has a width for every layer: llama.cpp's `deci`, vLLM's DeciLM.

Both have RMS norms in front of both sublayers, SiLU-gated FFNs and rotary positions over whole heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruneexp.export.checkpoint import can_pad
from pruneexp.model import Model, layer_structure
from pruneexp.model.modeling_pruned import FFN_ROWS, Family, UnitRows, head_size, linear_sizes, split_parts
from pruneexp.model.sites import layer_layout
from pruneexp.surgery import broken_period, save_form
from pruneexp.surgery.served import NOT_SERVED
from pruneexp.types import ConfigError

STOCKS = ("Llama", "Mistral", "Qwen2", "Phi3", "Granite", "SmolLM3")
ROPES = ("default", "linear", "llama3")
IN_PROJECTIONS = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"}
IN_PROJECTIONS |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj"}  # by role, as a LLaMA calls them


def check_llama_like(model: Model, format: str) -> None:
    """Raises ConfigError, naming another format, where the model computes anything that a LLaMA does not."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    multipliers = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    scale = getattr(config, "attention_multiplier", None) or head_size(config) ** -0.5
    gate = getattr(config, "hidden_act", None)
    problems = {
        f"only {', '.join(stock.lower() for stock in STOCKS)} models are LLaMA-like": model.family.stock not in STOCKS,
        f"its FFNs are gated by {gate}": gate not in ("silu", "swish"),
        f"its rotary positions are of type {rope.get('rope_type')}": rope.get("rope_type", "default") not in ROPES,
        "its rotary positions cover a part of each head": (rope.get("partial_rotary_factor") or 1.0) != 1.0,
        "some layers have no positions": not all(getattr(config, "no_rope_layers", None) or [1]),
        "its multipliers are not 1": any((getattr(config, name, None) or 1.0) != 1.0 for name in multipliers)
        or not math.isclose(scale, head_size(config) ** -0.5, rel_tol=1e-6),
        "its head has a bias": getattr(model.module.get_output_embeddings(), "bias", None) is not None,
    }
    if reason := next((reason for reason, there in problems.items() if there), None):
        expected = f"expected {other_formats(model)}"
        raise ConfigError(f"format={format}: {config.model_type} is no LLaMA ({reason}); {expected}")


def other_formats(model: Model) -> str:
    """What holds the model beside the formats of LLaMA-like models."""
    if name := broken_period(model.config):
        known = f"for transformers and vLLM: no GGUF file, llama.cpp assumes another order of {name}"
    else:
        known = "which the server's own converter or loader may know"
    if save_form(model).kind == "stock":
        return f"format=stock, {known}"
    padded = f"format=padded, {known}, or " if can_pad(model) else ""
    served = "" if model.config.model_type in NOT_SERVED else ", which vLLM serves with --trust-remote-code"
    return f"{padded}format=remote_code{served}"


def context_length(model: Model) -> int:
    """The longest text for which the export computes what the model does: neither server knows sliding windows."""
    limits = [getattr(model.config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    return min(limit for limit in limits if limit)


def window_note(model: Model) -> list[str]:
    """What to tell of a sliding window that is shorter than the model's context."""
    window = getattr(model.config, "sliding_window", None)
    if not window or window >= (model.max_length or window):
        return []
    return [f"the context is {window} tokens, the model's sliding window: beyond it the export would compute otherwise"]


def rope_factors(model: Model) -> Tensor | None:
    """What each rotary frequency is divided by: float32 [head size / 2]; None where nothing is scaled."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = model.config.rope_parameters
    if rope.get("rope_type", "default") == "default":
        return None
    scaled, attention_scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](model.config, torch.device("cpu"))
    assert attention_scale == 1.0, "neither linear nor llama3 scales attention"
    size = head_size(model.config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / scaled


@dataclass(frozen=True)
class LlamaLayer:
    """A decoder layer as a server sees it: the model's own widths, or zeros where the model has nothing left and the
    server cannot do without."""

    index: int  # of the model's layer
    heads: int
    kv_heads: int
    channels: int


def rounded_up(channels: int, multiple: int) -> int:
    """FFN channels up to a multiple, which quantised rows and kernels want: those that are added are zeros."""
    return -(-channels // multiple) * multiple


def rounded_note(model: Model, layers: Sequence[LlamaLayer], multiple: int) -> str:
    """What rounding changed, "" where it did nothing."""
    structures = model.structures
    count = sum(structures[layer.index].intermediate_size < layer.channels for layer in layers)
    return f", {count} FFNs filled up with zeros to multiples of {multiple}" if multiple > 1 and count else ""


def layers_with_effect(model: Model) -> list[int]:
    """The indices of the layers that change the hidden states at all."""
    return [
        index
        for index, own in enumerate(model.structures)
        if own.num_attention_heads or own.intermediate_size or own.attention_output_bias or own.mlp_output_bias
    ]


@torch.no_grad()
def layer_tensors(model: Model, layer: LlamaLayer) -> dict[str, Tensor]:
    """The layer's tensors by their names in a LLaMA ("self_attn.q_proj.weight" ...), fused ones taken apart, zeros (and
    norms of one) for what the model has not. On the meta device, as the model is there: their shapes."""
    family, module = model.family, model.layers[layer.index]
    own, layout = layer_structure(module, family, model.config), layer_layout(module, family, model.config)
    hidden: int = model.config.hidden_size
    like = next(module.parameters(), torch.empty(0, dtype=model.dtype, device=model.device))
    tensors: dict[str, Tensor] = {}
    if layer.heads:
        heads = {"query": layer.heads, "key": layer.kv_heads, "value": layer.kv_heads}
        shapes = {role: (count * layout.size, hidden) for role, count in heads.items()}
        units = own.num_attention_heads // layout.group
        tensors |= _in_projections(module, family, family.attention_in, units, layout.rows, shapes, like)
        tensors |= _norm("input_layernorm", module, family.attention_norm, hidden, like)
        tensors |= _out_projection("self_attn.o_proj", module, family.attention_out, layer.heads * layout.size, like)
    if layer.channels:
        shapes = {role: (layer.channels, hidden) for role in FFN_ROWS}
        tensors |= _in_projections(module, family, family.mlp_in, own.intermediate_size, FFN_ROWS, shapes, like)
        tensors |= _norm("post_attention_layernorm", module, family.mlp_norm, hidden, like)
        tensors |= _out_projection("mlp.down_proj", module, family.mlp_out, layer.channels, like)
    return tensors


def _in_projections(
    module: nn.Module,
    family: Family,
    in_projections: Sequence[UnitRows],
    units: int,
    rows: dict[str, int],
    shapes: dict[str, tuple[int, int]],
    like: Tensor,
) -> dict[str, Tensor]:
    """A sublayer's in-projections by LLaMA's names, of so many units with `rows` each; zeros up to `shapes`."""
    parts: dict[str, dict[str, Tensor]] = {role: {} for role in shapes}  # "weight" and, where there is one, "bias"
    for in_projection in in_projections if units else ():
        for leaf, parameter in module.get_submodule(in_projection.path).named_parameters():
            for role, part in split_parts(parameter, in_projection, units, rows, family.shared_roles).items():
                parts[role][leaf] = _filled_up(part.flatten(0, 1), 0, shapes[role][0])
    return {
        f"{IN_PROJECTIONS[role]}.{leaf}": tensor
        for role, part in parts.items()
        for leaf, tensor in (part or {"weight": like.new_zeros(shapes[role])}).items()
    }


def _norm(name: str, module: nn.Module, path: str | None, hidden: int, like: Tensor) -> dict[str, Tensor]:
    assert path is not None, "a LLaMA has its norms in front of the sublayers"
    weight = getattr(module.get_submodule(path), "weight", None)  # None: it went with its sublayer
    return {f"{name}.weight": like.new_ones(hidden) if weight is None else weight}


def _out_projection(name: str, module: nn.Module, path: str, inputs: int, like: Tensor) -> dict[str, Tensor]:
    linear: Any = module.get_submodule(path)
    had, outputs = linear_sizes(linear)
    weight = _filled_up(linear.weight, 1, inputs) if had else like.new_zeros(outputs, inputs)
    return {f"{name}.weight": weight} | ({} if linear.bias is None else {f"{name}.bias": linear.bias})


def _filled_up(tensor: Tensor, dim: int, size: int) -> Tensor:
    """The tensor with zeros behind it, up to `size`."""
    missing = list(tensor.shape)
    missing[dim] = size - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim) if missing[dim] else tensor

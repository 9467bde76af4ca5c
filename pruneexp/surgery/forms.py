"""In which form a pruned model is written down: a stock architecture, or the modeling file beside the weights."""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruneexp.model import Model, layer_structure, modeling_pruned, select_layers_
from pruneexp.model.modeling_pruned import FAMILIES, Family, LayerStructure, family_of, head_size
from pruneexp.surgery.stock_widths import stock_widths

logger = logging.getLogger("pruneexp")

REMOTE_CODE = Path(modeling_pruned.__file__)


@dataclass(frozen=True)
class Form:
    """How a pruned model is written down. `kind`: "stock" (loads with plain transformers) or "remote_code"."""

    kind: str
    why: str
    config: Any  # the config to save
    zero_biases: tuple[str, ...] = ()  # linear layers, below a decoder layer, whose stock class insists on a bias


def save_form(model: Model) -> Form:
    """The simplest faithful form: a stock architecture where all layers are alike and one can say so, else the
    modeling file beside the weights with the structure in `per_layer_config`."""
    structures = model.structures
    if model.family.experts:
        why = "layers or experts are not alike, their width is no multiple of 8, or the stock class lacks their biases"
        return _uniform_mixture(model, structures) or remote_code_form(model, why)
    before = original_structure(model)
    if all(s == before for s in structures):
        return _unchanged(model)
    if any(s != structures[0] for s in structures):
        return remote_code_form(model, "widths differ between layers")
    return _uniform_stock(model, structures[0], before, model.layers[0]) or remote_code_form(
        model, f"{model.config.model_type} has no stock form of these widths"
    )


def fits_config(model: Model) -> bool:
    """Whether the config that transformers' own `save_pretrained` writes is that of the model as it stands."""
    if model.mixture:
        return False
    before = original_structure(model)
    return all(own == before for own in model.structures)


def uniform_form(model: Model, structure: LayerStructure, layer: nn.Module) -> Form | None:
    """A stock form of the model with `structure`, that of `layer`, in every layer; None where there is none."""
    before = original_structure(model)
    if structure == before:
        return _unchanged(model)
    return _uniform_stock(model, structure, before, layer)


def _unchanged(model: Model) -> Form:
    config = deepcopy(model.config)
    config.__dict__.pop("auto_map", None)  # of code that does not travel; the stock class needs none
    read = config.architectures or ["Pruned"]  # a model that was never saved has none
    if any(name.startswith("Pruned") for name in read):
        config.architectures = [stock_class(config.model_type).__name__]
    return Form("stock", "every width is as the config says", config)


def original_structure(model: Model) -> LayerStructure:
    """What a stock decoder layer of the model's config looks like."""
    return layer_structure(_stock_layer(model.config, model.family), model.family, model.config)


def _stock_layer(config: Any, family: Family) -> nn.Module:
    """A decoder layer as a stock config describes it, without weights."""
    one = deepcopy(config)
    select_layers_(one, [0])
    return _stock_layers(one, family)[0]


def stock_layers(model: Model) -> nn.ModuleList:
    """The decoder layers as the stock class has them, without weights."""
    return _stock_layers(model.config, model.family, dtype=model.dtype)


def _stock_layers(config: Any, family: Family, **dtype: torch.dtype) -> nn.ModuleList:
    with torch.device("meta"):
        stock = stock_class(config.model_type)._from_config(config, **dtype)
    return stock.base_model.get_submodule(family.layers)


def stock_class(model_type: str) -> Any:
    import transformers

    return getattr(transformers, FAMILIES[model_type].stock_class)


def _uniform_stock(model: Model, structure: LayerStructure, before: LayerStructure, layer: nn.Module) -> Form | None:
    """A stock config for `structure`, that of `layer`, in every layer, where the family (or one that computes the same)
    has it."""
    config, heads = model.config, structure.num_attention_heads
    if heads == 0 or structure.intermediate_size == 0:
        return None
    if config.model_type not in ("llama", "mistral"):
        return _uniform_own(model, structure, before, layer)
    biases_kept = not _other_biases(structure, before)
    if getattr(config, "sliding_window", None) is not None and not biases_kept:
        return None  # only Mistral has the window, and it has no biases
    return _uniform_llama(model, structure, biases_kept)


def _values(model: Model) -> dict[str, Any]:
    """What the model's config says, but for the class and the code that it belongs to."""
    return {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures", "auto_map")}


def _uniform_own(model: Model, structure: LayerStructure, before: LayerStructure, layer: nn.Module) -> Form | None:
    """The model's own stock class with other widths, where its config takes them and builds what they say."""
    widths = stock_widths(model.config.model_type)
    if widths is None:
        return None
    values, linears = _values(model), []
    for what, key in asdict(widths).items():
        if getattr(structure, what) == getattr(before, what):
            continue
        if key is None:
            return None
        values[key] = getattr(structure, what)
        if what == "num_attention_heads":
            values["head_dim"] = head_size(model.config)
        elif what.endswith("_bias"):
            in_projections = model.family.attention_in if what.startswith("attention") else model.family.mlp_in
            linears += [in_projection.path for in_projection in in_projections]
    try:
        config = type(model.config)(**values)
        stock = _stock_layer(config, family_of(config))
    except Exception as error:  # each config class checks itself in its own way
        logger.debug("%s: no stock config of these widths (%s)", model.config.model_type, error)
        return None
    shapes = [{name: p.shape for name, p in one.named_parameters()} for one in (stock, layer)]
    linears = [path for path in linears if f"{path}.bias" in shapes[0]]  # some flags are the out-projection's alone
    missing = {f"{path}.bias" for path in linears}
    same = all(shapes[0].get(name) == shape for name, shape in shapes[1].items())
    if not same or not set(shapes[0]) - set(shapes[1]) <= missing or head_size(config) != head_size(model.config):
        return None
    config.architectures = [stock_class(config.model_type).__name__]
    return Form("stock", "all layers have one width", config, tuple(linears))


def _uniform_mixture(model: Model, structures: list[LayerStructure]) -> Form | None:
    """A mixture's own stock class. All layers must have the same heads, all mixtures as many experts of one width, all
    other FFNs one width, and pruning must not have added biases. A pruned width must be a multiple of 8: transformers
    runs fused experts by torch's grouped product, which only takes rows of whole 16 bytes."""
    before = _stock_structures(model)
    if structures == before:
        return _unchanged(model)
    mixed = [s for s in structures if s.expert_sizes is not None]
    plain = [s for s in structures if s.expert_sizes is None]
    heads = {(s.num_attention_heads, s.num_key_value_heads) for s in structures}
    experts, widths = {len(s.expert_sizes or ()) for s in mixed}, {size for s in mixed for size in s.expert_sizes or ()}
    ffns = {s.intermediate_size for s in plain}
    said = all(len(values) == 1 and 0 not in values for values in (experts, widths)) and len(heads) == 1 >= len(ffns)
    narrowed = widths - {size for s in before for size in s.expert_sizes or ()}
    if not said or (0, 0) in heads or 0 in ffns or any(map(_other_biases, structures, before)):
        return None
    if any(width % 8 for width in narrowed):
        return None
    values = _values(model)
    ((values["num_attention_heads"], values["num_key_value_heads"]),) = heads
    width = "moe_intermediate_size" if "moe_intermediate_size" in values else "intermediate_size"
    (values["num_local_experts"],), (values[width],) = experts, widths
    values |= {"head_dim": head_size(model.config), "architectures": [stock_class(model.config.model_type).__name__]}
    if ffns:
        (values["intermediate_size"],) = ffns
    try:
        config = type(model.config)(**values)
    except Exception as error:  # each config class checks itself in its own way
        logger.debug("%s: no stock config of these widths (%s)", model.config.model_type, error)
        return None
    return Form("stock", "all layers have one width, and all experts", config)


def _other_biases(one: LayerStructure, other: LayerStructure) -> bool:
    """Whether the out-projections differ in whether they own a bias."""
    return (one.attention_output_bias, one.mlp_output_bias) != (other.attention_output_bias, other.mlp_output_bias)


def _stock_structures(model: Model) -> list[LayerStructure]:
    """What a mixture's stock decoder layers look like: some may be no mixtures."""
    layers = stock_layers(model)
    for layer in layers:
        modeling_pruned.split_experts_(layer, model.family)
    return [layer_structure(layer, model.family, model.config) for layer in layers]


def _uniform_llama(model: Model, structure: LayerStructure, biases_kept: bool) -> Form:
    """LLaMA with other widths. Where the heads do not divide the hidden size, LLaMA's config refuses them; Mistral
    (no biases) and Granite (biases; its multipliers set to 1) compute the same and accept them."""
    values = _values(model) | {
        "num_attention_heads": structure.num_attention_heads,
        "num_key_value_heads": structure.num_key_value_heads,
        "intermediate_size": structure.intermediate_size,
        "head_dim": head_size(model.config),
    }
    divides = model.config.hidden_size % structure.num_attention_heads == 0
    linears: list[str] = []
    if not biases_kept:
        values |= {"attention_bias": structure.attention_output_bias, "mlp_bias": structure.mlp_output_bias}
        attention = [*model.family.attention_in] if structure.attention_output_bias else []
        mlp = [*model.family.mlp_in] if structure.mlp_output_bias else []
        linears = [in_projection.path for in_projection in attention + mlp]
    if model.config.model_type == "mistral" and biases_kept:
        stock, why = "Mistral", "all layers have one width"
    elif divides:
        stock, why = "Llama", "all layers have one width"
    elif not values.get("attention_bias") and not values.get("mlp_bias"):
        stock, why = "Mistral", "all layers have one width; LLaMA's config wants heads to divide the hidden size"
        values["sliding_window"] = None
    else:
        stock, why = "Granite", "all layers have one width; LLaMA's config wants heads to divide the hidden size"
        values |= {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
        values["attention_multiplier"] = head_size(model.config) ** -0.5
    import transformers

    config = getattr(transformers, f"{stock}Config")(**values)
    config.architectures = [f"{stock}ForCausalLM"]
    return Form("stock", why, config, tuple(linears))


def remote_code_form(model: Model, why: str) -> Form:
    """The modeling file beside the weights, even where a stock architecture could hold them."""
    structures, stock = model.structures, f"Pruned{model.family.stock}"
    values = _values(model)
    layout = model.head_layout
    per_layer = {index: structure.to_config(layout) for index, structure in enumerate(structures)}
    named = {name for layer in per_layer.values() for name in layer}
    for layer in per_layer.values():  # transformers wants them alike: layers without experts have lists of none
        layer.update({name: [] for name in sorted(named - set(layer))})
    says_heads = all(s.num_attention_heads == s.num_key_value_heads * layout.group for s in structures) or layout.shared
    if says_heads and getattr(model.config, "num_key_value_heads", None) is None:
        for layer in per_layer.values():
            layer.pop("num_key_value_heads")
    # Without a head size, out-projections would divide the hidden size by a layer's own number of heads.
    if not hasattr(model.config, "head_dim"):
        values["head_dim"] = head_size(model.config)
    config = modeling_pruned.__getattr__(f"{stock}Config")(**values, per_layer_config=per_layer)
    config.architectures = [f"{stock}ForCausalLM"]
    classes = {"AutoConfig": "Config", **modeling_pruned.AUTO_CLASSES}
    config.auto_map = {
        auto_class: f"{REMOTE_CODE.stem}.{stock}{suffix}"
        for auto_class, suffix in classes.items()
        if getattr(modeling_pruned, stock + suffix, None) is not None
    }
    return Form("remote_code", why, config)

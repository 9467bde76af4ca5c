"""The class, config and table of an architecture that a checkpoint's config.json names, and its empty structure."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pruneexp.model import checks, modeling_pruned
from pruneexp.model.refusal import refused
from pruneexp.types import one_line

PER_LAYER = ("layer_types", "no_rope_layers")  # config attributes with one value a layer


def model_class_of(folder: Path, model_type: str) -> tuple[Any, Any, modeling_pruned.Family]:
    """The class that loads a checkpoint (stock, or with pruned layers), its config and its table. Raises
    ConfigError."""
    family = modeling_pruned.FAMILIES[model_type.removeprefix("pruned_")]
    names = (family.stock_class, f"{family.stock}Config")
    import transformers

    if not all(hasattr(transformers, name) for name in names):
        raise refused(
            folder,
            f"model_type {model_type!r} needs {family.stock_class} of transformers >= {family.since}; "
            f"{transformers.__version__} is installed",
        )
    if model_type in modeling_pruned.FAMILIES:
        model_class, config_class = (getattr(transformers, name) for name in names)
    else:
        own = (f"Pruned{family.stock}{what}" for what in ("ForCausalLM", "Config"))
        model_class, config_class = (modeling_pruned.__getattr__(name) for name in own)
    try:
        config = config_class.from_pretrained(folder)
        stock = stock_of(config)
        family = modeling_pruned.family_of(stock)
    except Exception as error:  # each config class checks itself in its own way
        raise refused(folder, f"config.json does not describe a {model_type} model ({one_line(error)})") from error
    checks.check_counts(stock, str(folder))
    for name, value in family.impossible:
        if getattr(stock, name) == value:
            raise refused(folder, f"a {model_type} model with {name}={value} is not supported")
    return model_class, config, family


def stock_of(config: Any) -> Any:
    """The config of the stock architecture: a pruned model's, without its structure."""
    return modeling_pruned.stock_config(config) if config.model_type.startswith("pruned_") else config


def skeleton(model_class: Any, config: Any, family: modeling_pruned.Family, dtype: torch.dtype) -> Any:
    """The model on the meta device: its structure, no weights; experts apart from each other."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # of sublayers that are gone
        module = model_class._from_config(config, dtype=dtype)
    for layer in module.base_model.get_submodule(family.layers):
        modeling_pruned.split_experts_(layer, family)
    return module


def select_layers_(config: Any, kept: Sequence[int]) -> None:
    """Makes a config that of a model with the layers `kept` alone, in that order."""
    if getattr(config, "mlp_only_layers", None) is not None:  # Qwen3-MoE's layers that are no mixtures, by index
        step, dense = config.decoder_sparse_step, config.mlp_only_layers
        config.mlp_only_layers = [new for new, old in enumerate(kept) if old in dense or (old + 1) % step]
        config.decoder_sparse_step = 1
    config.num_hidden_layers = len(kept)
    for name in PER_LAYER:
        values = getattr(config, name, None)
        if values is not None:
            setattr(config, name, [values[index] for index in kept])

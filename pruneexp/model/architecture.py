"""The class, config and table of an architecture that a checkpoint's config.json names, and its empty structure."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from pruneexp.model import checks, modeling_pruned
from pruneexp.types import ConfigError


def model_class_of(folder: Path, model_type: str) -> tuple[Any, Any, modeling_pruned.Family]:
    """The class that loads a checkpoint (stock, or with pruned layers), its config and its table. Raises
    ConfigError."""
    family = modeling_pruned.FAMILIES[model_type.removeprefix("pruned_")]
    names = (family.causal_lm or f"{family.stock}ForCausalLM", f"{family.stock}Config")
    import transformers

    if not all(hasattr(transformers, name) for name in names):
        raise ConfigError(
            f"model.path={str(folder)!r}: model_type {model_type!r} needs transformers >= {family.since}; "
            f"{transformers.__version__} is installed"
        )
    if model_type in modeling_pruned.FAMILIES:
        model_class, config_class = (getattr(transformers, name) for name in names)
    else:
        own = (f"Pruned{family.stock}{what}" for what in ("ForCausalLM", "Config"))
        model_class, config_class = (modeling_pruned.__getattr__(name) for name in own)
    try:
        config = config_class.from_pretrained(folder)
        stock = unpruned_config(config)
        family = modeling_pruned.family_of(stock)
    except Exception as error:  # each config class checks itself in its own way
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"model.path={str(folder)!r}: config.json does not describe a {model_type} model ({reason})"
        ) from error
    checks.check_counts(stock, str(folder))
    for name, value in family.impossible:
        if getattr(stock, name) == value:
            raise ConfigError(f"model.path={str(folder)!r}: a {model_type} model with {name}={value} is not supported")
    return model_class, config, family


def skeleton(model_class: Any, config: Any, family: modeling_pruned.Family, dtype: torch.dtype) -> Any:
    """The model on the meta device: its structure, no weights; experts apart from each other."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # of sublayers that are gone
        module = model_class._from_config(config, dtype=dtype)
    for layer in module.base_model.get_submodule(family.layers):
        modeling_pruned.split_experts_(layer, family)
    return module


def unpruned_config(config: Any) -> Any:
    """The stock architecture's: itself, or a pruned one without its structure."""
    return modeling_pruned.stock_config(config) if config.model_type.startswith("pruned_") else config

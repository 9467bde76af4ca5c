"""Kinds of layers that no longer repeat with the family's period, as they do where layers were removed."""

from __future__ import annotations

from typing import Any

from pruneexp.model.loaded import PER_LAYER


def broken_period(config: Any) -> str:
    """The attribute of a stock config with one value a layer that is not what the config's class gives by itself for so
    many layers; "" where all are. Software that assumes the period then computes another model, in silence."""
    named = [name for name in PER_LAYER if getattr(config, name, None)]
    if not named:
        return ""
    values = {name: value for name, value in config.to_dict().items() if name not in PER_LAYER}
    usual = type(config)(**values)
    return next((name for name in named if list(getattr(config, name)) != list(getattr(usual, name) or ())), "")


def period_warning(config: Any) -> str:
    """What to tell whoever gets the checkpoint; "" where there is nothing to tell."""
    if not (name := broken_period(config)):
        return ""
    return (
        f"no GGUF file of it: the model's {name} do not repeat with {config.model_type}'s period, which llama.cpp's "
        f"converter assumes (its file would be another model, without an error); transformers and vLLM read {name}"
    )

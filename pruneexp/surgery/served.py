"""Which other software reads a checkpoint as it is written, and what to tell its user where one does not."""

from __future__ import annotations

from typing import Any

from pruneexp.model.architecture import PER_LAYER
from pruneexp.model.modeling_pruned import FAMILIES

# Its way through transformers wants attention behind transformers' interface (BLOOM and Falcon have their own), takes
# one width for all experts, and passes over GPT-2's biases, dense or pruned. Tried with vLLM 0.32.
NOT_SERVED = ("bloom", "falcon", "gpt2", "mixtral", "qwen3_moe")


def vllm_note(config: Any) -> str:
    """What to tell whoever would serve it; "" where vLLM takes the checkpoint (`vllm serve FOLDER --trust-remote-code`)
    or has a class of its own for it, as for stock ones."""
    kind = config.model_type.removeprefix("pruned_")
    if kind == config.model_type or kind not in NOT_SERVED:
        return ""
    if FAMILIES[kind].experts:
        return f"vLLM serves no {kind} whose experts differ; expected a run with search=uniform search.alike=true"
    return f"vLLM serves no {kind} whose layers differ; expected pruneexp-export RUN_FOLDER format=padded out=PATH"


def broken_period(config: Any) -> str:
    """The per-layer attribute of a stock config that does not have the values which the config's class gives to so many
    layers; "" where all have. Software that assumes the class's period computes another model, without an error."""
    named = [name for name in PER_LAYER if getattr(config, name, None)]
    if not named:
        return ""
    values = {name: value for name, value in config.to_dict().items() if name not in PER_LAYER}
    try:
        usual = type(config)(**values)
    except ZeroDivisionError:  # EXAONE 4 without sliding windows has no period
        return ""
    return next((name for name in named if list(getattr(config, name)) != list(getattr(usual, name) or ())), "")


def period_warning(config: Any) -> str:
    """What to tell whoever gets the checkpoint; "" where there is nothing to tell."""
    if not (name := broken_period(config)):
        return ""
    return (
        f"no GGUF file of it: the model's {name} do not repeat with {config.model_type}'s period, which llama.cpp's "
        f"converter assumes (its file would be another model, without an error); transformers and vLLM read {name}"
    )

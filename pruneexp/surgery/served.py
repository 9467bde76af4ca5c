"""Whether vLLM serves a checkpoint as it is written, through transformers' own classes, and what to type where not."""

from __future__ import annotations

from typing import Any

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

"""config.json for readers that are older than transformers 5: what it calls otherwise now, under the old names, too.

Without them transformers 4 loads a checkpoint without a word and rotates by a base of 10,000. Readers of today take the
same from both: a key that is there twice says the same thing twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BESIDE = ("rope_theta", "partial_rotary_factor")  # in `rope_parameters` now, beside `rope_scaling` then


def with_old_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with `torch_dtype` beside `dtype`, and with `rope_theta`, `rope_scaling` and what else there was
    beside `rope_parameters`. Where these differ between kinds of layers (Gemma 3), the full ones' come under these
    names, and the sliding ones' base is `rope_local_base_freq`."""
    old: dict[str, Any] = {}
    if config.get("dtype"):
        old["torch_dtype"] = config["dtype"]
    if config.get("model_type", "").endswith("qwen3_moe"):
        old["num_experts"] = config["num_local_experts"]
    rope = config.get("rope_parameters") or {}
    if "sliding_attention" in rope and "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if rope.get("rope_theta") is not None:
        old |= {name: rope[name] for name in _BESIDE if rope.get(name) is not None}
        if rope.get("rope_type", "default") != "default":
            old["rope_scaling"] = _scaling(rope, config)
        if config.get("model_type", "").endswith("gpt_neox"):
            old |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
    return {**old, **config}


def _scaling(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("model_type", "").endswith("phi3"):  # its class took these three, and no more
        return {"type": rope["rope_type"], "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    return {name: value for name, value in rope.items() if name not in _BESIDE}

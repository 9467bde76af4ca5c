"""config.json for readers that are older than transformers 5: what it calls otherwise now, under the old names, too.

Without them transformers 4 loads a checkpoint without a word and rotates by a base of 10,000. Readers of today take the
same from both: a key that is there twice says the same thing twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pruneexp.model.modeling_pruned import old_rope


def with_old_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with `torch_dtype` beside `dtype`, and with `rope_theta`, `rope_scaling` and what else there was
    beside `rope_parameters`."""
    old: dict[str, Any] = {}
    if config.get("dtype"):
        old["torch_dtype"] = config["dtype"]
    if config.get("model_type", "").endswith("qwen3_moe"):
        old["num_experts"] = config["num_local_experts"]
    return {**old, **old_rope(config), **config}

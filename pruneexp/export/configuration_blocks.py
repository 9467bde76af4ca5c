"""The config of a LLaMA whose layers differ: what vLLM's DeciLM reads, as the one file of code beside the weights.

Self-contained (transformers only): `AutoConfig.from_pretrained(folder, trust_remote_code=True)` needs nothing else.
`block_configs[i].attention` has `no_op` and `n_heads_in_group`, `block_configs[i].ffn` has `no_op` and
`intermediate_size`; every layer with attention has `num_attention_heads` query heads.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class Block(dict):
    """A dictionary whose entries are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class BlocksConfig(PretrainedConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **kwargs: Any):
        super().__init__(**kwargs)
        self.block_configs = [Block({name: Block(part) for name, part in one.items()}) for one in block_configs]

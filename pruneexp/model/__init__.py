"""Architectures as tables, loading, prunable sites, and running a model block by block (in memory or streamed)."""

from pruneexp.model.checkpoint import Checkpoint
from pruneexp.model.loaded import Call, Model, next_token_losses, select_layers_
from pruneexp.model.sites import decoder_layer_block, layer_sites, layer_structure
from pruneexp.model.source import ModelSource

__all__ = [
    "Call",
    "Checkpoint",
    "Model",
    "ModelSource",
    "decoder_layer_block",
    "layer_sites",
    "layer_structure",
    "next_token_losses",
    "select_layers_",
]

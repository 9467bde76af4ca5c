"""Architectures as tables, loading, prunable sites, and running a model layer by layer (in memory or streamed)."""

# ruff: noqa: F401

from pruneexp.model.architecture import select_layers_
from pruneexp.model.checkpoint import Checkpoint
from pruneexp.model.loaded import Call, Model
from pruneexp.model.losses import divergences, next_token_losses
from pruneexp.model.sharing import sharing
from pruneexp.model.sites import layer_structure
from pruneexp.model.source import ModelSource

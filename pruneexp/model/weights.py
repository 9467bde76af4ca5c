"""Filling a model's structure with what a checkpoint holds."""

from __future__ import annotations

import ctypes
from collections.abc import MutableMapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pruneexp.model.checkpoint import Checkpoint
from pruneexp.types import RunError


def check_finite(module: nn.Module, prefix: str) -> None:
    """Raises RunError, naming the tensor, where a parameter holds NaN or Inf."""
    for name, parameter in module.named_parameters():
        # a sum is finite unless a part is not, or it overflows: only then look at every element
        if not torch.isfinite(parameter.sum(dtype=torch.float32)) and not torch.isfinite(parameter).all():
            raise RunError(f"{prefix}{name}: weights hold NaN or Inf")


def stored_tensors(module: nn.Module, checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    """What the checkpoint has of `module`, as it is stored, by the names that begin with `prefix`."""
    return {prefix + name: checkpoint[prefix + name] for name in module.state_dict()}


def load_into_(
    module: nn.Module, tensors: MutableMapping[str, Tensor], prefix: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Gives `module`'s parameters and persistent buffers the `tensors` called `prefix` + name, and takes them out of
    `tensors`."""
    for name, tensor in list(module.state_dict().items()):
        kind = dtype if tensor.is_floating_point() else None
        loaded = tensors.pop(prefix + name).to(device=device, dtype=kind)
        if loaded.shape != tensor.shape:
            shapes = f"shape {tuple(loaded.shape)}, expected {tuple(tensor.shape)}"
            raise RunError(f"{prefix}{name}: the checkpoint holds {shapes}")
        set_tensor_(module, name, loaded)


def tied_names(module: Any) -> set[str]:
    """Second names of shared parameters, which checkpoints leave out."""
    return set(module.all_tied_weights_keys) if module.config.tie_word_embeddings else set()


def set_tensor_(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Gives `module` another tensor for the parameter or buffer called so."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if leaf in owner._parameters else tensor)


def load_outside_(
    module: Any, layers_path: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> None:
    """Loads everything outside the decoder layers: embeddings, final norm, head."""
    layers = module.get_submodule(layers_path)
    module.set_submodule(layers_path, nn.ModuleList())
    tied = tied_names(module)
    for path, part in list(module.named_modules()):
        _compute_buffers_(module, part, device)
        own = nn.Module()  # the part's own tensors alone
        own._parameters = {k: v for k, v in part._parameters.items() if f"{path}.{k}" not in tied}
        own._buffers = {k: v for k, v in part._buffers.items() if k not in part._non_persistent_buffers_set}
        prefix = f"{path}." if path else ""
        load_into_(own, stored_tensors(own, checkpoint, prefix), prefix, device, dtype)
        part._parameters.update(own._parameters)
        part._buffers.update(own._buffers)
    if module.config.tie_word_embeddings:
        module.tie_weights()
    check_finite(module, "")
    module.set_submodule(layers_path, layers)


@torch.no_grad()
def _compute_buffers_(module: Any, part: nn.Module, device: torch.device) -> None:
    """Buffers that are stored nowhere, but computed when a model is made: rotary frequencies, scales of embeddings.
    As transformers does it after loading; the part's weights are on the meta device still, and stay untouched."""
    computed = {k: b for k, b in part._buffers.items() if k in part._non_persistent_buffers_set and b is not None}
    part._buffers.update({key: torch.empty_like(buffer, device=device) for key, buffer in computed.items()})
    if computed:
        module._init_weights(part)


def give_back_memory() -> None:
    """Has the C library give free memory back to the system, where it can (glibc): a layer that comes and goes leaves
    gaps of other sizes than the next one fills, so that the memory of a walk over many layers would grow."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None

"""A model over several devices: which decoder layer lies on which, and how what it needs gets there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

AUTO = "auto"  # every GPU that is visible
ANY = "cuda:any"  # a GPU that no other run has


def devices_of(name: str) -> tuple[torch.device, ...]:
    """The devices that `model.device` names. The first is the model's own: what is outside the decoder layers lies
    there, tokens go there and logits come from there. The first GPU stands for any."""
    if name == AUTO:
        return tuple(torch.device("cuda", i) for i in range(torch.cuda.device_count())) or (torch.device("cpu"),)
    device = torch.device("cuda" if name == ANY else name)
    return (torch.device("cuda", device.index or 0) if device.type == "cuda" else device,)


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that this process may still take: PyTorch keeps what its tensors had, and gives it out again."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def placed(
    layer_bytes: Sequence[int], outside_bytes: int, devices: Sequence[torch.device], free: Sequence[int]
) -> tuple[torch.device, ...]:
    """The device of every decoder layer, in order: each device holds the share of all bytes that it has of the free
    memory, to the nearest layer. The first holds what is outside the layers, too."""
    whole, before, number, placement = outside_bytes + sum(layer_bytes), outside_bytes, 0, []
    for size in layer_bytes:
        while number + 1 < len(devices) and (before + size / 2) * sum(free) > whole * sum(free[: number + 1]):
            number += 1
        placement.append(devices[number])
        before += size
    return tuple(placement)


def connect_(module: nn.Module, layers: nn.ModuleList, placement: Sequence[torch.device], home: torch.device) -> None:
    """Hooks in front of every decoder layer bring its inputs to its device; in front of all other modules that hold no
    others (norm, head, ...) home. They belong to the modules, not to their weights: no checkpoint has them, and layers
    that move up when others leave keep theirs."""
    bringing = {device: _bringing(device) for device in {home, *placement}}
    for layer, device in zip(layers, placement, strict=True):
        layer.register_forward_pre_hook(bringing[device], with_kwargs=True)
    inside = set(layers.modules())
    for part in module.modules():
        if part not in inside and not any(True for _ in part.children()):
            part.register_forward_pre_hook(bringing[home], with_kwargs=True)


def _bringing(device: torch.device) -> Callable[..., Any]:
    moved = WeakTensorKeyDictionary()  # masks and rotations: each once, however many layers are called with it

    def known(value: Any) -> Any:
        if type(value) in (tuple, list):  # whatever else holds tensors, a KV cache, say, is left as it is
            return type(value)(known(each) for each in value)
        if isinstance(value, Mapping):
            return {key: known(each) for key, each in value.items()}
        if not isinstance(value, Tensor) or value.device == device:
            return value
        if value not in moved:
            moved[value] = value.to(device)
        return moved[value]

    def hidden(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else known(value)

    def bring(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return tuple(hidden(each) for each in args[:1]) + known(args[1:]), known(kwargs)

    return bring

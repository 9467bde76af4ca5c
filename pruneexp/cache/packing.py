"""Evidence and scores as tensors with a JSON outline, and back: what a safetensors file can hold."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Unpackable(ValueError):
    """A value that is no tensor, number, string, sequence, mapping or dataclass of such."""


def packed(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """The outline of `value` (JSON) and its tensors by number. Views are copied, and what is on a GPU, so that each
    tensor stands alone.

    Raises:
        Unpackable: something in it is of another kind.
    """
    tensors: dict[str, Tensor] = {}
    return _outline(value, tensors), tensors


def _outline(value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        own = value.detach().cpu().contiguous()
        storage = own.untyped_storage()
        shared = storage.nbytes() != own.nbytes or any(t.data_ptr() == own.data_ptr() for t in tensors.values())
        tensors[name] = own.clone() if shared else own
        return {"tensor": name, "device": str(value.device)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind, names = type(value), [each.name for each in dataclasses.fields(value) if each.init]
        fields = {name: _outline(getattr(value, name), tensors) for name in names}
        return {"class": [kind.__module__, kind.__qualname__], "fields": fields}
    if isinstance(value, Mapping):
        return {"items": [[_outline(key, tensors), _outline(each, tensors)] for key, each in value.items()]}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_outline(each, tensors) for each in value]}
    raise Unpackable(f"a {type(value).__name__} cannot be written down")


def unpacked(outline: Any, tensors: Mapping[str, Tensor], devices: Sequence[torch.device] = ()) -> Any:
    """The value again. What was on a GPU returns to it where it is one of `devices`, else comes to the first of them
    (to the CPU, where there is none). Only dataclasses of modules that are imported already are made: a file cannot ask
    for code."""
    if not isinstance(outline, dict):
        return outline
    [kind, *_] = outline
    content = outline[kind]
    if kind == "tensor":
        device = torch.device(outline["device"])
        if device.type == "cuda" and device not in devices:
            device = devices[0] if devices else torch.device("cpu")
        return tensors[content].to(device)
    if kind == "items":
        return {unpacked(key, tensors, devices): unpacked(each, tensors, devices) for key, each in content}
    if kind == "class":
        fields = {name: unpacked(field, tensors, devices) for name, field in outline["fields"].items()}
        return _dataclass(*content)(**fields)
    items = [unpacked(each, tensors, devices) for each in content]
    return tuple(items) if kind == "tuple" else items


def _dataclass(module: str, name: str) -> Any:
    kind: Any = sys.modules[module]
    for part in name.split("."):
        kind = getattr(kind, part)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise Unpackable(f"{module}.{name} is no dataclass")
    return kind


def bytes_of(value: Any) -> int:
    """Bytes of the tensors in `value`, without copying them; 0 for what cannot be written down."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return sum(bytes_of(getattr(value, each.name)) for each in dataclasses.fields(value) if each.init)
    if isinstance(value, Mapping):
        return sum(bytes_of(each) for each in value.values())
    return sum(map(bytes_of, value)) if isinstance(value, (tuple, list)) else 0


def digest_of(tensors: Mapping[str, Tensor], outline: str) -> str:
    """SHA-256 over outline, names, shapes, types and the CRC-32 of each tensor's contents: enough to find damage, and
    as fast as disks read, since covariances fill gigabytes."""
    digest = hashlib.sha256(outline.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        contents = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else 0
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}:{contents}".encode())
    return digest.hexdigest()

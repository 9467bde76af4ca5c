"""Reading tensors of a safetensors file by their place in it.

The file is read, never mapped: a tensor lies in memory of its own, which goes when the tensor goes, and what is
resident is what is in use.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from pruneexp.types import RunError

PIECE = 2**20  # elements
HEADER_LIMIT = 100_000_000  # bytes, as safetensors has it
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file: the byte at which it starts, its type as safetensors calls it, its shape."""

    start: int
    kind: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes, of a type in `DTYPES`."""
        return prod(self.shape) * DTYPES[self.kind].itemsize


def places(file: Path) -> dict[str, Place]:
    """Every tensor of the file by name, from its header. Raises ValueError, saying why, where the file is not whole."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = opened.read(min(length, HEADER_LIMIT))
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    if size == 0:
        raise ValueError("it is empty")
    if header[:24].startswith(b"https://git-lfs"):  # "version " are the eight bytes before
        raise ValueError("it is a Git LFS pointer in the place of the weights, which `git lfs pull` fetches")
    if not header.startswith(b"{"):
        raise ValueError("it is no safetensors file")
    if len(header) < length:
        raise ValueError(f"it is cut short: {size:,} bytes, not even its whole header")
    tensors, whole = {}, 8 + length
    try:
        for name, entry in json.loads(header).items():
            if name == "__metadata__":
                continue
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = place = Place(start, entry["dtype"], tuple(entry["shape"]))
            if place.kind in DTYPES and place.size != end - start:
                raise ValueError(f"{name} has {end - start:,} bytes, its shape is of {place.size:,}")
            whole = max(whole, end)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"its header is damaged: {error}") from error
    if size < whole:
        raise ValueError(f"it is cut short: {size:,} of {whole:,} bytes")
    if size > whole:
        raise ValueError(f"its header is damaged: it speaks of {whole:,} of {size:,} bytes")
    return tensors


def pieces(place: Place) -> Iterator[Place]:
    """Where the same elements lie, flat, `PIECE` of them at a time."""
    count = prod(place.shape)
    for start in range(0, count, PIECE):
        yield Place(place.start + start * DTYPES[place.kind].itemsize, place.kind, (min(PIECE, count - start),))


def read_tensor(file: Path, place: Place) -> Tensor:
    """One tensor. May be called on any thread. Raises RunError where the file ends before it, cannot be read, or has it
    in a type that is not computed with here."""
    if place.kind not in DTYPES:
        raise RunError(f"{file}: holds a tensor of type {place.kind}; expected one of {', '.join(DTYPES)}")
    tensor = torch.empty(prod(place.shape), dtype=DTYPES[place.kind])
    if tensor.numel():
        buffer = memoryview(tensor.view(torch.uint8).numpy().data)
        try:
            with open(file, "rb", buffering=0) as opened:
                filled = 0
                while filled < len(buffer):
                    read = os.preadv(opened.fileno(), [buffer[filled:]], place.start + filled)
                    if not read:
                        raise RunError(f"{file}: ends within a tensor")
                    filled += read
        except OSError as error:
            raise RunError(f"{file}: cannot be read ({error.strerror or error})") from error
    return tensor.view(place.shape)

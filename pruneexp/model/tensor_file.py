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

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file: the byte at which it starts, its type and shape."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def places(file: Path) -> dict[str, Place]:
    """Every tensor of the file by name, from its header. Raises RunError for a type that is not computed with here."""
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise RunError(f"{file}: {name} is of type {entry['dtype']}; expected one of {', '.join(DTYPES)}")
        start = 8 + size + entry["data_offsets"][0]
        found[name] = Place(start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return found


def pieces(place: Place) -> Iterator[Place]:
    """The same elements, flat, `PIECE` of them at a time."""
    count = prod(place.shape)
    for start in range(0, count, PIECE):
        yield Place(place.start + start * place.dtype.itemsize, place.dtype, (min(PIECE, count - start),))


def read_tensor(file: Path, place: Place) -> Tensor:
    """One tensor. May be called on any thread. Raises RunError where the file ends before it or cannot be read."""
    count = prod(place.shape)
    tensor = torch.empty(count, dtype=place.dtype)
    if count:
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


def why_unreadable(file: Path, error: Exception) -> str:
    """What is wrong with a file that safetensors does not open: `error` is what it said."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            start = opened.read(min(length, 100_000_000))
    except OSError as unread:
        return unread.strerror or str(unread)
    if size == 0:
        return "it is empty"
    if start[:24].startswith(b"https://git-lfs"):  # "version " are the eight bytes before
        return "it is a Git LFS pointer in the place of the weights, which `git lfs pull` fetches"
    if not start.startswith(b"{"):
        return "it is no safetensors file"
    if len(start) < length:
        return f"it is cut short: {size:,} bytes, not even its whole header"
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(start).items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"its header is damaged: {error}"
    return f"it is cut short: {size:,} of {whole:,} bytes" if size < whole else str(error)

"""Tensors that are kept for later: in memory up to a limit, beyond it in files that go away with them."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from pruneexp.types import RunError

SMALL = 2**20  # bytes of a tensor that always stays in memory, and is not counted

_held: dict[int, int] = {}  # bytes of the tensors that are kept in memory, by the number of each


def held_bytes() -> int:
    """Of the tensors that `spilled` has left in memory and that are still there."""
    return sum(_held.values())


def spill_folder() -> Path:
    """Where the files lie: TMPDIR, else /var/tmp, which unlike /tmp is on a disk wherever there is one."""
    named = os.environ.get("TMPDIR")
    return Path(named or ("/var/tmp" if os.path.isdir("/var/tmp") else tempfile.gettempdir()))


def spilled(tensor: Tensor, limit: float) -> Tensor:
    """`tensor` itself while such tensors take at most `limit` bytes together; else its equal on the CPU, mapped from a
    file without a name: its pages are read when they are looked at, and the system may let go of them at any time.

    Raises:
        RunError: the disk has no room for it.
    """
    size = tensor.nbytes
    if size <= SMALL:
        return tensor
    if held_bytes() + size <= limit:
        number = max(_held, default=0) + 1
        _held[number] = size
        weakref.finalize(tensor, _held.pop, number, None)
        return tensor
    folder = spill_folder()
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="pruneexp-") as file:
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            file.flush()
            mapped = torch.from_file(file.name, shared=False, size=tensor.numel(), dtype=tensor.dtype)
    except OSError as error:
        raise RunError(
            f"{folder}: covariances and fitted out-projections cannot be written there ({error.strerror or error}); "
            "TMPDIR names another folder, criterion.memory holds more in memory"
        ) from error
    return mapped.view(tensor.shape)

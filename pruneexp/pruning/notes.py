"""How far a walk has come, noted on disk, so that the same command goes on from there after it has died."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruneexp.cache.packing import Unpackable, packed, unpacked
from pruneexp.calibrate import Bookmark
from pruneexp.files import save_tensors
from pruneexp.model.tensor_file import places, read_tensor
from pruneexp.surgery import StreamedSave

logger = logging.getLogger("pruneexp")


class Notes:
    """The notes of one run in `folder`, a bookmark for each of its walks. `folder` None: nothing is noted.

    `writes`: the checkpoint that is written in the walk that is called `writing`, whose state is a part of its note.
    `devices`: the model's, where what was noted of a GPU returns to.
    """

    def __init__(self, folder: Path | None, writes: StreamedSave | None = None, devices: Sequence[torch.device] = ()):
        self.folder, self.writes, self.devices = folder, writes, devices

    def bookmark(self, walk: str, at: Bookmark, state: Callable[[], Any], writing: bool = False) -> Bookmark:
        """`at`, the start of the walk called `walk`, moved to where that stands. `state`: what is to be noted of its
        findings."""
        if self.folder is None:
            return at
        file, writes = self.folder / f"{walk}.safetensors", self.writes if writing else None
        noted = _read(file, self.devices)
        if writes is not None and not writes.restore(None if noted is None else noted["writes"]):
            noted = None

        def note(at: Bookmark) -> None:
            written = None if writes is None else writes.state()
            value = {"index": at.index, "forward": at.forward, "state": state(), "writes": written}
            try:
                _write(file, value, at.hidden)
            except Unpackable as error:
                logger.info("no notes of the walk %r: %s", walk, error)
                at.note = None
            except OSError as error:  # a full disk is no reason to stop before it must
                logger.warning("no more notes of the walk %r: %s", walk, error)
                at.note = None

        at = replace(at, note=note)
        if noted is None:
            return at
        logger.info("%s: goes on with layer %d, where it stopped", walk, noted["index"])
        return replace(at, **{name: noted[name] for name in ("index", "hidden", "state", "forward")})


def _write(file: Path, value: Mapping[str, Any], hidden: Sequence[Sequence[Tensor]]) -> None:
    """Whole or not at all; hidden states from where they are. Raises OSError, and Unpackable for findings of a kind
    that no file holds."""
    outline, tensors = packed(value)
    tensors |= {
        f"hidden.{i}.{j}": t.cpu().contiguous() for i, batches in enumerate(hidden) for j, t in enumerate(batches)
    }
    sizes = [len(batches) for batches in hidden]
    aside = file.with_suffix(".partial")
    try:
        save_tensors(tensors, aside, {"outline": json.dumps(outline), "hidden": json.dumps(sizes)})
        with open(aside, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(aside, file)
    except Exception as error:  # safetensors has errors of its own for a full disk
        aside.unlink(missing_ok=True)
        raise error if isinstance(error, OSError) else OSError(str(error)) from error


def _read(file: Path, devices: Sequence[torch.device]) -> dict[str, Any] | None:
    """What was noted, None where nothing was, or nothing that can be read."""
    if not file.is_file():
        return None
    try:
        tensors = {name: read_tensor(file, place) for name, place in places(file).items()}
        with open(file, "rb") as opened:
            meta = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))["__metadata__"]
        hidden = [[tensors.pop(f"hidden.{i}.{j}") for j in range(n)] for i, n in enumerate(json.loads(meta["hidden"]))]
        return {**unpacked(json.loads(meta["outline"]), tensors, devices), "hidden": hidden}
    except Exception as error:  # whatever it is, it is no note
        logger.warning("%s cannot be read: its walk begins anew (%s)", file, " ".join(str(error).split()))
        return None

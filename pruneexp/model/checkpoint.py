"""Reading a checkpoint's tensors by name from its safetensors files, without loading the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from pruneexp.files import sha256
from pruneexp.fingerprint import FileState, file_state
from pruneexp.model.refusal import refused
from pruneexp.model.tensor_file import Place, pieces, places, read_tensor
from pruneexp.types import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WHOLE_FILE = 256 * 2**20  # bytes of a weight file up to which its fingerprint covers all of it


class Checkpoint:
    """The safetensors files of a folder as one mapping from tensor name to tensor.

    Names are looked up as the module spells them, and with `base_prefix` left out or put in front: checkpoints of a
    base model (BLOOM's, OPT's) leave it out. `stored_as`: parts of names, and what they may be called instead.

    Raises:
        ConfigError: the folder holds no safetensors, one that is not whole, or its index points to one that is not
            there.
    """

    def __init__(self, folder: Path, base_prefix: str = "", stored_as: Sequence[tuple[str, str]] = ()):
        self.folder, self.base_prefix, self.stored_as = folder, base_prefix, stored_as
        self._places: dict[str, tuple[Path, Place]] = {}
        for name in safetensors_files(folder):
            file = folder / name
            try:
                self._places |= {tensor: (file, place) for tensor, place in places(file).items()}
            except ValueError as error:
                raise refused(folder, f"{name} cannot be read ({error})") from error

    def __contains__(self, name: str) -> bool:
        return self._spelling(name) is not None

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(*self._place(name))

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor's elements in order, flat, a few MiB at a time."""
        file, place = self._place(name)
        return (read_tensor(file, piece) for piece in pieces(place))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._place(name)[1].shape

    def dtype(self, name: str) -> str:
        """The dtype as safetensors calls it: "BF16"."""
        return self._place(name)[1].kind

    def dtypes(self) -> dict[str, str]:
        """The dtype of every tensor, by its name in the files."""
        return {name: place.kind for name, (_, place) in self._places.items()}

    def names_beside(self, expected: Iterable[str]) -> list[str]:
        """Tensors of the checkpoint that have none of the expected names."""
        return sorted(set(self._places) - {self._spelling(name) for name in expected})

    def _place(self, name: str) -> tuple[Path, Place]:
        """The file that holds a tensor, and where in it."""
        spelling = self._spelling(name)
        if spelling is None:
            raise ConfigError(f"model.path={str(self.folder)!r}: the checkpoint lacks tensor {name!r}")
        return self._places[spelling]

    def _spelling(self, name: str) -> str | None:
        prefix = f"{self.base_prefix}."
        for each in (name, stored_name(name, self.stored_as)):
            for spelling in (each, each.removeprefix(prefix), prefix + each):
                if spelling in self._places:
                    return spelling
        return None


def stored_name(name: str, stored_as: Sequence[tuple[str, str]]) -> str:
    """What checkpoints of the stock class call a tensor of the modules."""
    for own, stored in stored_as:
        name = name.replace(own, stored)
    return name


def safetensors_files(folder: Path) -> list[str]:
    """File names of a checkpoint folder's shards. Raises ConfigError as `Checkpoint` does; refuses pickles."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).is_file():
        try:
            files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
            if not files or not all(isinstance(file, str) for file in files):
                raise ValueError("it names no files")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise refused(folder, f"{INDEX} is no index of tensors ({reason})") from None
        missing = [f for f in files if not (folder / f).is_file()]
        if missing:
            raise refused(folder, f"{INDEX} points to {missing[0]}, which is not there")
        return files
    pickled = _pickled(folder)
    if pickled:
        raise refused(
            folder,
            f"holds pickled weights ({pickled[0]}), which can run code when loaded; "
            f"expected safetensors; to convert them: {conversion(str(folder))}",
        )
    raise refused(folder, f"holds no weights; expected {SINGLE} or {INDEX}")


def conversion(path: str) -> str:
    """What to type to have pickled weights as safetensors. `path`: as transformers takes it."""
    code = f"M.from_pretrained({path!r}, dtype='auto').save_pretrained('NEW_FOLDER')"
    return f'python -c "from transformers import AutoModelForCausalLM as M; {code}"'


def fingerprints(folder: Path) -> dict[str, dict[str, Any]]:
    """What identifies config.json and every weight file: SHA-256; of files over `WHOLE_FILE`, that of the header, and
    the time of the last change."""
    files = {}
    for name in ["config.json", *safetensors_files(folder)]:
        state = file_state(folder / name)
        _, _, size, modified = state
        files[name] = {"bytes": size, "sha256": _sha256(state), "whole": size <= WHOLE_FILE}
        if size > WHOLE_FILE:
            files[name]["modified_ns"] = modified
    return files


def changes(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change (ns) of config.json and every weight file. Raises OSError."""
    states = {name: file_state(folder / name) for name in ("config.json", *safetensors_files(folder))}
    return {name: (size, modified) for name, (_, _, size, modified) in states.items()}  # inodes differ on some networks


@lru_cache(maxsize=256)
def _sha256(state: FileState) -> str:
    """The hash of a file; of a large one, that of its safetensors header."""
    path, _, size, _ = state
    if size <= WHOLE_FILE:
        return sha256(path)
    with open(path, "rb") as file:
        content = file.read(8 + int.from_bytes(file.read(8), "little"))  # from byte 8: records hold this hash
    return hashlib.sha256(content).hexdigest()


def holds_weights(folder: Path) -> bool:
    """Whether the folder holds weights, as safetensors or pickled."""
    return any(folder.glob("*.safetensors")) or bool(_pickled(folder))


def _pickled(folder: Path) -> list[str]:
    return pickled_among(file.name for file in folder.iterdir())


def pickled_among(names: Iterable[str]) -> list[str]:
    """Those that are names of pickled weights."""
    return sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))

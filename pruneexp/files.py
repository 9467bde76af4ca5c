"""Files that are there whole or not at all, and as open to others as the system's umask says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes `data` (text as UTF-8) whole or not at all. Raises OSError."""
    with written_aside(path) as aside:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Where to write what is to be `path`: whole or not at all, it is flushed to the disk, then renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds; None where it is missing, damaged or no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def files_in(folder: Path) -> list[str]:
    """Every file in it, as a path in it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def save_tensors(tensors: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file with the permissions of any new file there; safetensors' own are its owner's alone. Raises
    OSError, and safetensors' own error for the disk's."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    give_usual_mode(path)


def give_usual_mode(path: Path) -> None:
    """Gives a file the permissions of a new one beside it. A new one is made and looked at: asking for the umask would
    set it for all threads, and a folder may have rules of its own. Raises OSError."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.mode")
    try:
        with open(probe, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
    finally:
        probe.unlink(missing_ok=True)
    path.chmod(mode)

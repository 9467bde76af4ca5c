"""A folder of results, each in a safetensors file named by its key: safe under parallel jobs, bounded, checked."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneexp.cache.packing import Unpackable, bytes_of, digest_of, packed, unpacked
from pruneexp.files import BEING_WRITTEN, existing, save_tensors, written_aside
from pruneexp.types import ConfigError, one_line, require_within, size_text

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("pruneexp")

DEFAULT = Path("outputs") / "cache"
ABANDONED = 86400  # seconds after which a file that is still being written belongs to a job that was killed
Key = Mapping[str, Any]  # everything that the value depends on, as JSON


@dataclass(frozen=True)
class NoCache:
    """Everything is computed anew and nothing is kept."""

    def check(self) -> None:
        """Needs nothing."""

    @contextmanager
    def held(self, keys: Sequence[Key]) -> Iterator[NoCache]:
        """Holds nothing."""
        yield self

    def get(self, key: Key, devices: Sequence[torch.device] = ()) -> None:
        return None

    def put(self, key: Key, value: Any) -> None:
        pass


@dataclass(frozen=True)
class Cache:
    """Results in `dir` (None: outputs/cache), `limit` GiB of them at most; the ones used longest ago leave first.

    A job that wants what another is computing waits for it: each key is locked while it is held, by a lock of the
    operating system, which a killed job lets go of. A file is written aside and renamed, and carries a checksum of
    its contents; one that does not match is computed anew. What cannot be written (a full or read-only disk, a value
    of a kind that a file cannot hold, one of more than half the limit) is not kept, and the log says so.
    """

    dir: str | None
    limit: float

    def __post_init__(self) -> None:
        require_within(self, "(0, inf]", "limit", what="a number of GiB", besides=", or cache=off")
        if self.dir == "":
            raise ConfigError("dir='': expected a folder, or null for outputs/cache")

    @property
    def folder(self) -> Path:
        return DEFAULT if self.dir is None else Path(self.dir).expanduser()

    @cached_property
    def _warned(self) -> list[bool]:
        """Not empty once this run's log says that the folder takes nothing."""
        return []

    def check(self) -> None:
        """Raises ConfigError where the folder cannot be one."""
        above = existing(self.folder)
        if not above.is_dir():
            raise ConfigError(f"cache.dir={str(self.folder)!r}: {str(above)!r} is a file; expected a folder")

    @contextmanager
    def held(self, keys: Sequence[Key]) -> Iterator[Cache | NoCache]:
        """Locks `keys`, in an order that all jobs share, so that none waits in a circle. Nobody else computes their
        entries meanwhile."""
        from filelock import FileLock

        with ExitStack() as locks:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for path in sorted({self._path(key) for key in keys}):
                    locks.enter_context(FileLock(path.with_suffix(".lock")))
            except (OSError, NotImplementedError) as error:  # the latter of a file system without locks
                if not self._warned:
                    reason = getattr(error, "strerror", None) or error
                    logger.warning("nothing is cached: %s: %s", self.folder, reason)
                    self._warned.append(True)
                yield NoCache()
                return
            yield self

    def get(self, key: Key, devices: Sequence[torch.device] = ()) -> Any:
        """The value, or None where there is none (any more). `devices`: those that what was on a GPU may come to."""
        path = self._path(key)
        try:
            value = _read(path, key, devices)
        except FileNotFoundError:
            return None
        except Exception as error:  # cut short, changed, of another format: whatever it is, it is no result
            logger.warning("cache: %s is damaged and is made anew (%s)", path, one_line(error))
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        with suppress(OSError):  # another job may have removed it by now, to make room
            os.utime(path)  # used now: leaves last
        logger.info("cache: %s from %s", key.get("what", "a result"), path.name)
        return value

    def put(self, key: Key, value: Any) -> None:
        from safetensors import SafetensorError

        size = bytes_of(value)
        if size > self.limit * 2**30 / 2:
            logger.info("cache: %s is not kept: %s", key.get("what", "a result"), size_text(size))
            return
        path = self._path(key)
        try:
            self._make_room(size)
            outline, tensors = packed(value)
            text = json.dumps(outline)
            meta = {"key": _text(key), "outline": text, "checksum": digest_of(tensors, text)}
            with written_aside(path) as aside:
                save_tensors(tensors, aside, meta)
        except (OSError, SafetensorError, Unpackable) as error:
            logger.warning("cache: %s is not kept: %s", key.get("what", "a result"), error)

    def _make_room(self, size: int) -> None:
        """Removes what was used longest ago until `size` more bytes fit, and what killed jobs were writing. Another job
        may do so at the same time."""
        for path in (path for pattern in BEING_WRITTEN for path in self.folder.glob(pattern)):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()
        entries = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):
                state = path.stat()
                entries.append((state.st_mtime_ns, state.st_size, path))
        over = sum(each[1] for each in entries) + size - self.limit * 2**30
        for _, freed, path in sorted(entries):
            if over <= 0:
                return
            path.unlink(missing_ok=True)
            over -= freed

    def _path(self, key: Key) -> Path:
        return self.folder / f"{hashlib.sha256(_text(key).encode()).hexdigest()[:32]}.safetensors"


def _text(key: Key) -> str:
    return json.dumps(key, sort_keys=True, separators=(",", ":"))


def _read(path: Path, key: Key, devices: Sequence[torch.device]) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if meta["key"] != _text(key):
        raise ValueError("another key's")
    if meta["checksum"] != digest_of(tensors, meta["outline"]):
        raise ValueError("contents and checksum differ")
    return unpacked(json.loads(meta["outline"]), tensors, devices)

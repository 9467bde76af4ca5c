"""A GPU of the machine that no other run has: `model.device=cuda:any`."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pruneexp.model.placement import ANY
from pruneexp.types import ConfigError

if TYPE_CHECKING:
    from filelock import FileLock

logger = logging.getLogger("pruneexp")

WAIT = 0.5  # seconds between two looks at GPUs that are all taken


@contextmanager
def held_gpu(device: str) -> Iterator[str]:
    """Gives `device`; for "cuda:any", a visible GPU that no other run of this user has taken in this way. The GPU is
    held until the end, also that of a process that is killed. While all are taken, this waits.

    A GPU is a lock file in the folder of temporary files, named by the GPU's own id: processes that see other GPUs, or
    the same ones under other numbers, agree. Programs that take no such lock are not noticed.

    Raises:
        ConfigError: the lock files cannot be written.
    """
    if device != ANY:
        yield device
        return
    from filelock import FileLock

    locks = [FileLock(_lock_file(number), timeout=0) for number in range(torch.cuda.device_count())]
    number = _first_free(locks)
    if number is None:
        logger.info("model.device=%s: other runs have all %d GPUs; this one waits", ANY, len(locks))
    while number is None:
        time.sleep(WAIT)
        number = _first_free(locks)
    logger.info("model.device=%s: takes cuda:%d", ANY, number)
    try:
        yield f"cuda:{number}"
    finally:
        torch.cuda.empty_cache()  # before another run takes it
        locks[number].release()


def _first_free(locks: Sequence[FileLock]) -> int | None:
    """The number of the first lock that nobody holds, which is held from here on."""
    from filelock import Timeout

    for number, lock in enumerate(locks):
        try:
            lock.acquire()
            return number
        except Timeout:
            continue
        except OSError as error:
            locked = f"locks of GPUs are files in {tempfile.gettempdir()!r}: {error.strerror or error}"
            expected = "expected TMPDIR to be a folder that can be written to"
            raise ConfigError(f"model.device={ANY!r}: {locked}; {expected}") from error
    return None


def _lock_file(number: int) -> Path:
    user = os.getuid() if hasattr(os, "getuid") else 0
    name = f"pruneexp-{user}-{torch.cuda.get_device_properties(number).uuid}.lock"
    return Path(tempfile.gettempdir(), name)

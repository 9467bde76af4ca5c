"""A GPU of the machine that no other run has: `model.device=cuda:any`."""

from __future__ import annotations

import logging
import os
import tempfile
import time
import traceback
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
    held until the end, also that of a process that is killed. While all are taken, this waits. A model that is still
    there at the end stays on a GPU that counts as free; what an error's traceback holds is let go.

    A GPU is a lock file in the folder of temporary files, named by the GPU's own id: processes that see other GPUs, or
    the same ones under other numbers, agree. Programs that take no such lock are not noticed.

    Raises:
        ConfigError: the lock files cannot be written.
    """
    if device != ANY:
        yield device
        return
    from filelock import FileLock

    folder = _lock_folder()
    locks = [FileLock(folder / _lock_name(number), timeout=0) for number in range(torch.cuda.device_count())]
    number = _first_free(locks)
    if number is None:
        logger.info("model.device=%s: other runs have all %d GPUs; this one waits", ANY, len(locks))
    while number is None:
        time.sleep(WAIT)
        number = _first_free(locks)
    logger.info("model.device=%s: takes cuda:%d", ANY, number)
    try:
        yield f"cuda:{number}"
    except BaseException as error:
        _forget_variables(error)
        raise
    finally:
        try:
            torch.cuda.empty_cache()  # before another run takes it
        finally:  # an error of the GPU's is told here again
            locks[number].release()


def _forget_variables(error: BaseException | None) -> None:
    """A traceback holds the variables of the calls that failed, the model among them."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _first_free(locks: Sequence[FileLock]) -> int | None:
    """The number of the first lock that nobody holds, which is held from here on."""
    from filelock import Timeout

    for number, lock in enumerate(locks):
        try:
            lock.acquire()
            return number
        except Timeout:
            continue
        except (OSError, NotImplementedError) as error:  # the latter of a file system without locks
            raise _without_locks(Path(lock.lock_file).parent, getattr(error, "strerror", None) or error) from error
    return None


def _lock_folder() -> Path:
    """Python passes over a TMPDIR that cannot be written to: runs would then disagree about where the locks are."""
    named = os.environ.get("TMPDIR")
    try:
        folder = Path(tempfile.gettempdir())
    except OSError as error:  # nothing can be written to
        raise _without_locks(named or "/tmp", error.strerror or error) from error
    if named and not os.access(named, os.W_OK | os.X_OK):
        raise _without_locks(named, "it cannot be written to" if os.path.exists(named) else "it does not exist")
    return folder


def _without_locks(folder: str | Path, why: object) -> ConfigError:
    expected = "expected TMPDIR to be a folder that can be written to"
    return ConfigError(f"model.device={ANY!r}: locks of GPUs are files in {str(folder)!r}: {why}; {expected}")


def _lock_name(number: int) -> str:
    user = os.getuid() if hasattr(os, "getuid") else 0
    return f"pruneexp-{user}-{torch.cuda.get_device_properties(number).uuid}.lock"

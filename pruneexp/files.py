"""Files that are there whole or not at all, and as open to others as the system's umask says."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from glob import escape
from pathlib import Path
from typing import IO, Any

from pruneexp.types import ConfigError

# What a killed process may leave beside a file: our own, and what safetensors writes and renames.
BEING_WRITTEN = (".*.tmp", ".*.mode", ".tmp??????")


def process_name() -> str:
    """This process among those of all machines, and of their containers, that share a folder."""
    machine = f"{socket.gethostname()} {process_namespace()}"
    return f"{os.getpid()}-{hashlib.sha256(machine.encode()).hexdigest()[:6]}"


@cache
def process_namespace() -> int | None:
    """What Linux calls those whose numbers of processes we see: another in every container, also where containers share
    their machine's name. None where it is not told."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None


def hold(file: IO[Any]) -> None:
    """Locks an open file until it is closed, or its process is killed; not where the file system has no locks."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_held(path: Path) -> bool:
    """Whether a process, be it of another container, holds the file."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file in hexadecimal, read a MiB at a time. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes `data` (text as UTF-8) whole or not at all. Raises OSError."""
    with written_aside(path) as aside:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, content: Any) -> None:
    """Writes it whole or not at all. Raises OSError."""
    write_atomic(path, json.dumps(content, indent=1) + "\n")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A file to write in place of `path`. It is then flushed to the disk and renamed, so that `path` is whole or not
    there."""
    aside = path.with_name(f".{path.name}.{process_name()}.tmp")
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def create_whole(path: Path, data: str) -> bool:
    """Writes `data` where there is no file yet, whole or not at all; False where there is one. Of several processes,
    also on several machines with one NFS, one succeeds. Raises OSError."""
    aside = path.with_name(f".{path.name}.{process_name()}.tmp")
    try:
        aside.write_text(data, encoding="utf-8")
        try:
            os.link(aside, path)  # unlike a rename, it never replaces; unlike a lock, every NFS has it
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with open(path, "x", encoding="utf-8") as file:
                    file.write(data)
            except FileExistsError:
                return False
    finally:
        aside.unlink(missing_ok=True)
    return True


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds; None where it is missing, damaged or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def files_in(folder: Path) -> list[str]:
    """Every file in it, as a path in it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def save_tensors(tensors: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file with the permissions of any new file; safetensors itself lets only the owner read it.
    Raises OSError, or safetensors' own error where the disk fails."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    give_usual_mode(path)


def give_usual_mode(path: Path) -> None:
    """Gives a file the permissions of a new one beside it. A new one is made and looked at: asking for the umask would
    set it for all threads, and a folder may have rules of its own. Raises OSError."""
    probe = path.with_name(f".{path.name}.{process_name()}.mode")
    try:
        with open(probe, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
    finally:
        probe.unlink(missing_ok=True)
    path.chmod(mode)


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder of temporary files, until the end of a `with`. What cannot be removed then costs nothing: on NFS, files
    that are still mapped stay, under other names, until they are not."""
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


def check_writable(folder: Path, where: str) -> None:
    """Raises ConfigError, saying `where`, unless `folder` is, or can be made, a folder that we may write to."""
    try:
        folder.exists()
    except OSError as error:  # a name that is too long
        raise ConfigError(f"{where}: {error.strerror or error}; expected a folder that can be made") from error
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{where}: expected a folder, found a file")
    nearest = existing(folder)
    if not nearest.is_dir():
        raise ConfigError(f"{where}: {nearest} is a file; expected a folder that can be made")
    try:
        # Tried, not asked for: permissions tell nothing of file systems that take no files, such as /proc, and root has
        # them everywhere. Where the system can, the file never has a name.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{where}: {nearest} cannot be written to ({reason}); expected a folder that can") from error


def typed_folder(key: str, text: str, instead: str) -> Path:
    """The folder that was typed for a key. Raises ConfigError for none; `instead`: what null stands for."""
    try:
        if text == "":
            raise RuntimeError
        return Path(text).expanduser()
    except RuntimeError:  # none is named, or a home that is not known
        raise ConfigError(f"{key}={text!r}: expected a folder, or null for {instead}") from None


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def check_replaceable(out: Path, record: str, what: str, overwrite: bool) -> None:
    """Raises ConfigError where `out` exists and must not be replaced: it is no earlier `what`, which has a file
    `record`, or it holds files that this record does not list under `files`."""
    where = f"out={str(out)!r}"
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{where}: is a file; expected a new folder")
    if out.is_mount():
        raise ConfigError(f"{where}: is where a disk is mounted, which cannot be replaced; expected a folder in it")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{where}: exists; expected a new folder, or overwrite=true")
    if not (out / record).is_file():
        raise ConfigError(f"{where}: holds no {record}; overwrite=true replaces earlier {what}s alone")
    listed = (read_object(out / record) or {}).get("files")
    if isinstance(listed, list):  # older ones list nothing
        foreign = [name for name in files_in(out) if name not in (record, *listed)]
        if foreign:
            nobodys = f"{', '.join(foreign)}, which no {what} wrote"
            raise ConfigError(f"{where}: holds {nobodys}; expected a folder of its own")


def aside_of(place: Path) -> Path:
    """Where this process makes a folder that is then moved to `place`. Nothing is there, nor what processes of this
    machine were making when they were killed. Raises OSError."""
    import psutil

    own = place.with_name(f".{place.name}.{process_name()}.tmp")
    machine = process_name().partition("-")[2]
    for left in place.parent.glob(f".{escape(place.name)}.*-{machine}.tmp*"):
        process = left.name.removeprefix(f".{place.name}.").partition("-")[0]
        if left == own or (process.isdecimal() and not psutil.pid_exists(int(process))):
            shutil.rmtree(left, ignore_errors=True)
    return own


def replace_folder(aside: Path, out: Path) -> None:
    """Puts a finished folder in its place, an earlier one out of the way first."""
    old = out.with_name(f".{out.name}.{process_name()}.old")
    if out.exists():
        out.rename(old)
    try:
        aside.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)

"""The run folder as a place: its name, who may write to it, the state of its run, and writing without half files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from pruneexp.files import (
    check_writable,
    create_whole,
    is_held,
    process_namespace,
    read_object,
    write_atomic,
    write_json,
)
from pruneexp.tracker.checkpoint_files import PROOF, checkpoint_files, clear_checkpoint
from pruneexp.types import ConfigError, RunError

# metrics.json first: without it, what is left of a half-cleared folder is no finished run.
FILES = ("metrics.json", "status.json", "plan.json", PROOF, "scores.safetensors", "structure.png", "environment.json")
CHOSEN = "compensation.json"  # what compensation chose for each site
SCORED = "criterion.json"  # what the criterion chose for each site
LOG = "log.txt"
FILES += (CHOSEN, SCORED, "model.gguf", "config.yaml", LOG, "latency.json", "latency.png")
NOTES = "resume"  # folder of a streamed run's notes of how far it has come, until it is done
UNFINISHED = (NOTES, "model.partial", "streamed", "streamed.partial")  # folders of a run that has not ended
FOLDERS = ("model", "samples", *UNFINISHED)
SAMPLE_FILES = ("*.json", "*.md", ".*.tmp")
PATIENCE = 1.0  # seconds, with a process that has claimed a status and not written its own yet


def run_folder(given: Path | None, recipe: str, name: str | None, now: datetime) -> Path:
    """The folder of a new run: the `given` one, or outputs/<recipe>/<date_time>[_name], created here, with -2, -3, ...
    where that is taken. Raises RunError where nothing can be created."""
    if given is not None:
        return given
    stem = now.strftime("%Y-%m-%d_%H-%M-%S") + (f"_{name}" if name else "")
    parent = Path("outputs") / recipe
    folder = parent / stem
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in count(2):
            try:
                # mkdir is the test and the claim in one step: two runs that start together get two folders.
                folder.mkdir()
                break
            except FileExistsError:
                folder = parent / f"{stem}-{number}"
    except OSError as error:
        raise RunError(f"run.dir={str(parent / stem)!r}: cannot create it: {error.strerror or error}") from error
    return folder


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises ConfigError where a run may not or cannot write: a finished run is there and `overwrite` is false; a run
    is still writing; files that no run wrote have the names of a run's, or lie where the checkpoint goes; or the system
    does not let us. Leaves nothing there."""
    where = f"run.dir={str(folder)!r}"
    check_writable(folder, where)
    state = status_of(folder)
    if state == "running":
        status = _read_status(folder)
        host, who, instead = status.get("host"), f"process {status.get('pid')}", "expected an empty folder"
        if host not in (None, socket.gethostname()):
            who += f" of {host}"
            instead += ", or status.json removed where that machine or its run is gone"
        raise ConfigError(f"{where}: {who} is still writing a run there; {instead}")
    foreign = checkpoint_files(folder)[1]
    if foreign:
        raise ConfigError(
            f"{where}: model/, where the checkpoint goes, holds {', '.join(foreign)}, which no run writes; expected an "
            "empty folder"
        )
    if overwrite:
        return
    if state == "done":
        raise ConfigError(f"{where}: holds a finished run; expected an empty folder or run.overwrite=true")
    strangers = [name for name in (*FILES, *FOLDERS) if (folder / name).exists()]
    if state == "absent" and strangers:
        raise ConfigError(
            f"{where}: holds {', '.join(strangers)}, from no run; expected an empty folder or run.overwrite=true"
        )


def claim_folder(folder: Path, overwrite: bool) -> dict[str, Any]:
    """Makes `folder` ready for a new run and returns the run's status. The folder is created, and files that an older
    run writes are removed by name; anything else stays. Without `overwrite`, the notes and the unfinished checkpoint of
    a streamed run stay, too: the new run may go on from there. Of several processes that claim the folder at the same
    time, one gets it. Raises ConfigError as `check_folder`, RunError where it cannot be written."""
    before = _bytes(folder / "status.json")
    check_folder(folder, overwrite)
    status = new_status()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _take(folder / "status.json", before, json.dumps(status, indent=1) + "\n"):
            raise ConfigError(f"run.dir={str(folder)!r}: another process has begun a run; expected an empty folder")
        for name in FILES:
            if name not in ("status.json", PROOF):  # these say whose the rest is
                (folder / name).unlink(missing_ok=True)
            for pattern in (f".{name}.*.tmp", f".*{name}.*.claim", f".*{name}.*.claim.*.tmp"):
                for aside in folder.glob(pattern):
                    aside.unlink(missing_ok=True)
        _clear_samples(folder / "samples")
        if overwrite or not (folder / NOTES).is_dir():
            clear_unfinished(folder)
    except OSError as error:
        raise RunError(f"run.dir={str(folder)!r}: cannot write there: {error.strerror or error}") from error
    return status


def mark_failed(folder: Path, reason: str) -> bool:
    """Marks a run failed that did not come far enough, or could not write, to do so itself. False where it is over
    already, or another process has it. Raises OSError."""
    path, status = folder / "status.json", new_status()
    before, state = _bytes(path), status_of(folder)
    if state in ("done", "failed") or (state == "running" and not is_own(folder)):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    if not _take(path, before, json.dumps(status, indent=1) + "\n"):
        return False
    del status["host"]
    write_json(path, {**status, "status": "failed", "reason": reason, "ended": timestamp()})
    return True


def _take(path: Path, before: bytes | None, status: str) -> bool:
    """Replaces `before`, the status of a run that is over; False where another process was faster. A process first
    claims the old status, by a file named after its content, and only the claimant replaces it. So a status is always
    there."""
    if before is None:
        return create_whole(path, status)
    claim = path.with_name(f".{path.name}.{hashlib.sha256(before).hexdigest()[:16]}.claim")
    late = time.monotonic() + PATIENCE
    while not create_whole(claim, status):
        held, owner = _bytes(claim), read_object(claim)
        if held is not None and owner is not None and not _alive(owner):  # killed in between: as with any stale status
            if not _take(claim, held, status):
                return False
            break
        if time.monotonic() > late:
            return False
        time.sleep(0.01)  # whose status it is shows in a moment
    try:
        if _bytes(path) != before:  # another has come and gone
            return False
        write_atomic(path, status)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _clear_samples(folder: Path) -> None:
    """Removes what a run writes there, and the folder where nothing else is in it."""
    if folder.is_dir() and not folder.is_symlink():
        for file in (file for pattern in SAMPLE_FILES for file in folder.glob(pattern)):
            file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def clear_unfinished(folder: Path) -> None:
    """Removes a run's notes and its checkpoint, whole or half-written, by the names of what a run writes. Raises
    OSError."""
    for name in UNFINISHED:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            shutil.rmtree(folder / name)
    clear_checkpoint(folder)


def new_status() -> dict[str, Any]:
    """The status of a run that this process starts now."""
    return {
        "status": "running",
        "reason": None,
        "started": timestamp(),
        "ended": None,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "process": _started(os.getpid()),
        "namespace": process_namespace(),
        **_scheduled(),
    }


def _scheduled() -> dict[str, Any]:
    """The cluster's job that this process belongs to, and how often SLURM has put that in the queue again."""
    job = os.environ.get("SLURM_JOB_ID")
    return {} if job is None else {"slurm": [job, int(os.environ.get("SLURM_RESTART_COUNT", "0"))]}


def timestamp() -> str:
    """Now, local time with its offset, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def status_of(folder: Path) -> str:
    """ "done", "failed", "running", "interrupted" (its process is gone without a word), or "absent" (no run there).

    A run that is marked running on another host counts as running, since its process cannot be asked from here; except
    one of this process's own SLURM job, which ended before it was started again. A run whose metrics.json is damaged
    counts as interrupted: there is nothing to take its figures from."""
    finished, status = read_object(folder / "metrics.json") is not None, _read_status(folder)
    state = status.get("status")
    if state is None:
        return "done" if finished else "absent"
    if state == "failed" or (state == "done" and finished):
        return state
    ending = state == "done" and is_held(folder / LOG)  # it says no more what machine it is on
    return "running" if ending or _alive(status, folder / LOG) else "interrupted"


def is_own(folder: Path) -> bool:
    """Whether the run there is, or was, this process's, as far as its status says."""
    status = _read_status(folder)
    own = {"host": socket.gethostname(), "pid": os.getpid(), "namespace": process_namespace()}
    return all(status.get(key, value) == value for key, value in own.items()) and (
        "pid" not in status or _alive(status)
    )


def _read_status(folder: Path) -> dict[str, Any]:
    status = read_object(folder / "status.json") or {}
    # Somebody else's status.json is no run of ours.
    return status if status.get("status") in ("running", "done", "failed") else {}


def _alive(status: dict[str, Any], log: Path | None = None) -> bool:
    """Whether the process of a status lives. `log`: its log.txt, which it holds: the sign of a process of another
    container on this machine, where its number says nothing. A process that has claimed a folder and has no log yet
    counts as living, too."""
    if status.get("host", socket.gethostname()) != socket.gethostname():
        recorded, own = status.get("slurm"), _scheduled().get("slurm")
        return not (recorded and own and recorded[0] == own[0] and recorded[1] < own[1])
    if status.get("namespace", process_namespace()) != process_namespace():
        return log is None or not log.exists() or is_held(log)
    pid, recorded = status.get("pid"), status.get("process")
    started = _started(pid) if isinstance(pid, int) and pid > 0 else None
    # Numbers are used again, in containers nearly always: the start time tells one process from the next.
    return started is not None and (not isinstance(recorded, float) or abs(started - recorded) < 0.1)


def _started(pid: int) -> float | None:
    """Seconds from the system's start to the process's, whatever becomes of the clock; None: it has ended."""
    try:
        booted = psutil.boot_time()  # first: older versions of psutil add what this gave when it was last called
        process = psutil.Process(pid)
        ended = process.status() == psutil.STATUS_ZOMBIE
        return None if ended else process.create_time() - booted
    except psutil.NoSuchProcess:
        return None

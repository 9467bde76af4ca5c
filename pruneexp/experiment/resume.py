"""Taking up a streamed run that has died where its notes say that it stopped."""

from __future__ import annotations

from pathlib import Path

from pruneexp.files import write_atomic
from pruneexp.tracker import NOTES, clear_unfinished
from pruneexp.types import RunError


def take_up(run: Path, key: str) -> bool:
    """Whether a run of the identity `key` has left notes in its folder `run`. Another run's are removed, with what it
    had written of a checkpoint, and a place is made for new ones. Raises RunError where that cannot be done."""
    file = run / NOTES / "identity"
    try:
        if file.is_file() and file.read_text() == key:
            return True
        clear_unfinished(run)
        file.parent.mkdir()
        write_atomic(file, key)
    except OSError as error:
        raise RunError(f"{file.parent}: cannot be written ({error.strerror or error})") from error
    return False

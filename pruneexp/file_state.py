"""What tells a file that was read before from one that has changed since."""

from __future__ import annotations

from pathlib import Path

FileState = tuple[str, int, int, int]


def file_state(path: Path) -> FileState:
    """Absolute path, inode, size and time of the last change (ns): a key for what was read from the file. Raises
    OSError."""
    found = path.stat()
    return str(path.absolute()), found.st_ino, found.st_size, found.st_mtime_ns

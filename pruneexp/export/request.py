"""What `pruneexp-export` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    source: Path
    out: Path
    format: str = "auto"
    prove: str = "process"
    overwrite: bool = False
    multiple: int | None = None  # None: the format's own
    dtype: str | None = None  # None: the checkpoint's
    stream: bool | None = None  # None: by the memory that is free

    @property
    def single_file(self) -> bool:
        """Whether `out` is the file itself, not a folder for it."""
        return self.format == "gguf" and self.out.suffix == ".gguf"

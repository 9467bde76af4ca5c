"""An export that is one file, NAME.gguf: what its export.json would say lies beside it, as NAME.gguf.json."""

from __future__ import annotations

import json
from pathlib import Path

from pruneexp.files import read_object, written_aside

GGUF_FILE = "model.gguf"  # its name in a folder


def record_beside(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


def check_file(out: Path, overwrite: bool) -> None:
    """Raises ConfigError where `out` or its record is there and is no earlier export, to be replaced."""
    from pruneexp.types import ConfigError

    where, record = f"out={str(out)!r}", record_beside(out)
    if out.is_dir():
        raise ConfigError(f"{where}: is a folder; expected the file to write, or a folder whose name is no *.gguf")
    if not out.exists() and not record.exists():
        return
    if not overwrite:
        there = out if out.exists() else record
        raise ConfigError(f"{where}: {there.name} exists; expected a new file, or overwrite=true")
    earlier = read_object(record) or {}
    size = out.stat().st_size if out.exists() else earlier.get("bytes")
    if earlier.get("form") != "gguf" or "bytes" not in earlier or size != earlier["bytes"]:
        raise ConfigError(
            f"{where}: no export that {record.name} tells of; overwrite=true replaces earlier exports alone"
        )


def place_file(written: Path, out: Path, record: dict[str, object]) -> None:
    """Puts a finished file and its record in their places."""
    own = {name: value for name, value in record.items() if name != "files"} | {"bytes": written.stat().st_size}
    with written_aside(record_beside(out)) as aside:  # first, for the disk may be full
        aside.write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")
        written.replace(out)

"""Where an export's checkpoint lies, where the new folder may go, or the new file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruneexp.model import ModelSource

RECORD = "export.json"
GGUF_FILE = "model.gguf"  # its name in a folder


def checkpoint_folder(source: Path) -> Path:
    """The checkpoint's folder. Raises ConfigError where there is none that is finished."""
    from pruneexp.tracker import status_of
    from pruneexp.types import ConfigError

    state = status_of(source)
    folder = source if state == "absent" else source / "model"
    written = (folder / "config.json").is_file()
    if not source.is_dir():
        wrong = "is a file" if source.exists() else "no such folder"
        mistake = f"{wrong}; expected a finished run's, or a checkpoint's"
    elif state == "absent" and not written:
        mistake = "holds no run and no checkpoint; expected status.json or config.json"
    elif state == "running":
        mistake = "this run is still running; expected a finished one: wait for its end"
    elif state not in ("absent", "done"):
        ended = "failed" if state == "failed" else f"was {state}"
        mistake = f"this run {ended}; expected a finished one: run it again"
    elif not written:
        mistake = "this run saved no checkpoint; run it again with run.save=true run.overwrite=true"
    elif (folder / "adapter").exists():
        mistake = "its model has an adapter that is not merged; expected a run with recovery.merge=true"
    else:
        return folder
    raise ConfigError(f"RUN_FOLDER={str(source)!r}: {mistake}")


def stored_source(checkpoint: Path, dtype: str | None = None, stream: bool = False) -> ModelSource:
    """The checkpoint in `dtype`; None: as it is stored, whatever precision a CPU would choose by itself."""
    from pruneexp.model import ModelSource
    from pruneexp.model.source import DTYPES

    def source(dtype: str) -> ModelSource:
        return ModelSource("export", str(checkpoint), None, dtype, "cpu", stream, False, 1)

    if dtype is None:
        config = source("auto").read_config(checkpoint)
        dtype = str(config.get("dtype") or config.get("torch_dtype"))
        dtype = dtype if dtype in DTYPES else "float32"
    return source(dtype)


def exact_source(checkpoint: Path, stream: bool = False) -> ModelSource:
    """The checkpoint in float32 (or in float64, if it is stored so)."""
    stored = stored_source(checkpoint).dtype
    return stored_source(checkpoint, "float64" if stored == "float64" else "float32", stream)


def check_out(out: Path, source: Path, checkpoint: Path, overwrite: bool, single_file: bool) -> None:
    """Raises ConfigError where nothing may be written."""
    from pruneexp.files import check_replaceable
    from pruneexp.types import ConfigError

    where, resolved = f"out={str(out)!r}", out.resolve()
    for folder in (source.resolve(), checkpoint.resolve()):
        if resolved == folder or folder in resolved.parents:
            raise ConfigError(f"{where}: lies inside {str(source)!r}; expected a folder elsewhere")
        if resolved in folder.parents:
            raise ConfigError(f"{where}: holds {str(source)!r}; expected a folder of its own")
    if single_file:
        check_file(out, overwrite)
    else:
        check_replaceable(out, RECORD, "export", overwrite)


def check_space(out: Path, place: Path, needed: int) -> None:
    """Raises ConfigError where the disk of `place`, which the user calls `out`, has no room for so many bytes."""
    from pruneexp.files import existing
    from pruneexp.types import ConfigError, size_text

    free = shutil.disk_usage(existing(place.parent)).free
    if free < needed:
        raise ConfigError(f"out={str(out)!r}: the export takes {size_text(needed)}; {size_text(free)} are free there")


def record_beside(out: Path) -> Path:
    """What a single file's export.json would say: NAME.gguf.json beside NAME.gguf."""
    return out.with_name(f"{out.name}.json")


def check_file(out: Path, overwrite: bool) -> None:
    """Raises ConfigError where `out` or its record is there and is no earlier export, to be replaced."""
    from pruneexp.files import read_object
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
    from pruneexp.files import written_aside

    own = {name: value for name, value in record.items() if name != "files"} | {"bytes": written.stat().st_size}
    with written_aside(record_beside(out)) as aside:  # first, for the disk may be full
        aside.write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")
        written.replace(out)

"""What the small commands share: folders and key=value on the command line, and a folder that is written whole."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pruneexp.explain import did_you_mean, known_keys
from pruneexp.files import files_in, read_object
from pruneexp.types import ConfigError


def read_arguments(
    argv: Sequence[str], command: str, keys: Sequence[str], choices: Mapping[str, Sequence[str]]
) -> tuple[list[str], dict[str, str]]:
    """Folders, and values by key; `choices`: what a key may be. Raises ConfigError."""
    folders: list[str] = []
    values: dict[str, str] = {}
    for text in argv:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]+", key):
            if text.startswith("-"):
                raise ConfigError(f"{text}: unknown option; expected key=value; see {command} --help")
            folders.append(text)
            continue
        known_keys([key], keys)
        if key in values:
            raise ConfigError(f"{text}: {key} is given twice")
        if key in choices and value not in choices[key]:
            *others, last = choices[key]
            near = did_you_mean(value, choices[key], f"{key}={{}}")
            raise ConfigError(f"{text}: expected {', '.join(others)} or {last}{near}")
        values[key] = value
    return folders, values


def check_replaceable(out: Path, record: str, what: str, overwrite: bool) -> None:
    """Raises ConfigError where `out` is there and is no earlier `what` to be replaced, told by its file `record`, or
    holds what that, under `files`, does not list."""
    where = f"out={str(out)!r}"
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{where}: is a file; expected a new folder")
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
            raise ConfigError(
                f"{where}: holds {', '.join(foreign)}, which no {what} wrote; expected a folder of its own"
            )


def replace_folder(aside: Path, out: Path) -> None:
    """Puts a finished folder in its place, an earlier one out of the way first."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(old)
    try:
        aside.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)

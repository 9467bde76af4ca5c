"""What the small commands share: folders and key=value on the command line, and how they write."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pruneexp.cli.explain import known_keys
from pruneexp.conf_files import did_you_mean
from pruneexp.files import aside_of
from pruneexp.types import ConfigError, RunError


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


@contextmanager
def made_aside(out: Path, place: Path) -> Iterator[Path]:
    """A folder in which to make what is then moved to `place`, which the user calls `out`; nothing is left of it.
    Raises RunError where it cannot be written."""
    aside = aside_of(place)
    try:
        yield aside
    except OSError as error:
        raise RunError(f"out={str(out)!r}: cannot be written ({error.strerror or error})") from error
    finally:
        for left in (aside, aside.with_name(f"{aside.name}.partial")):
            shutil.rmtree(left, ignore_errors=True)

"""How an error names a model that cannot be used."""

from __future__ import annotations

from pathlib import Path

from pruneexp.types import ConfigError


def refused(path: str | Path, why: str) -> ConfigError:
    """The error to raise: one line. `path`: as the user typed `model.path`."""
    return ConfigError(f"model.path={str(path)!r}: {why}")

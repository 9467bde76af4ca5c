"""Documents of the user's own: rows of jsonl and parquet files.

The `_target_` is the function `documents`, as its parameters `calibration` and `evaluation` are methods of a dataset.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from pruneexp.dataset.files import existing_file, stem_of
from pruneexp.dataset.rows import DocumentSource, Rows
from pruneexp.dataset.windows import Sampling
from pruneexp.files import sha256
from pruneexp.fingerprint import FileState, file_state
from pruneexp.types import ConfigError, one_line

ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
EXPECTED = "a jsonl or parquet file of documents, or a list of such files"
SLICE = re.compile(r"(-?\d*):(-?\d*)")

Paths = str | list[str] | None


def holds_documents(path: str) -> bool:
    """Whether the file is one of documents, by its name."""
    return path.lower().endswith(ENDINGS)


def documents(
    calibration: Paths,
    evaluation: Paths,
    calibration_documents: str | None,
    evaluation_documents: str | None,
    fields: list[str],
    calibration_join: str | None,
    evaluation_join: str,
    evaluation_windows: int | None,
    name: str | None,
    special_tokens: bool,
    samples: int,
    length: int,
    seed: int,
    sampling: Sampling,
    bos: bool,
) -> DocumentFiles:
    """Documents of files, one file after the other."""
    files = [(path,) if isinstance(path, str) else path and tuple(path) for path in (calibration, evaluation)]
    named = name or stem_of(files[1][0] if files[1] else None, "documents")
    slices = {"calibration": calibration_documents, "evaluation": evaluation_documents}
    joins = {"calibration_join": calibration_join, "evaluation_join": evaluation_join}
    drawn = {"samples": samples, "length": length, "seed": seed, "sampling": sampling, "bos": bos}
    shown = {"evaluation_windows": evaluation_windows, "special_tokens": special_tokens, "fields": fields}
    parts: dict[str, Any] = {"calibration_file": files[0] or None, "evaluation_file": files[1] or None}
    return DocumentFiles(**parts, slices=slices, name=named, **joins, **shown, **drawn)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class DocumentFiles(DocumentSource):
    """Rows of files, in order: one JSON object a line (.jsonl, .json, also .gz), or rows of .parquet.

    `slices`: of each part's documents, counted over all its files, those that are taken, "0:1334"; None: all.
    """

    calibration_file: tuple[str, ...] | None
    evaluation_file: tuple[str, ...] | None
    slices: Mapping[str, str | None]

    def __post_init__(self) -> None:
        super().__post_init__()
        for part, taken in self.slices.items():
            if taken is not None and not SLICE.fullmatch(taken):
                raise ConfigError(f"{part}_documents={taken!r}: expected null, or first:last+1, like 0:1000 or 1000:")

    def __hash__(self) -> int:
        return hash(repr(self))  # lists and dicts are among the settings

    def check(self, calibration: bool = True, evaluation: bool = True) -> None:
        for part, needed in (("calibration", calibration), ("evaluation", evaluation)):
            if needed:
                _checked(self, part, self.rows(part))

    def key(self, part: str) -> str:
        files = self._files(part) or ("null",)
        return f"dataset.{part}={files[0] if len(files) == 1 else '[' + ','.join(files) + ']'}"

    def description(self) -> Mapping[str, Any]:
        parts: dict[str, Any] = {}
        for part, taken in self.slices.items():
            files = [Path(path).expanduser() for path in self._files(part) or ()]
            sums = [{"file": str(f), "sha256": sha256(f)} for f in files]
            parts[part] = {"files": sums, "documents": taken, "join": getattr(self, f"{part}_join")} if sums else None
        own = {"special_tokens": self.special_tokens, "fields": list(self.fields)}
        return {"kind": "documents", **parts, "evaluation_windows": self.evaluation_windows, **own, **self.drawing()}

    def _files(self, part: str) -> tuple[str, ...] | None:
        return self.calibration_file if part == "calibration" else self.evaluation_file

    def rows(self, part: str) -> Rows:
        """The part's documents, not read yet. Raises ConfigError."""
        if self._files(part) is None:
            raise ConfigError(f"dataset.{part}=null: expected {EXPECTED}")
        states = []
        for path in self._files(part) or ():
            key = f"dataset.{part}={path}"
            file = existing_file(path, key, EXPECTED)
            if not holds_documents(path):
                raise ConfigError(
                    f"{key}: expected {EXPECTED} ({', '.join(ENDINGS)}); a plain text is for dataset=text"
                )
            states.append(file_state(file))
        return Rows(json.dumps([states, self.slices[part]]), partial(self._documents, part, states))

    def _documents(self, part: str, states: Sequence[FileState]) -> list[dict[str, str]]:
        """The part's documents. Raises ConfigError."""
        rows = []
        for path, state in zip(self._files(part) or (), states, strict=True):
            rows += _read(state, tuple(self.fields), f"dataset.{part}={path}")
        first, last = (int(x) if x else None for x in SLICE.fullmatch(self.slices[part] or ":").groups())  # type: ignore[union-attr]
        taken = rows[first:last]
        if not any(text.strip() for row in taken for text in row.values()):
            what = f"{part}_documents={self.slices[part]}: no text among them, of {len(rows)}"
            raise ConfigError(f"dataset.{what}" if rows and self.slices[part] else f"{self.key(part)}: no text in it")
        return taken


def forget_documents() -> None:
    """Lets go of all that was read. For when the windows are made, which are much smaller."""
    _read.cache_clear()


@lru_cache(maxsize=64)
def _checked(source: DocumentFiles, part: str, rows: Rows) -> None:
    """Reads the documents, once as long as they are the same: a sweep's jobs ask again."""
    rows.read()


@lru_cache(maxsize=8)
def _read(state: FileState, fields: Sequence[str], key: str) -> list[dict[str, str]]:
    """The documents of a file: the text of their `fields`. Raises ConfigError."""
    if state[0].lower().endswith(".parquet"):
        return _parquet(state[0], fields, key)
    opened = gzip.open if state[0].lower().endswith(".gz") else open
    entries = []
    try:
        with opened(state[0], "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    entries.append(_fields_of(line, fields, f"{key}: line {number}"))
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise ConfigError(f"{key}: cannot be read ({error}); expected {EXPECTED}") from None
    return entries


def _fields_of(line: str, fields: Sequence[str], where: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is no JSON object; expected one a line")
    for field in fields:
        if not isinstance(row.get(field), str):
            what = "is no text" if field in row else f"is missing (there are {', '.join(row) or 'none'})"
            raise ConfigError(f"{where}: field {field!r} {what}; expected a text (dataset.fields names them)")
        try:
            row[field].encode()
        except UnicodeEncodeError as error:  # JSON's \ud83d without its other half
            half = f"\\u{ord(row[field][error.start]):04x}"
            raise ConfigError(f"{where}: field {field!r} holds half a character, {half}; expected a text") from None
    return {field: row[field] for field in fields}


def _parquet(path: str, fields: Sequence[str], key: str) -> list[dict[str, str]]:
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        missing = [field for field in fields if field not in file.schema_arrow.names]
        rows = [] if missing else file.read(columns=list(fields)).to_pylist()
    except Exception as error:
        raise ConfigError(f"{key}: cannot be read ({one_line(error)}); expected {EXPECTED}") from None
    if missing:
        columns = ", ".join(file.schema_arrow.names)
        raise ConfigError(f"{key}: no column {missing[0]!r} (there are {columns}); dataset.fields names them")
    for number, row in enumerate(rows):
        if bad := [field for field, text in row.items() if not isinstance(text, str)]:
            raise ConfigError(
                f"{key}: row {number}: {bad[0]!r} is no text; expected a text (dataset.fields names them)"
            )
    return rows

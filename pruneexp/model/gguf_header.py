"""The header of a GGUF file: what it says of its model and which tensors it holds, without loading one."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from pruneexp.fingerprint import FileState, file_state
from pruneexp.model.refusal import refused

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
FLOAT32 = 0  # a tensor's type
KEPT = 1024  # elements up to which an array is read; longer ones are vocabularies
VERSIONS = (2, 3)


@dataclass(frozen=True)
class Header:
    """`values`: by key, long arrays as None; `tensors`: name -> (elements, type, first byte)."""

    values: dict[str, Any]
    tensors: dict[str, tuple[int, int, int]]


def gguf_header(file: Path, path: str) -> Header:
    """The header of `file`, which the user calls `path`. Raises ConfigError where it is none, or cut short."""
    try:
        return _header(file_state(file))
    except OSError as error:
        why = error.strerror or str(error)
    except (ValueError, KeyError, OverflowError, struct.error) as error:
        why = str(error) if isinstance(error, ValueError) else "its header is damaged"
    raise refused(path, f"cannot be read ({why})")


def float32_tensor(file: Path, header: Header, name: str) -> tuple[float, ...] | None:
    """The elements of a small tensor; None where it is of another type."""
    count, kind, start = header.tensors[name]
    if kind != FLOAT32:
        return None
    with open(file, "rb") as opened:
        opened.seek(start)
        return struct.unpack(f"<{count}f", opened.read(4 * count))


@lru_cache(maxsize=4)
def _header(state: FileState) -> Header:
    path, _, size, _ = state
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("it is no GGUF file")
        (version,) = _unpack(file, "I")
        if version not in VERSIONS:
            raise ValueError(f"version {version} of the format; expected {' or '.join(map(str, VERSIONS))}")
        tensor_count, value_count = _unpack(file, "QQ")
        values: dict[str, Any] = {}
        for _ in range(value_count):
            key = _string(file)
            values[key] = _value(file, *_unpack(file, "I"))
        places = {}
        for _ in range(tensor_count):
            name, (dimensions,) = _string(file), _unpack(file, "I")
            count = math.prod(_unpack(file, f"{dimensions}Q"))
            places[name] = (count, *_unpack(file, "IQ"))
        alignment = int(values.get("general.alignment", 32))
        data = -(-file.tell() // alignment) * alignment
    tensors = {name: (count, kind, data + offset) for name, (count, kind, offset) in places.items()}
    if any(start >= size for _, _, start in tensors.values()):
        raise ValueError(f"it is cut short: {size:,} bytes")
    return Header(values, tensors)


def _read(file: BinaryIO, size: int) -> bytes:
    content = file.read(size) if size < 2**31 else b""
    if len(content) < size:
        raise ValueError("it is cut short, or its header is damaged")
    return content


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", _read(file, struct.calcsize(f"<{form}")))


def _string(file: BinaryIO) -> str:
    return _read(file, *_unpack(file, "Q")).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        return _unpack(file, SCALARS[kind])[0]
    of, count = _unpack(file, "IQ")
    if of in SCALARS and count > KEPT:
        _read(file, count * struct.calcsize(SCALARS[of]))
        return None
    if of == STRING and count > KEPT:
        for _ in range(count):
            _read(file, *_unpack(file, "Q"))
        return None
    return [_value(file, of) for _ in range(count)]

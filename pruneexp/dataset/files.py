"""Windows from the user's own files: plain text, or tokens that are already windows.

`_target_`s are the functions `text` and `tokens`: their parameters `calibration` and `evaluation`, the files, are
methods of a dataset.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pruneexp.dataset.windows import Drawn, Sampling, begin_with, check_name, cut, draw, encode, windows_of
from pruneexp.files import sha256
from pruneexp.fingerprint import FileState, file_state
from pruneexp.types import ConfigError, require_least

TEXT = "a UTF-8 text file"
NPY = "an .npy file of integer token windows [N, T]"


def text(
    calibration: str | None,
    evaluation: str | None,
    name: str | None,
    samples: int,
    length: int,
    seed: int,
    sampling: Sampling,
    bos: bool,
) -> Text:
    """Plain UTF-8 text, each file tokenised whole and without special tokens."""
    files = {"calibration_file": calibration, "evaluation_file": evaluation}
    drawn: dict[str, Any] = {"samples": samples, "length": length, "seed": seed, "sampling": sampling, "bos": bos}
    return Text(**files, name=name or stem_of(evaluation, "text"), **drawn)


def tokens(calibration: str | None, evaluation: str | None, name: str | None, length: int | None, bos: bool) -> Tokens:
    """Token windows, used as they are: `bos` can only be false."""
    if bos:
        raise ConfigError(f"bos={bos!r}: token windows are used exactly as they are; expected auto or false")
    return Tokens(calibration, evaluation, name or stem_of(evaluation, "tokens"), length)


def stem_of(path: str | None, otherwise: str) -> str:
    """What a file's data are called, unless they are given a name: `otherwise` where there is no file."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", Path(path).stem if path else otherwise) or otherwise


def existing_file(path: str, key: str, expected: str) -> Path:
    """A file of the user's. Raises ConfigError, naming the `key`, where there is none."""
    file = Path(path).expanduser()
    if not file.is_file():
        what = "this is a directory" if file.is_dir() else "no such file"
        raise ConfigError(f"{key}: {what}; expected {expected}")
    return file


def text_of(file: Path, key: str, expected: str) -> str:
    """The text of a file, without a byte order mark. Raises ConfigError where it is empty, or not UTF-8."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: byte {error.start} is not UTF-8; expected {expected}") from None
    if not text.strip():
        raise ConfigError(f"{key}: the file is empty; expected {expected}")
    return text


@dataclass(frozen=True)
class _Files:
    """What datasets of the user's own files share. `name` is the evaluation file's stem unless given."""

    calibration_file: str | None
    evaluation_file: str | None
    name: str

    def _path(self, part: str) -> str | None:
        return self.calibration_file if part == "calibration" else self.evaluation_file

    def key(self, part: str) -> str:
        return f"dataset.{part}={self._path(part)}"

    def _file(self, part: str, expected: str) -> Path:
        path = self._path(part)
        if path is None:
            raise ConfigError(f"dataset.{part}=null: expected {expected}")
        return existing_file(path, self.key(part), expected)

    def _records(self) -> dict[str, dict[str, str] | None]:
        """The files that are given, by what identifies them."""
        records: dict[str, dict[str, str] | None] = {"calibration": None, "evaluation": None}
        for part in records:
            if (path := self._path(part)) is not None:
                file = Path(path).expanduser()
                records[part] = {"file": str(file), "sha256": sha256(file)}
        return records


@dataclass(frozen=True)
class Text(_Files, Drawn):
    """Plain text.

    Each file is read as UTF-8, unchanged, and tokenised whole, without special tokens. Calibration: `samples` windows
    of `length` tokens, at uniformly random starts or the first consecutive ones. Evaluation: consecutive windows of the
    whole file; a partial one at the end is dropped. `bos`: each window is the beginning-of-sequence token and one token
    of text less.
    """

    contiguous: ClassVar[bool] = True

    def check(self, calibration: bool = True, evaluation: bool = True) -> None:
        for part, needed in (("calibration", calibration), ("evaluation", evaluation)):
            if needed:
                text_of(self._file(part, TEXT), self.key(part), TEXT)

    def calibration(self, tokenizer: Any) -> Tensor:
        drawn, bos = (self.samples, self.length, self.seed, self.sampling), begin_with(tokenizer, self.bos)
        return _text_windows(self._state("calibration"), tokenizer, drawn, self.key("calibration"), bos)

    def evaluation(self, tokenizer: Any, length: int | None) -> Tensor:
        width, key = length or self.length, self.key("evaluation")
        return _text_windows(self._state("evaluation"), tokenizer, width, key, begin_with(tokenizer, self.bos))

    def description(self) -> Mapping[str, Any]:
        return {"kind": "text", **self._records(), "special_tokens": False, **self.drawing()}

    def _state(self, part: str) -> FileState:
        return file_state(self._file(part, TEXT))


@lru_cache(maxsize=8)
def _text_windows(
    state: FileState, tokenizer: Any, wanted: int | tuple[int, int, int, Sampling], key: str, bos: int | None
) -> Tensor:
    """Windows [N, T] of a text file: all that are `wanted` tokens wide, or drawn (samples, length, seed, sampling)."""
    stream_M = encode(tokenizer, text_of(Path(state[0]), key, TEXT), special_tokens=False)
    if isinstance(wanted, int):
        return windows_of(stream_M, wanted, bos, lambda text_M, width: cut(text_M, width, key))
    samples, length, seed, sampling = wanted
    return windows_of(stream_M, length, bos, lambda text_M, width: draw(text_M, samples, width, seed, sampling, key))


@dataclass(frozen=True)
class Tokens(_Files):
    """Token windows from `.npy` files, int [N, T]: all of them, exactly as they are, in order. Needs no tokenizer.

    Evaluation windows that are wider than the `length` asked for are cut, row by row, into consecutive windows of that
    length (a partial one at a row's end is dropped). `length` is that default; None: as wide as the file's.
    """

    length: int | None

    contiguous: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_name(self.name)
        require_least(self, 2, "length", besides=", or null")

    def check(self, calibration: bool = True, evaluation: bool = True) -> None:
        if calibration:
            self._load("calibration")
        if evaluation:
            self.evaluation(None, self.length)

    def calibration(self, tokenizer: Any) -> Tensor:
        return self._load("calibration")

    def evaluation(self, tokenizer: Any, length: int | None) -> Tensor:
        windows_NT = self._load("evaluation")
        length = length or self.length or windows_NT.shape[1]
        if windows_NT.shape[1] < length:
            windows = f"its windows are {windows_NT.shape[1]} tokens wide"
            raise ConfigError(f"{self.key('evaluation')}: {windows}; expected at least the evaluation length, {length}")
        return torch.cat([cut(row_T, length, self.key("evaluation")) for row_T in windows_NT])

    def description(self) -> Mapping[str, Any]:
        return {"kind": "tokens", **self._records(), "sampling": "all windows, in order"}

    def _load(self, part: str) -> Tensor:
        file = self._file(part, NPY)
        try:
            array = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, OSError):
            array = None
        problem = _problem(array)
        if problem or not isinstance(array, np.ndarray):
            raise ConfigError(f"{self.key(part)}: {problem}; expected {NPY}")
        return torch.from_numpy(array.astype(np.int64))


def _problem(array: Any) -> str | None:
    if not isinstance(array, np.ndarray):  # pickled objects, an .npz archive, or no numpy file at all
        return "not a plain .npy array"
    if not np.issubdtype(array.dtype, np.integer):
        return f"its values are {array.dtype}"
    if array.ndim != 2:
        return f"its shape is {list(array.shape)}"
    if array.size == 0:
        return f"it is empty, {list(array.shape)}"
    if array.shape[1] < 2:
        return "its windows are 1 token wide, which predicts nothing"
    if array.min() < 0:
        window, position = np.argwhere(array < 0)[0].tolist()
        return f"token id {array[window, position]} at window {window}, position {position} is negative"
    return None

"""Documents, one row each, as windows: what data sets of the hub and files of documents have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from pruneexp.dataset.windows import Drawn, begin_with, cut, draw, encode, windows_of
from pruneexp.types import ConfigError, require_least


@dataclass(frozen=True)
class Rows:
    """Documents in order, had by `read`; equal where the fingerprints are. "": they do not tell whether they are the
    same."""

    fingerprint: str
    read: Callable[[], Sequence[Mapping[str, Any]]] = field(compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class DocumentSource(Drawn, ABC):
    """How documents become windows.

    A document is one row: its `fields`, the empty ones left out, joined by newlines where there are several.

    Calibration: with a `calibration_join`, all documents of the part are joined by it, tokenised whole, and windows are
    drawn from that stream (FLAP, wanda, GPTQ: wikitext2, ptb). With None, each window comes from a document of its own,
    drawn without replacement among those of at least `length` tokens (LLM-Pruner: bookcorpus, c4; wanda's c4 is this
    up to repeated documents): at a random start, or ("consecutive") the first such documents, each from its beginning.
    Evaluation: the documents of the part joined by `evaluation_join`, tokenised whole, consecutive windows, at most
    `evaluation_windows` of them.

    `special_tokens`: the tokenizer adds what it adds to any text (LLaMA's beginning-of-sequence token, once per
    tokenised piece), as the papers' code does. `bos`: that token begins each window, in place of the one that the
    tokenizer adds, and is counted in its length.
    """

    fields: list[str]
    calibration_join: str | None
    evaluation_join: str
    evaluation_windows: int | None
    special_tokens: bool

    contiguous: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.fields:
            raise ConfigError(f"fields={list(self.fields)!r}: expected at least one column of the documents")
        require_least(self, 1, "evaluation_windows", besides=", or null")

    @abstractmethod
    def rows(self, part: str) -> Rows:
        """The documents of "calibration" or "evaluation"."""

    @abstractmethod
    def key(self, part: str) -> str:
        """The config key of the part and its value, for messages."""

    def calibration(self, tokenizer: Any) -> Tensor:
        return self._windows("calibration", None, tokenizer)

    def evaluation(self, tokenizer: Any, length: int | None) -> Tensor:
        return self._windows("evaluation", length, tokenizer)

    def _windows(self, part: str, length: int | None, tokenizer: Any) -> Tensor:
        """Windows [N, T], made once of documents that are the same; streamed ones do not tell."""
        rows = self.rows(part)
        make = _made if rows.fingerprint else _made.__wrapped__
        return make(self, part, length, tokenizer, rows)


@lru_cache(maxsize=4)
def _made(source: DocumentSource, part: str, length: int | None, tokenizer: Any, documents: Rows) -> Tensor:
    key, bos, rows = source.key(part), begin_with(tokenizer, source.bos), documents.read()

    def encoded(text: str) -> Tensor:
        return encode(tokenizer, text, source.special_tokens)

    def cut_up(text_M: Tensor, width: int) -> Tensor:
        return cut(text_M, width, key)

    def drawn(text_M: Tensor, width: int) -> Tensor:
        return draw(text_M, source.samples, width, source.seed, source.sampling, key)

    if part == "evaluation":
        stream_M = encoded(joined(rows, source.fields, source.evaluation_join))
        return windows_of(stream_M, length or source.length, bos, cut_up)[: source.evaluation_windows]
    if source.calibration_join is None:
        return _document_windows(source, encoded, rows, key, bos)
    return windows_of(encoded(joined(rows, source.fields, source.calibration_join)), source.length, bos, drawn)


def document(row: Mapping[str, Any], fields: Sequence[str]) -> str:
    """One row as text: its non-empty `fields`, a newline between them. Raises ConfigError for a field that is unknown
    or holds no text."""
    missing = [field for field in fields if field not in row]
    if missing:
        raise ConfigError(f"dataset.fields={list(fields)}: no column {missing[0]!r}; expected some of {', '.join(row)}")
    for name in fields:
        if not isinstance(row[name], str | None):
            what = f"{name!r} is no text but of type {type(row[name]).__name__}"
            raise ConfigError(f"dataset.fields={list(fields)}: {what}; expected columns of text")
    return "\n".join(row[field] for field in fields if row[field])


def joined(rows: Sequence[Mapping[str, Any]], fields: Sequence[str], join: str) -> str:
    """All documents in order, empty ones too, as one text."""
    return join.join(document(row, fields) for row in rows)


def _document_windows(
    source: DocumentSource,
    encoded: Callable[[str], Tensor],
    rows: Sequence[Mapping[str, Any]],
    key: str,
    bos: int | None,
) -> Tensor:
    """Windows [N, T], each from a document of its own. `bos`: as `windows_of` takes it."""
    rng, consecutive, windows = torch.Generator().manual_seed(source.seed), source.sampling == "consecutive", []

    def one(text_M: Tensor, width: int) -> Tensor:
        """[1, T]; [0, T] of a document that is too short."""
        starts = len(text_M) - width + 1
        if starts < 1:
            return text_M.new_empty(0, width)
        start = 0 if consecutive else int(torch.randint(starts, (), generator=rng))
        return text_M[None, start : start + width]

    for index in range(len(rows)) if consecutive else torch.randperm(len(rows), generator=rng).tolist():
        windows += windows_of(encoded(document(rows[index], source.fields)), source.length, bos, one)
        if len(windows) == source.samples:
            return torch.stack(windows)
    there = f"{len(windows)} of {len(rows)} documents have {source.length} tokens or more"
    raise ConfigError(f"{key}: {there}; expected at least dataset.samples={source.samples}")

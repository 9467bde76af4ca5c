"""A long text's tokens, a piece at a time: whole, a tokenizer takes 150 times the memory of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

PIECE, OVERLAP = 2**18, 2**13  # characters that are tokenised at once, and twice
DIFFERENT = 16  # tokens, from which on a passage is no repetition


def in_pieces(tokenizer: Any, text: str, options: Mapping[str, Any]) -> np.ndarray | None:
    """Ids [M] of pieces that overlap, as tokens near a cut depend on it, each joined to the next where both have the
    same tokens all along the middle of what they share. A stretch without such a place is read as one longer piece,
    with what is around it. None for a text that has to go whole: a short one, one that is all such a stretch, a
    tokenizer that does not say where its tokens lie. `options`: of the tokenizer's call."""
    if not getattr(tokenizer, "is_fast", False) or len(text) <= 2 * PIECE:
        return None

    def read(start: int, size: int) -> np.ndarray:
        return _read(tokenizer, text[start : start + size], start, options)

    ranked = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    joined, before, last = [], None, 0  # ids; the piece that was joined to, and how many of its tokens stay
    start, size, first, piece = 0, PIECE, 0, read(0, PIECE)  # `first`: of the piece's tokens that stay
    while start + size < len(text):
        for shared in (OVERLAP, PIECE // 4, PIECE // 2):  # at the piece's end or, where no join is there, before it
            begin = start + size - shared
            after = read(begin, PIECE)
            if met := _meeting(piece, after, begin, ranked):
                joined.append(piece[first : met[0], 0])
                before, (last, first), start, size, piece = piece, met, begin, PIECE, after
                break
        else:
            size *= 2
            if start == 0 and size >= len(text):
                return None
            piece = read(start, size)
            if before is not None:  # longer, it may begin with other tokens
                met = _meeting(before, piece, start, ranked)
                if met is None or met[0] != last:
                    return None
                first = met[1]
    return np.concatenate([*joined, piece[first:, 0]])


def _read(tokenizer: Any, text: str, start: int, options: Mapping[str, Any]) -> np.ndarray:
    """The tokens of a piece, int64 [M, 4]: ids, the characters where they begin and end, counted from `start`, the
    words that they are of (what the text was split into before; -1 for special tokens)."""
    encoding = tokenizer(text, return_offsets_mapping=True, **options)
    words_M = [-1 if word is None else word for word in encoding.word_ids()]
    places_M2 = np.asarray(encoding["offset_mapping"], np.int64).reshape(-1, 2) + start
    return np.column_stack([np.asarray(encoding["input_ids"], np.int64), places_M2, np.asarray(words_M, np.int64)])


def _meeting(piece_M4: np.ndarray, after_M4: np.ndarray, begin: int, ranked: bool) -> tuple[int, int] | None:
    """Where a piece goes over into one that begins at the character `begin`: how many of its tokens stay, and the
    first one that stays of the other. None where the middle of what they share has no such place."""
    places = (begin + OVERLAP // 4, begin + 3 * OVERLAP // 4)
    here, there = _between(piece_M4, *places), _between(after_M4, *places)
    at = _join(piece_M4[here], after_M4[there], ranked)
    return None if at is None else (here.start + at, there.start + at)


def _between(piece_M4: np.ndarray, first: int, last: int) -> slice:
    """The tokens that begin at the characters `first` to `last`."""
    inside = np.flatnonzero((piece_M4[:, 1] >= first) & (piece_M4[:, 1] < last))
    return slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)


def _join(here_M4: np.ndarray, there_M4: np.ndarray, ranked: bool) -> int | None:
    """Which of the tokens that two pieces share may be the first one of the second piece; None where none may.

    It is the first that begins a word, as each word is tokenised by itself. In a text that is one word any token may,
    provided that tokens go by ranks (`ranked`: sums of probabilities over a whole text round otherwise) and are no
    repetition, in which what comes at the ends matters far from them.
    """
    if not np.array_equal(here_M4[:, :3], there_M4[:, :3]):
        return None
    begun, begun_there = (np.flatnonzero(np.diff(part[:, 3])) for part in (here_M4, there_M4))
    if not np.array_equal(begun, begun_there):
        return None
    if len(begun):
        return int(begun[0]) + 1
    return 0 if ranked and len(np.unique(here_M4[:, 0])) >= DIFFERENT else None

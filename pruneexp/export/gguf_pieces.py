"""SentencePiece's BPE (LLaMA 1 and 2, Mistral, Phi-3) as llama.cpp reads it: pieces with scores, the best first."""

from __future__ import annotations

from typing import Any

SPACE = "\u2581"


def space_prefix(spec: dict[str, Any]) -> bool | None:
    """Whether a text gets a space in front; None where the tokenizer does anything else with spaces than SentencePiece
    does, or is no BPE of pieces with bytes for what is unknown."""
    model = spec["model"]
    plain = ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "ignore_merges")
    if model.get("type") != "BPE" or not model.get("byte_fallback") or any(model.get(name) for name in plain):
        return None
    normalizer = spec.get("normalizer") or {"type": "Sequence", "normalizers": []}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    split = spec.get("pre_tokenizer")
    if split is None:
        if steps == [{"type": "Prepend", "prepend": SPACE}, replace]:
            return True
        return False if steps == [replace] else None
    if steps or split.get("type") != "Metaspace" or split.get("replacement") != SPACE or split.get("split", True):
        return None
    return split.get("prepend_scheme", "always") != "never"


def piece_scores(spec: dict[str, Any]) -> dict[str, float] | None:
    """A score for every piece, higher for what is joined earlier; None where the merges say more than scores can.

    Scores say which neighbours are joined first by what they make; merges by the pair. Both give the same tokens where
    every pair that makes a piece is a merge, and the merges that make one piece follow each other.
    """
    vocab = spec["model"]["vocab"]
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in spec["model"]["merges"]]
    made = [first + second for first, second in pairs]
    order = {piece: place for place, piece in enumerate(dict.fromkeys(made))}
    places = [order[piece] for piece in made]
    if places != sorted(places):
        return None
    known, added = set(pairs), {token["content"] for token in spec.get("added_tokens", ())}
    for piece in vocab:
        if piece in added or is_byte(piece):
            continue
        for cut in range(1, len(piece)):
            first, second = piece[:cut], piece[cut:]
            if first in vocab and second in vocab and (first, second) not in known:
                return None
    return {piece: -float(order.get(piece, len(order))) for piece in vocab}


def is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")

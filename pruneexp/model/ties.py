"""Whether a model's head is its embedding: what the checkpoint's files hold goes before what its config says."""

from __future__ import annotations

from typing import Any

from pruneexp.model.checkpoint import Checkpoint
from pruneexp.model.checks import FLOATS


def settle_ties_(model_class: Any, config: Any, checkpoint: Checkpoint) -> str | None:
    """Makes `tie_word_embeddings` of a config say what the files hold, as transformers loads them. Head and embedding
    are one where both hold the same numbers, or only one of them is there. Returns the name of a head that is not the
    embedding although the config says so."""
    if not config.tie_word_embeddings:
        return None
    for head, embedding in (model_class._tied_weights_keys or {}).items():
        if head in checkpoint and embedding not in checkpoint:
            checkpoint.stored_as = ((embedding, head), *checkpoint.stored_as)
        elif head in checkpoint and not _equal(checkpoint, head, embedding):
            config.tie_word_embeddings = False
            return head
    return None


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether both hold the same numbers; compared piece by piece, up to the first difference."""
    if checkpoint.shape(one) != checkpoint.shape(other):
        return False
    if not {checkpoint.dtype(one), checkpoint.dtype(other)} <= {*FLOATS}:
        return True  # quantised: refused for that
    pairs = zip(checkpoint.pieces(one), checkpoint.pieces(other), strict=True)
    return all(bool((piece.double() == twin.double()).all()) for piece, twin in pairs)

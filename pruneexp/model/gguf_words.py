"""How byte-level BPE tokenizers split text into words, by llama.cpp's names, which GGUF files carry."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("pruneexp")

_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # the pattern that splits text into words -> llama.cpp's name of it, whether whole words skip the merges
    "byte_level": ("gpt-2", False),
    "digits": ("smollm", False),
    _CASELESS + r"\p{N}{1,3}" + _REST: ("llama-bpe", True),
    _CASELESS + r"\p{N}" + _REST: ("qwen2", False),
}
ALIASES = {"gpt2": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}


def restore_split_(tokenizer: Any, name: str, path: str) -> None:
    """Makes a byte-level BPE tokenizer, read from a GGUF file by transformers, split words as the file says, which
    transformers passes over. Warns where the name is not among `SPLITS`."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    known = {own: (pattern, whole_words) for pattern, (own, whole_words) in SPLITS.items()}
    pattern, whole_words = known.get(ALIASES.get(name, name), ("", False))
    if not pattern:
        logger.warning(
            "model.path=%r: it splits words as %r, which is read as GPT-2's way: tokens may differ", path, name
        )
        return
    backend = tokenizer.backend_tokenizer
    backend.model.ignore_merges = whole_words
    if pattern == "byte_level":
        backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    elif pattern == "digits":
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    else:
        words = Split(Regex(pattern), behavior="isolated")
        backend.pre_tokenizer = Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])

"""A tokenizer as llama.cpp reads it: byte-level BPE, whose words are split by one of the patterns that it knows, or
SentencePiece's BPE (LLaMA 1 and 2, Mistral, Phi-3), pieces with scores, the best first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pruneexp.model.gguf_words import SPLITS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
SPACE = "\u2581"


@dataclass(frozen=True)
class Vocabulary:
    """What goes into the file. `tokens` is empty where llama.cpp has no such tokenizer: the file has none then."""

    tokens: tuple[str, ...] = ()
    types: tuple[int, ...] = ()
    merges: tuple[str, ...] = ()  # of byte-level BPE
    split: str = ""
    scores: tuple[float, ...] = ()  # of pieces
    space_prefix: bool = False
    special: dict[str, int] = field(default_factory=dict)  # bos, eos, eot, eom, unk, pad -> token
    begins: bool = False  # a text is tokenised with the beginning-of-sequence token in front
    ends: bool = False
    chat_template: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def plain(self) -> int:
        """A token that stands for ASCII text."""
        words = enumerate(zip(self.tokens, self.types, strict=True))
        return next((token for token, (word, kind) in words if kind == NORMAL and word.isascii()), 0)

    def add_to(self, writer: Any) -> None:
        if not self.tokens:
            writer.add_tokenizer_model("none")
            return
        writer.add_tokenizer_model("llama" if self.scores else "gpt2")
        writer.add_tokenizer_pre(self.split or "default")
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.merges:
            writer.add_token_merges(list(self.merges))
        if self.scores:
            writer.add_token_scores(list(self.scores))
            writer.add_add_space_prefix(self.space_prefix)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.begins)
        writer.add_add_eos_token(self.ends)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary(tokenizer: Any, vocab_size: int, stops: Sequence[int] = ()) -> Vocabulary:
    """The vocabulary of a tokenizer of transformers (None: there is none), padded with unused tokens to the model's
    size. `stops`: the tokens that end a text, as the model's generation settings name them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec: dict[str, Any] = {"model": {}} if backend is None else json.loads(backend.to_str())
    split = _split_name(spec)
    scores = None if split or _space_prefix(spec) is None else _piece_scores(spec)
    if reason := _unreadable(tokenizer, vocab_size, bool(split or scores)):
        return Vocabulary(notes=(f"the file has no tokenizer, only tokens go in and out: {reason}",))
    added = {token["id"]: token for token in spec.get("added_tokens", ())}
    words = {token: word for word, token in spec["model"]["vocab"].items()}
    words |= {token: own["content"] for token, own in added.items()}
    pairs = spec["model"]["merges"] if split else ()
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    text = tokenizer("a").input_ids
    begins = len(text) > 1 and text[0] == special["bos"]
    ends = len(text) > 1 and text[-1] == special["eos"]
    special, notes = _with_stops(special, [token for token in stops if token < vocab_size], ends)
    return Vocabulary(
        tokens=tuple(words.get(token, f"[PAD{token}]") for token in range(vocab_size)),
        types=tuple(_type(token, words, added, spec["model"].get("unk_token")) for token in range(vocab_size)),
        merges=tuple(pair if isinstance(pair, str) else " ".join(pair) for pair in pairs),
        split=split or "",
        scores=tuple(scores.get(words.get(token, ""), 0.0) for token in range(vocab_size)) if scores else (),
        space_prefix=bool(_space_prefix(spec)),
        special={name: token for name, token in special.items() if token is not None and token < vocab_size},
        begins=begins,
        ends=ends,
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
        notes=notes,
    )


def stand_in(vocab_size: int) -> Vocabulary:
    """Made-up words, for software that runs no file without any."""
    tokens = tuple(f"<{token}>" for token in range(vocab_size))
    return Vocabulary(tokens, (NORMAL,) * vocab_size, scores=(0.0,) * vocab_size)


def _with_stops(
    special: dict[str, int | None], stops: Sequence[int], ends: bool
) -> tuple[dict[str, int | None], tuple[str, ...]]:
    """Special tokens with those that end a text: the file has room for three, at each of which llama.cpp stops. The
    tokenizer's own eos comes first where it is one of them, or is put behind every text."""
    if not stops:
        return special, ()
    own = special["eos"]
    first = own if own is not None and (own in stops or ends) else stops[0]
    places = ("eos", "eot", "eom")
    ordered = list(dict.fromkeys((first, *stops)))
    left = ordered[len(places) :]
    note = (
        f"llama.cpp is not told to stop at {', '.join(map(str, left))}: the file has room for {len(places)} stop tokens"
    )
    return special | dict(zip(places, ordered, strict=False)), (note,) if left else ()


def _type(token: int, words: dict[int, str], added: dict[int, Any], unknown: str | None) -> int:
    if token not in words:
        return UNUSED
    if words[token] == unknown and token in added:
        return UNKNOWN
    if token in added:
        return CONTROL if added[token]["special"] else USER_DEFINED
    return BYTE if _is_byte(words[token]) else NORMAL


def _unreadable(tokenizer: Any, vocab_size: int, known: bool) -> str:
    """Why llama.cpp cannot read the tokenizer; "" where it can. `known`: it is of a kind that llama.cpp has."""
    if tokenizer is None:
        return "the checkpoint has none"
    if not known:
        return f"{type(tokenizer).__name__} is no BPE, of bytes or of pieces, that llama.cpp knows"
    if len(tokenizer) > vocab_size:
        return f"its {len(tokenizer)} tokens are more than the model's {vocab_size}"
    return ""


def _split_name(spec: dict[str, Any]) -> str | None:
    """llama.cpp's name of how the tokenizer splits text into words; None where it has none."""
    model = spec["model"]
    plain = ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "byte_fallback")
    if model.get("type") != "BPE" or any(model.get(name) for name in plain):
        return None
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp composes no characters; nearly all text is composed already
        return None
    steps = spec.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    kinds = [step["type"] for step in steps[:-1]]
    pattern = None
    if last.get("use_regex", True):
        if not kinds:
            pattern = "byte_level"
        elif kinds == ["Digits"] and steps[0].get("individual_digits"):
            pattern = "digits"
    elif kinds == ["Split"] and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
        pattern = steps[0]["pattern"].get("Regex")
    name, whole_words = SPLITS.get(pattern or "", (None, False))
    return name if bool(model.get("ignore_merges")) == whole_words else None


def _space_prefix(spec: dict[str, Any]) -> bool | None:
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


def _piece_scores(spec: dict[str, Any]) -> dict[str, float] | None:
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
        if piece in added or _is_byte(piece):
            continue
        for cut in range(1, len(piece)):
            first, second = piece[:cut], piece[cut:]
            if first in vocab and second in vocab and (first, second) not in known:
                return None
    return {piece: -float(order.get(piece, len(order))) for piece in vocab}


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")

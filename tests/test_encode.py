"""A long text is tokenised in pieces, and nobody can tell from its tokens."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pruneexp
from pruneexp.dataset import pieces
from pruneexp.dataset.windows import encode
from tests.cases import each

WORDS = [
    *"the of a story Fox's jumped 1,234.5 über naïve don't www.example.org/x?y=1".split(),
    *["日本語の文章", "слово", "\U0001f642", "\U0001f469\u200d\U0001f467", "e\u0301", "\u200b"],
]
PIECE, OVERLAP = 2048, 512


def prose(seed: int, length: int = 20_000) -> str:
    """Words in several scripts, and what is hard to cut: runs of spaces and newlines, words without end, a special
    token that is written out."""
    rng, parts, written = random.Random(seed), [], 0
    while written < length:
        kind = rng.random()
        if kind < 0.95:
            parts.append(rng.choice(WORDS) + rng.choice([" ", " ", " ", ", ", ".\n", "  ", "\t", ""]))
        elif kind < 0.97:
            parts.append(rng.choice(["\n", " ", "\r\n", "-", "=", "\u3000"]) * rng.randint(2, 60))
        elif kind < 0.99:
            parts.append("".join(rng.choices("abcdefghiäß漢字", k=rng.randint(20, 90))))
        else:
            parts.append("</s>")
        written += len(parts[-1])
    return "".join(parts)


def trained(model: Any, trainer: Any, **parts: Any) -> Any:
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.train_from_iterator([prose(seed) for seed in range(100, 103)], trainer)
    first, last = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    ends = [("<s>", first), ("</s>", last)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> Any:
    """GPT-2's way."""
    from tokenizers import models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return trained(models.BPE(), trainer, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False))


def one_word() -> Any:
    """LLaMA's way: spaces are letters, a text is one word that begins with a space."""
    from tokenizers import models, normalizers, trainers

    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False, max_token_length=16)
    return trained(models.BPE(unk_token="<unk>", fuse_unk=True), trainer, normalizer=spaces)


def unigram() -> Any:
    """SentencePiece's unigrams, behind a normaliser that changes the text's length."""
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    parts = {"normalizer": normalizers.NFKC(), "pre_tokenizer": pre_tokenizers.Metaspace()}
    return trained(models.Unigram(), trainer, **parts)


def embedded() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(pruneexp.__file__).parent / "embedded" / "llama")


@cache
def made(maker: Callable[[], Any]) -> Any:
    return maker()


class Watched:
    """A tokenizer, and the longest text that it was given."""

    is_fast = True

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.longest, self.backend_tokenizer = tokenizer, 0, tokenizer.backend_tokenizer

    def __call__(self, text: str, **options: Any) -> Any:
        self.longest = max(self.longest, len(text))
        return self.tokenizer(text, **options)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", PIECE)
    monkeypatch.setattr(pieces, "OVERLAP", OVERLAP)


@pytest.mark.slow
@each("special, maker", itertools.product([False, True], [byte_level, one_word, unigram, embedded]))
def test_pieces_give_the_tokens_of_the_whole(maker: Callable[[], Any], special: bool) -> None:
    tokenizer = made(maker)
    for seed in range(4):
        text, watched = prose(seed), Watched(tokenizer)
        whole = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        assert encode(watched, text, special).tolist() == whole
        assert watched.longest == PIECE


@pytest.mark.slow
@each(
    "maker, text",
    itertools.product(
        [byte_level, one_word, unigram],
        ["a" * 20_000, "\n" * 20_001, "ab" * 9_999 + "c", "x" + " " * 20_000 + "x", "🙂" * 9_000],
    ),
)
def test_a_text_that_cannot_be_cut_is_still_tokenised_right(maker: Callable[[], Any], text: str) -> None:
    tokenizer = made(maker)
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert encode(tokenizer, text, False).tolist() == whole


@pytest.mark.slow
@pytest.mark.parametrize("maker", [byte_level, unigram])
@pytest.mark.parametrize("start", [0, 30_000])
def test_a_stretch_that_cannot_be_cut_is_read_as_one(maker: Callable[[], Any], start: int) -> None:
    text = prose(0, start + 1)[:start] + "=" * 5 * PIECE + prose(1, 60_000)
    watched = Watched(made(maker))
    whole = watched.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert encode(watched, text, False).tolist() == whole
    assert PIECE < watched.longest <= 16 * PIECE < len(text) // 2


def test_pieces_that_disagree_are_not_joined() -> None:
    """A tokenizer whose tokens depend on all the text before them."""

    class Counted(dict):
        def word_ids(self) -> list[int]:
            return self["input_ids"]

    class Counting:
        is_fast, backend_tokenizer = True, SimpleNamespace(model=None)

        def __call__(self, text: str, **options: Any) -> Counted:
            every = range(len(text))
            return Counted(input_ids=list(every), offset_mapping=[(index, index + 1) for index in every])

    assert torch.equal(encode(Counting(), "a" * 10_000, False), torch.arange(10_000))

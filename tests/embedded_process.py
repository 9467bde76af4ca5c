"""The embedded language's exact information word by word and token by token, and how well a causal language model knows
it. Nats are -ln p of the true process, given everything before."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pruneexp.embedded import lexicon
from pruneexp.embedded.language import Question, Telling, piece, pieces, tellings, texts


@dataclass(frozen=True)
class Story:
    text: str  # ends with the newline that is the last word
    words: tuple[str, ...]
    nats: tuple[float, ...]  # -ln p(word | all words before it in the story)
    kinds: tuple[str, ...]  # what decides each word: fixed, choice, recall, agreement, count


def stories(seed: int) -> Iterator[Story]:
    """An endless stream of independent stories, those of `texts`."""
    for telling in tellings(seed):
        yield Story(
            text="".join(pieces(telling)),
            words=tuple(word for _, word in telling),
            nats=tuple(information(step.probs[word]) for step, word in telling),
            kinds=tuple(step.kind for step, _ in telling),
        )


def text(seed: int, stories: int) -> str:
    """That many stories, each closed by a newline."""
    return "".join(itertools.islice(texts(seed), stories))


def split(text: str) -> list[str]:
    """The words of a text, newline and punctuation included; the inverse of joining the pieces."""
    for mark in (".", ",", lexicon.END):
        text = text.replace(mark, f" {mark} ")
    return [word for word in text.split(" ") if word]


def information(p: float) -> float:
    return -math.log(p) + 0.0  # no minus zero


class _Coder:
    """Word to token ids and token nats, for any tokenizer that never joins two words in one token."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, tuple[int, ...]] = {}

    def ids(self, chunk: str) -> tuple[int, ...]:
        if chunk not in self._ids:
            self._ids[chunk] = tuple(self._tokenizer.encode(chunk, add_special_tokens=False))
        return self._ids[chunk]

    def _nats(self, probs: Mapping[str, float], word: str, first: bool) -> list[float]:
        """-ln p of each of the word's tokens, and last what only the token after the word reveals.

        A token's p is the mass of the words still possible after it, over the mass before it. What is left:
        the word may begin longer ones.
        """
        ids = self.ids(piece(word, first))
        if len(probs) == 1:
            return [0.0] * (len(ids) + 1)
        spelled = [(self.ids(piece(other, first)), p) for other, p in probs.items()]
        if all(len(other) == 1 for other, _ in spelled):
            return [information(probs[word]), 0.0]
        mass = [sum(p for other, p in spelled if other[:n] == ids[:n]) for n in range(len(ids) + 1)]
        return [information(b / a) for a, b in itertools.pairwise([*mass, probs[word]])]

    def check(self, first: Telling, second: Telling) -> None:
        """Word by word must be the tokenizer's own way with a text, also where a story follows a story."""
        for words in (pieces(first)[:40], pieces(first)[-40:] + pieces(second)[:40]):
            whole = list(self._tokenizer.encode("".join(words), add_special_tokens=False))
            if whole != [token for word in words for token in self.ids(word)]:
                raise ValueError("this tokenizer joins or changes words: its tokens have no exact nats")

    def story(self, telling: Telling) -> tuple[list[int], list[float]]:
        tokens: list[int] = []
        nats: list[float] = []
        carried = 0.0
        for i, (step, word) in enumerate(telling):
            tokens += self.ids(piece(word, i == 0))
            head, *tail, rest = self._nats(step.probs, word, i == 0)
            nats += [head + carried, *tail]
            carried = rest
        return tokens, nats


def windows(tokenizer: Any, seed: int, samples: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token windows int64 [N, T] and each token's nats float64 [N, T].

    Every window begins at a story's beginning; further stories follow where the story is shorter than the
    window. Any tokenizer will do that never joins two words in one token.
    """
    coder, source = _Coder(tokenizer), tellings(seed)
    coder.check(*itertools.islice(tellings(seed), 2))
    tokens, nats = np.zeros((samples, length), np.int64), np.zeros((samples, length))
    for row in range(samples):
        ids: list[int] = []
        own_nats: list[float] = []
        while len(ids) < length:
            more_ids, more_nats = coder.story(next(source))
            ids, own_nats = ids + more_ids, own_nats + more_nats
        tokens[row], nats[row] = ids[:length], own_nats[:length]
    return tokens, nats


@torch.no_grad()
def token_nats(model: Any, tokens: np.ndarray, batch: int = 16) -> np.ndarray:
    """The model's -ln p of every token but each window's first: float64 [N, T-1]."""
    losses = []
    for chunk in torch.from_numpy(tokens).split(batch):
        logits = model(chunk).logits[:, :-1].double()
        losses.append(F.cross_entropy(logits.transpose(1, 2), chunk[:, 1:], reduction="none"))
    return torch.cat(losses).numpy()


def perplexity(model: Any, tokens: np.ndarray) -> float:
    """exp(mean nats) over all predicted tokens; a window's first token is not predicted."""
    return math.exp(token_nats(model, tokens).mean())


def best_perplexity(nats: np.ndarray) -> float:
    """The same of the true process, from its nats [N, T]: no model does better in the long run."""
    return math.exp(nats[:, 1:].mean())


@torch.no_grad()
def chosen(model: Any, tokenizer: Any, question: Question) -> int:
    """The choice with the highest log-likelihood after the context."""
    start = len(tokenizer.encode(question.context, add_special_tokens=False))
    texts = [f"{question.context} {choice}" for choice in question.choices]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    tokens = torch.tensor(rows)
    logprobs = model(tokens).logits[:, start - 1 : -1].double().log_softmax(-1)
    return int(logprobs.gather(2, tokens[:, start:, None]).sum((1, 2)).argmax())


def accuracy(model: Any, tokenizer: Any, questions: Sequence[Question]) -> float:
    """The share answered right; chance is 0.25."""
    return sum(chosen(model, tokenizer, question) == question.answer for question in questions) / len(questions)

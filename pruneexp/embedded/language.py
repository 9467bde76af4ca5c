"""Text in the embedded language: stories, token windows with their exact information, and questions.

Seeds are split so that nothing evaluated was ever trained or calibrated on: `TRAINING`, `CALIBRATION` and `EVALUATION`
are disjoint ranges, one random stream per seed. Nats are -ln p of the true process, given everything before.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pruneexp.embedded import grammar, lexicon
from pruneexp.embedded.grammar import Step

TRAINING = range(0, 1_000_000)
CALIBRATION = range(1_000_000, 2_000_000)
EVALUATION = range(2_000_000, 3_000_000)


@dataclass(frozen=True)
class Story:
    text: str  # ends with the newline that is the last word
    words: tuple[str, ...]
    nats: tuple[float, ...]  # -ln p(word | all words before it in the story)
    kinds: tuple[str, ...]  # what decides each word: fixed, choice, recall, agreement, count


@dataclass(frozen=True)
class Question:
    """A story broken off where the next words are certain; the sentence is `context + " " + choice`."""

    context: str
    choices: tuple[str, str, str, str]
    answer: int
    kind: str


class Process:
    """The language word by word: `step.probs` is the next word's distribution; `advance` moves past a word."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._telling = grammar.Story().tell()
        self.step: Step = next(self._telling)

    def advance(self, word: str) -> bool:
        """Takes the next word; True where it ended its story (the next story has then begun)."""
        if word not in self.step.probs:
            raise ValueError(f"{word!r} cannot come here; expected one of {sorted(self.step.probs)[:8]}")
        try:
            self.step = self._telling.send(word)
        except StopIteration:
            self._begin()
            return True
        return False


def piece(word: str, first: bool) -> str:
    """The word as it stands in the text: a space before it, unless it is punctuation or opens a story."""
    return word if first or word in (".", ",", lexicon.END) else " " + word


def split(text: str) -> list[str]:
    """The words of a text, newline and punctuation included; the inverse of joining the pieces."""
    for mark in (".", ",", lexicon.END):
        text = text.replace(mark, f" {mark} ")
    return [word for word in text.split(" ") if word]


def _draw(probs: Mapping[str, float], uniform: float) -> str:
    word = ""
    for word, p in probs.items():
        uniform -= p
        if uniform < 0:
            break
    return word


def _tellings(seed: int) -> Iterator[list[tuple[Step, str]]]:
    if seed < 0:
        raise ValueError(f"seed={seed}: expected 0 or more")
    uniform = random.Random(seed).random  # its stream is the same in every Python version
    process = Process()
    while True:
        told: list[tuple[Step, str]] = []
        ended = False
        while not ended:
            step = process.step
            word = _draw(step.probs, uniform())
            told.append((step, word))
            ended = process.advance(word)
        yield told


def stories(seed: int) -> Iterator[Story]:
    """An endless stream of independent stories."""
    for told in _tellings(seed):
        words = tuple(word for _, word in told)
        yield Story(
            text="".join(piece(word, i == 0) for i, word in enumerate(words)),
            words=words,
            nats=tuple(-math.log(step.probs[word]) for step, word in told),
            kinds=tuple(step.kind for step, _ in told),
        )


def text(seed: int, stories: int) -> str:
    """That many stories, each closed by a newline."""
    source = _tellings(seed)
    return "".join(piece(word, i == 0) for _ in range(stories) for i, (_, word) in enumerate(next(source)))


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
        """-ln of each token's conditional probability: p(words that begin so far) / p(words that began before)."""
        ids = self.ids(piece(word, first))
        if len(ids) == 1:
            return [-math.log(probs[word])]
        spelled = [(self.ids(piece(other, first)), p) for other, p in probs.items()]
        mass = [sum(p for other, p in spelled if other[:n] == ids[:n]) for n in range(len(ids) + 1)]
        return [math.log(mass[n] / mass[n + 1]) for n in range(len(ids))]

    def story(self, told: list[tuple[Step, str]]) -> tuple[list[int], list[float]]:
        tokens: list[int] = []
        nats: list[float] = []
        for i, (step, word) in enumerate(told):
            tokens += self.ids(piece(word, i == 0))
            nats += self._nats(step.probs, word, i == 0)
        return tokens, nats


def windows(tokenizer: Any, seed: int, samples: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token windows int64 [N, T] and each token's nats float64 [N, T].

    Every window begins at a story's beginning; further stories follow where the story is shorter than the window.
    """
    coder, source = _Coder(tokenizer), _tellings(seed)
    tokens, nats = np.zeros((samples, length), np.int64), np.zeros((samples, length))
    for row in range(samples):
        ids: list[int] = []
        information: list[float] = []
        texts = ""
        while len(ids) < length:
            told = next(source)
            more_ids, more_nats = coder.story(told)
            ids, information = ids + more_ids, information + more_nats
            texts += "".join(piece(word, i == 0) for i, (_, word) in enumerate(told)) if row == 0 else ""
        if row == 0 and list(tokenizer.encode(texts, add_special_tokens=False)) != ids:
            raise ValueError("this tokenizer joins or changes words: its tokens have no exact nats; use text()")
        tokens[row], nats[row] = ids[:length], information[:length]
    return tokens, nats


KINDS = ("place", "owner", "colour", "thing", "object", "visit", "count", "agreement", "pronoun")


def _questions_in(told: list[tuple[Step, str]], kind: str, limit: int) -> Iterator[int]:
    """Where the story, within its first `limit` words, gives the answer to a question of that kind."""
    for i, (step, word) in enumerate(told[:limit]):
        if step.ask and step.ask.kind == kind and step.ask.answer.split(" ")[0] == word:
            yield i


def questions(seed: int, n: int, limit: int = 200) -> list[Question]:
    """`n` questions, kinds and answer positions in equal shares, at most one a story, contexts of at most `limit` words."""
    source, rng = _tellings(seed), random.Random(f"questions {seed}")
    asked: list[Question] = []
    while len(asked) < n:
        told, kind = next(source), KINDS[len(asked) % len(KINDS)]
        places = list(_questions_in(told, kind, limit))
        if not places:
            continue
        at = places[int(rng.random() * len(places))]
        ask = told[at][0].ask
        assert ask is not None
        wrong = sorted(ask.rivals, key=lambda _: rng.random())[:3]
        answer = (len(asked) // len(KINDS) + len(asked)) % 4
        choices = (*wrong[:answer], ask.answer, *wrong[answer:])
        context = "".join(piece(word, i == 0) for i, (_, word) in enumerate(told[:at]))
        asked.append(Question(context, choices, answer, kind))  # type: ignore[arg-type]
    return asked

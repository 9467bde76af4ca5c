"""Text in the embedded language: stories, and questions about them.

Seeds are split so that nothing evaluated was ever trained or calibrated on: `TRAINING`, `CALIBRATION` and
`EVALUATION` are disjoint ranges, one random stream per seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pruneexp.embedded import grammar, lexicon
from pruneexp.embedded.grammar import Ask, Step

TRAINING = range(0, 1_000_000)
CALIBRATION = range(1_000_000, 2_000_000)
EVALUATION = range(2_000_000, 3_000_000)


@dataclass(frozen=True)
class Question:
    """A story broken off where the next words are certain; the sentence is `context + " " + choice`."""

    context: str
    choices: tuple[str, str, str, str]
    answer: int
    kind: str


class Process:
    """The language word by word: `step.probs` is the next word's distribution, `advance` passes a word."""

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


def _draw(probs: Mapping[str, float], uniform: float) -> str:
    for word, p in probs.items():
        uniform -= p
        if uniform < 0:
            return word
    return list(probs)[-1]  # rounding left the sum a hair below 1


Telling = list[tuple[Step, str]]  # a story: every word, and the distribution it was drawn from


def pieces(telling: Telling) -> list[str]:
    return [piece(word, i == 0) for i, (_, word) in enumerate(telling)]


def _text(telling: Telling) -> str:
    return "".join(pieces(telling))


def tellings(seed: int) -> Iterator[Telling]:
    if seed < 0:
        raise ValueError(f"seed={seed}: expected 0 or more")
    uniform = random.Random(seed).random  # its stream is the same in every Python version
    process = Process()
    while True:
        telling: Telling = []
        ended = False
        while not ended:
            step = process.step
            word = _draw(step.probs, uniform())
            telling.append((step, word))
            ended = process.advance(word)
        yield telling


def texts(seed: int) -> Iterator[str]:
    """An endless stream of independent stories, each closed by a newline."""
    return map(_text, tellings(seed))


KINDS = ("thing", "place", "visit", "object", "owner", "family", "food", "count", "agreement", "pronoun")


def _askable(telling: Telling, kind: str, limit: int) -> Iterator[int]:
    """Where the story, within its first `limit` words, gives the answer to a question of that kind."""
    for i, (step, word) in enumerate(telling[:limit]):
        if step.ask and step.ask.kind == kind and step.ask.answer[0] == word:
            yield i


def _wrong(ask: Ask, rng: random.Random) -> list[str]:
    """Three wrong answers: one from the same story where there is one, and half-right ones of two words."""
    answer = " ".join(ask.answer)
    near = [" ".join(ask.near)] if ask.near else []
    others = [[word for word in words if word not in (*ask.answer, *ask.near)] for words in ask.classes]
    drawn = [sorted(words, key=lambda _: rng.random())[:3] for words in others]
    if len(drawn) == 1:
        return [*near, *drawn[0]][:3]
    (first, second), (a, b) = ask.answer, drawn
    wrong = [*near, f"{first} {b[0]}", f"{a[0]} {second}", f"{a[1]} {b[1]}"][:3]
    assert answer not in wrong
    return wrong


def questions(seed: int, n: int, limit: int = 200) -> list[Question]:
    """`n` questions, kinds and answer positions in equal shares, each from its own story.

    A context has at most `limit` words. All choices have the same number of words, and of tokens.
    """
    source, rng = tellings(seed), random.Random(f"questions {seed}")
    drawn: list[Question] = []
    while len(drawn) < n:
        telling, kind = next(source), KINDS[len(drawn) % len(KINDS)]
        places = list(_askable(telling, kind, limit))
        if not places:
            continue
        at = places[int(rng.random() * len(places))]
        ask = telling[at][0].ask
        assert ask is not None
        wrong = _wrong(ask, rng)
        answer = (len(drawn) // len(KINDS) + len(drawn) % len(KINDS)) % 4
        a, b, c, d = (*wrong[:answer], " ".join(ask.answer), *wrong[answer:])
        drawn.append(Question(_text(telling[:at]), (a, b, c, d), answer, kind))
    return drawn

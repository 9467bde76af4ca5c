"""The embedded language as an explicit random process over words.

A story is a coroutine: it yields the distribution of the next word, is sent the word, and goes on from there.
It hears nothing but the words, so a text determines its state, and with it the exact probability of every
word given all words before it. A story tells of a hero, the hero's object, a place and a friend: what was
said once comes back word for word, pronouns and verbs agree, sums come out right. Only genuine choices have
entropy.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pruneexp.embedded import lexicon as lex

FIRST_WORD = {
    "hero": 0.23, "friend": 0.14, "The": 0.14, "pronoun": 0.25, "Today": 0.09, "Yesterday": 0.09, "end": 0.08,
}  # fmt: skip
DOES = {"visited": 1.5, "wanted": 1.5, "met": 2.0, "liked": 1.5, "felt": 1.5, "had": 1.5}


class Ask(NamedTuple):
    """A question that the story answers at this word: the words that follow, and each one's class.

    `near` are wrong answers that stand in the same story.
    """

    kind: str
    answer: tuple[str, ...]
    classes: tuple[Sequence[str], ...]
    near: tuple[str, ...] = ()


class Step(NamedTuple):
    """The next word's distribution (sums to 1), what decides it, and the questions that can be asked here."""

    probs: Mapping[str, float]
    kind: str  # "fixed" by the frame, "choice", "recall" of a fact, "agreement", "count"
    ask: Ask | None = None


Words = Generator[Step, str, str]  # a coroutine that returns its last word
Clause = Generator[Step, str, None]


@dataclass
class Person:
    name: str
    family: str = ""
    food: str = ""  # once told

    @property
    def full(self) -> tuple[str, str]:
        return self.name, self.family


def _skewed(words: Iterable[str]) -> dict[str, float]:
    """Weights 1 / (rank + 20): no word is rare, and no two are alike."""
    return {word: 1 / (rank + 20) for rank, word in enumerate(words)}


def _normal(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {word: weight / total for word, weight in weights.items()}


_NAMES = [name for pair in zip(lex.WOMEN, lex.MEN, strict=True) for name in pair]
_WEIGHTS = {
    name: _skewed(words)
    for name, words in {
        "names": _NAMES,
        "animals": [name for pair in zip(lex.ANIMALS, lex.HERDS, strict=True) for name in pair],
        "put": lex.PUT, "colours": lex.COLOURS, "objects": lex.OBJECTS, "places": lex.PLACES,
        "families": lex.FAMILIES, "sites": lex.SITES,
        "felt": lex.MOODS, "liked": lex.FOODS, "things": lex.THINGS, "shapes": lex.SHAPES,
        "states": lex.STATES, "looks": lex.LOOKS, "acts": lex.ACTS, "ways": lex.WAYS,
        "start": lex.NUMBERS[1:6], "more": lex.NUMBERS[:3],
    }.items()
}  # fmt: skip
_ANY = {name: Step(_normal(weights), "choice") for name, weights in _WEIGHTS.items()}
_DOES, _BE = Step(_normal(DOES), "choice"), Step({"was": 0.6, "belonged": 0.4}, "choice")
_FIXED: dict[str, Step] = {}


def _fixed(text: str) -> Clause:
    for word in text.split(" "):
        if word not in _FIXED:
            _FIXED[word] = Step({word: 1.0}, "fixed")
        yield _FIXED[word]


def _sure(words: Iterable[str], kind: str, ask: Ask | None = None) -> Clause:
    """Words that the story so far decides; `ask` is the question that stands at the first of them."""
    for word in words:
        yield Step({word: 1.0}, kind, ask)
        ask = None


def _other(name: str, used: str) -> Words:
    """A word of the class, but not that one."""
    weights = {word: weight for word, weight in _WEIGHTS[name].items() if word != used}
    return (yield Step(_normal(weights), "choice"))


class Story:
    """What the words so far have established. `tell()` is the coroutine; nothing but the text drives it."""

    def __init__(self) -> None:
        self.hero = Person("")
        self.friend: Person | None = None
        self.thing = ("", "")  # colour, object
        self.place = ("", "")  # what it is like, place
        self.pronoun = ""  # of the last sentence's subject
        self.concrete = False  # the last sentence's subject is an object: it looks, it does not act

    def tell(self) -> Clause:
        yield from self._opening()
        while True:
            yield from _fixed(".")
            word = yield self._first_word()
            if word == lex.END:
                return
            if word == self.hero.name:
                yield from self._person(self.hero)
            elif self.friend and word == self.friend.name:
                yield from self._person(self.friend)
            elif word == "The":
                yield from self._object()
            elif word in ("Today", "Yesterday"):
                yield from self._animal(word)
            else:
                yield from self._pronoun()

    def _first_word(self) -> Step:
        weights = {word: FIRST_WORD[word] for word in ("The", "Today", "Yesterday")}
        weights[self.hero.name] = FIRST_WORD["hero"]
        weights[self.pronoun] = FIRST_WORD["pronoun"]
        if self.friend:
            weights[self.friend.name] = FIRST_WORD["friend"]
            weights[lex.END] = FIRST_WORD["end"]
        return Step(_normal(weights), "choice", Ask("pronoun", (self.pronoun,), (lex.PRONOUNS,)))

    def _subject(self, pronoun: str, concrete: bool = False) -> None:
        self.pronoun, self.concrete = pronoun, concrete

    def _opening(self) -> Clause:
        """`Mara Reed hid the red key in the dark barn`"""
        self.hero.name = yield _ANY["names"]
        self.hero.family = yield _ANY["families"]
        yield _ANY["put"]
        yield from _fixed("the")
        self.thing = ((yield _ANY["colours"]), (yield _ANY["objects"]))
        yield from _fixed("in the")
        self.place = ((yield _ANY["sites"]), (yield _ANY["places"]))
        self._subject(lex.PRONOUN[self.hero.name])

    def _person(self, person: Person) -> Clause:
        other = self.friend if person is self.hero else self.hero
        near = (other.family,) if other else ()
        yield from _sure([person.family], "recall", Ask("family", (person.family,), (lex.FAMILIES,), near))
        verb = yield _DOES
        self._subject(lex.PRONOUN[person.name])
        if verb == "felt":
            yield _ANY["felt"]
        elif verb == "liked":
            yield from self._food(person, other)
        elif verb == "wanted":
            yield from _fixed("the")
            yield from _sure(self.thing, "recall", Ask("object", self.thing, (lex.COLOURS, lex.OBJECTS)))
            yield _ANY["ways"]
        elif verb == "visited":
            yield from _fixed("the")
            yield from _sure(self.place, "recall", Ask("visit", self.place, (lex.SITES, lex.PLACES)))
            yield _ANY["ways"]
        elif verb == "had":
            yield from self._sum(person)
        else:
            yield from self._meeting(other)

    def _food(self, person: Person, other: Person | None) -> Clause:
        if person.food:
            near = (other.food,) if other and other.food not in ("", person.food) else ()
            yield from _sure([person.food], "recall", Ask("food", (person.food,), (lex.FOODS,), near))
        else:
            person.food = yield _ANY["liked"]

    def _meeting(self, other: Person | None) -> Clause:
        if other:
            yield from _sure(other.full, "recall")
        else:
            name = yield from _other("names", self.hero.name)
            self.friend = Person(name, (yield from _other("families", self.hero.family)))
        yield _ANY["ways"]
        self._subject("They")

    def _sum(self, person: Person) -> Clause:
        """`had three coins and got two more , so she had five coins`"""
        start = yield _ANY["start"]
        thing = yield _ANY["things"]
        yield from _fixed("and got")
        more = yield _ANY["more"]
        yield from _fixed("more , so")
        yield from _sure([lex.PRONOUN[person.name].lower()], "agreement")
        yield from _fixed("had")
        total = lex.NUMBERS[lex.NUMBERS.index(start) + lex.NUMBERS.index(more) + 1]
        yield from _sure([total], "count", Ask("count", (total,), (lex.NUMBERS[1:],)))
        yield from _sure([thing], "recall")

    def _object(self) -> Clause:
        yield from _sure(self.thing, "recall", Ask("thing", self.thing, (lex.COLOURS, lex.OBJECTS)))
        if (yield _BE) == "was":
            yield from _fixed("in the")
            yield from _sure(self.place, "recall", Ask("place", self.place, (lex.SITES, lex.PLACES)))
        else:
            yield from _fixed("to")
            full, near = self.hero.full, self.friend.full if self.friend else ()
            yield from _sure(full, "recall", Ask("owner", full, (_NAMES, lex.FAMILIES), near))
        self._subject("It", concrete=True)

    def _animal(self, day: str) -> Clause:
        """`Today the old dogs near the cow are loud`: the verb agrees with the day and with the far noun."""
        yield from _fixed("the")
        yield _ANY["shapes"]
        many = (yield _ANY["animals"]) in lex.HERDS
        yield from _fixed("near the")
        yield _ANY["animals"]
        verb = lex.VERBS[day, many]
        yield from _sure([verb], "agreement", Ask("agreement", (verb,), (list(lex.VERBS.values()),)))
        yield _ANY["states"]
        self._subject("They" if many else "It")

    def _pronoun(self) -> Clause:
        if self.concrete:
            yield from _fixed("looked")
            yield _ANY["looks"]
        else:
            yield _ANY["acts"]
            yield _ANY["ways"]
            yield from _fixed("and")
            yield _ANY["acts"]
            yield _ANY["ways"]

"""The embedded language as an explicit random process over words.

A story is a coroutine: it yields the distribution of the next word, is sent the word, and goes on from there.
It hears nothing but the words, so a text determines its state, and with it the exact probability of every
word given all words before it. A story introduces four people, each with a coloured object that lies
somewhere, and tells of them: facts come back word for word, pronouns and verbs agree, sums come out right.
Only genuine choices have entropy.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pruneexp.embedded import lexicon as lex

CAST = 4
# weight of "a new person comes in" against everything else, by how many are there already
ARRIVAL = (1.0, 0.6, 0.5, 0.4, 0.0)
FIRST_WORD = {"name": 0.33, "The": 0.27, "pronoun": 0.21, "Today": 0.065, "Yesterday": 0.065, "end": 0.06}
DOES = {"visited": 2.5, "wanted": 2.0, "met": 2.0, "felt": 1.0, "liked": 1.0, "had": 1.5}


class Ask(NamedTuple):
    """A question that the story answers at this word: the phrase that follows, and phrases that must not."""

    kind: str
    answer: str
    rivals: tuple[str, ...]


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
    colour: str = ""
    thing: str = ""
    site: str = ""
    place: str = ""
    food: str = ""  # once told


def _skewed(words: Iterable[str]) -> dict[str, float]:
    """Weights 1 / (rank + 20): no word is rare, and no two are alike."""
    return {word: 1 / (rank + 20) for rank, word in enumerate(words)}


def _normal(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {word: weight / total for word, weight in weights.items()}


_WEIGHTS = {
    name: _skewed(words)
    for name, words in {
        "names": [name for pair in zip(lex.WOMEN, lex.MEN, strict=True) for name in pair],
        "animals": [name for pair in zip(lex.ANIMALS, lex.HERDS, strict=True) for name in pair],
        "put": lex.PUT, "colours": lex.COLOURS, "objects": lex.OBJECTS, "places": lex.PLACES,
        "families": lex.FAMILIES, "sites": lex.SITES,
        "felt": lex.MOODS, "liked": lex.FOODS, "things": lex.THINGS, "shapes": lex.SHAPES,
        "states": lex.STATES, "looks": lex.LOOKS, "acts": lex.ACTS, "ways": lex.WAYS,
        "start": lex.NUMBERS[1:6], "more": lex.NUMBERS[:3],
    }.items()
}  # fmt: skip
_ANY = {name: Step(_normal(weights), "choice") for name, weights in _WEIGHTS.items()}
_FIXED: dict[str, Step] = {}


def _fixed(text: str) -> Words:
    word = ""
    for word in text.split(" "):
        if word not in _FIXED:
            _FIXED[word] = Step({word: 1.0}, "fixed")
        yield _FIXED[word]
    return word


def _sure(text: str, kind: str, ask: str = "", rivals: Iterable[str] = ()) -> Words:
    """Words that the story so far decides; `ask`: the kind of question that stands at the first of them."""
    head, *rest = text.split(" ")
    others = tuple(rival for rival in rivals if rival != text)
    yield Step({head: 1.0}, kind, Ask(ask, text, others) if ask and len(others) >= 3 else None)
    for word in rest:
        yield Step({word: 1.0}, kind)
    return text


def _pick(weights: Mapping[str, float]) -> Words:
    return (yield Step(_normal(weights), "choice"))


def _new(name: str, used: Iterable[str]) -> Words:
    """A word of the class that the story has not used in that role yet."""
    gone = set(used)
    return (yield from _pick({word: weight for word, weight in _WEIGHTS[name].items() if word not in gone}))


class Story:
    """What the words so far have established. `tell()` is the coroutine; nothing but the text drives it."""

    def __init__(self) -> None:
        self.cast: list[Person] = []
        self.pronoun = ""  # of the last sentence's subject
        self.concrete = False  # the last sentence's subject is an object: it looks, it does not act

    def tell(self) -> Clause:
        while True:
            word = yield self._first_word()
            if word == lex.END:
                return
            if word in lex.PRONOUN:
                person = next((p for p in self.cast if p.name == word), None)
                yield from self._person(person) if person else self._arrival(word)
            elif word == "The":
                yield from self._object()
            elif word in ("Today", "Yesterday"):
                yield from self._animal(word)
            else:
                yield from self._pronoun()
            yield from _fixed(".")

    def _first_word(self) -> Step:
        arrival = ARRIVAL[len(self.cast)]
        here = [p.name for p in self.cast]
        new = _normal({word: weight for word, weight in _WEIGHTS["names"].items() if word not in here})
        probs = {name: arrival * p for name, p in new.items()} if arrival else {}
        if arrival < 1:
            weights = {name: FIRST_WORD["name"] / len(here) for name in here}
            weights |= {word: FIRST_WORD[word] for word in ("The", "Today", "Yesterday")}
            weights[self.pronoun] = FIRST_WORD["pronoun"]
            if len(here) == CAST:
                weights[lex.END] = FIRST_WORD["end"]
            probs |= {word: (1 - arrival) * p for word, p in _normal(weights).items()}
        others = tuple(word for word in ("He", "She", "They", "It") if word != self.pronoun)
        return Step(probs, "choice", Ask("pronoun", self.pronoun, others))

    def _subject(self, pronoun: str, concrete: bool = False) -> None:
        self.pronoun, self.concrete = pronoun, concrete

    def _arrival(self, name: str) -> Clause:
        """`Mara Reed hid the red key in the dark barn`: no two people of a story share any of it but the verb."""
        person = Person(name)
        person.family = yield from _new("families", (p.family for p in self.cast))
        yield _ANY["put"]
        yield from _fixed("the")
        person.colour = yield from _new("colours", (p.colour for p in self.cast))
        person.thing = yield from _new("objects", (p.thing for p in self.cast))
        yield from _fixed("in the")
        person.site = yield from _new("sites", (p.site for p in self.cast))
        person.place = yield from _new("places", (p.place for p in self.cast))
        self.cast.append(person)
        self._subject(lex.PRONOUN[name])

    def _person(self, person: Person) -> Clause:
        yield from self._family(person)
        alone = len(self.cast) == 1
        verb = yield from _pick({word: weight for word, weight in DOES.items() if word != "met" or not alone})
        self._subject(lex.PRONOUN[person.name])
        if verb == "felt":
            yield _ANY["felt"]
        elif verb == "liked":
            person.food = (yield from _sure(person.food, "recall")) if person.food else (yield _ANY["liked"])
        elif verb == "wanted":
            yield from _fixed("the")
            things = [f"{p.colour} {p.thing}" for p in self.cast]
            yield from _sure(f"{person.colour} {person.thing}", "recall", "object", things)
        elif verb == "visited":
            yield from _fixed("the")
            site = yield from _pick({p.site: 1.0 for p in self.cast})
            place = next(p.place for p in self.cast if p.site == site)
            yield from _sure(place, "recall", "site", [p.place for p in self.cast])
        elif verb == "had":
            yield from self._sum(person)
        else:
            name = yield from _pick({p.name: 1.0 for p in self.cast if p is not person})
            yield from self._family(next(p for p in self.cast if p.name == name))
            yield _ANY["ways"]
            self._subject("They")

    def _family(self, person: Person) -> Words:
        return (yield from _sure(person.family, "recall", "family", [p.family for p in self.cast]))

    def _sum(self, person: Person) -> Clause:
        """`had three coins and got two more , so she had five coins`"""
        start = yield _ANY["start"]
        thing = yield _ANY["things"]
        yield from _fixed("and got")
        more = yield _ANY["more"]
        yield from _fixed("more , so")
        yield from _sure(lex.PRONOUN[person.name].lower(), "agreement")
        yield from _fixed("had")
        total = lex.NUMBERS.index(start) + lex.NUMBERS.index(more) + 1
        yield from _sure(lex.NUMBERS[total], "count", "count", lex.NUMBERS[max(total - 3, 0) : total + 4])
        yield from _sure(thing, "recall")

    def _object(self) -> Clause:
        word = yield from _pick({p.colour: 4.0 for p in self.cast} | {p.thing: 1.0 for p in self.cast})
        self._subject("It", concrete=True)
        person = next(p for p in self.cast if word in (p.colour, p.thing))
        if word == person.thing:
            yield from _fixed("was")
            yield from _sure(person.colour, "recall", "colour", [p.colour for p in self.cast])
            return
        yield from _sure(person.thing, "recall", "thing", [p.thing for p in self.cast])
        if (yield from _pick({"was": 1.0, "belonged": 1.0})) == "was":
            yield from _fixed("in the")
            places = [f"{p.site} {p.place}" for p in self.cast]
            yield from _sure(f"{person.site} {person.place}", "recall", "place", places)
        else:
            yield from _fixed("to")
            owners = [f"{p.name} {p.family}" for p in self.cast]
            yield from _sure(f"{person.name} {person.family}", "recall", "owner", owners)

    def _animal(self, day: str) -> Clause:
        """`Today the old dogs near the cow are loud`: the verb agrees with the day and with the far noun."""
        yield from _fixed("the")
        yield _ANY["shapes"]
        many = (yield _ANY["animals"]) in lex.HERDS
        yield from _fixed("near the")
        yield _ANY["animals"]
        yield from _sure(lex.VERBS[day, many], "agreement", "agreement", lex.VERBS.values())
        yield _ANY["states"]
        self._subject("They" if many else "It")

    def _pronoun(self) -> Clause:
        if self.concrete:
            yield from _fixed("looked")
            yield _ANY["looks"]
        else:
            yield _ANY["acts"]
            yield _ANY["ways"]

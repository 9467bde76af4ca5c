"""The words of the embedded language, by class. A word belongs to one class, so a text has one reading."""

from __future__ import annotations

from collections.abc import Sequence

WOMEN = "Mara Anna Lucy Nora Emma Rosa Ivy Ella Kate Ruth Jane Lena".split()
MEN = "Omar Tom Ben Sam Jack Paul Luke Max Hugo Carl Adam Finn".split()
PRONOUNS = "He She They It".split()
FAMILIES = "Reed Stone Wood Hall Lake West Ford Hill Bell Cook Page Lane Gray Fox Shaw Dale".split()
PRONOUN = {name: "She" for name in WOMEN} | {name: "He" for name in MEN}

PUT = "put hid left kept dropped lost".split()
COLOURS = "red blue green black white brown pink grey yellow purple golden silver".split()
OBJECTS = (
    "key lamp book ring box cup map drum rope bell knife flute coat ball clock spoon brush kite chain mask "
    "doll bag jar hat"
).split()
PLACES = "barn cellar tower garden kitchen cave forest attic church mill hut stable yard field castle".split()
PLACES += ["school"]
SITES = "dark dusty sunny windy shady empty crowded narrow broad lofty gloomy icy".split()

MOODS = "glad sad angry tired proud afraid calm lonely bored brave shy sick".split()
FOODS = "bread soup rice cheese honey milk cake fish corn jam tea fruit".split()
THINGS = "coins apples eggs nuts shells pears beads cards".split()
NUMBERS: Sequence[str] = "one two three four five six seven eight nine".split()

ANIMALS = "dog cat horse goat cow bird hen pig duck bear frog mouse".split()
HERDS = "dogs cats horses goats cows birds hens pigs ducks bears frogs mice".split()
SHAPES = "old young big small wild tame thin fat lazy quick".split()
STATES = "loud hungry thirsty sleepy wet happy dirty quiet warm cold".split()
LOOKS = "new heavy broken cheap rare pretty plain strange lovely useless".split()
ACTS = "slept smiled waited sang danced walked laughed cried rested ran sat jumped played worked".split()
WAYS = "alone slowly softly again there outside nearby often twice late".split()

VERBS = {
    ("Today", False): "is",
    ("Today", True): "are",
    ("Yesterday", False): "was",
    ("Yesterday", True): "were",
}
END = "\n"

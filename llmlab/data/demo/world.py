"""The world of the demo corpora, as `world.yaml` lists it: people, places, things, and what belongs together."""

from collections import namedtuple
from functools import partial
from typing import NamedTuple

from llmlab.settings.files import read_table

read_grammar = partial(read_table, "llmlab.data.demo")


class Person(NamedTuple):
    """Somebody with a name; the pronouns go with it through a whole story."""

    name: str
    kind: str
    she: str
    her: str  # possessive
    them: str  # object


Place = namedtuple("Place", "to at sight spots")  # two ways to say it, what one sees there, where things get lost
Break = namedtuple("Break", "thing harm tool mending")  # a thing that breaks in its own way, and how it is mended
Animal = namedtuple("Animal", "animal food sound home")
Weather = namedtuple("Weather", "turns effect feels help after")  # weather that spoils a plan, and what helps

WORLD = read_grammar("world")
_GIRLS, _BOYS, _BEASTS = WORLD["girls"], WORLD["boys"], WORLD["beasts"]

PEOPLE = tuple(
    [Person(name, kind, "she", "her", "her") for i, name in enumerate(_GIRLS) for kind in ("girl", _BEASTS[i % 10])]
    + [Person(name, kind, "he", "his", "him") for i, name in enumerate(_BOYS) for kind in ("boy", _BEASTS[-i % 10])]
)
COLORS, NUMBERS = WORLD["colors"], WORLD["numbers"]
PLACES = [Place(**place) for place in WORLD["places"]]
BREAKS = [Break(*row) for row in WORLD["breaks"]]
ANIMALS = [Animal(*row) for row in WORLD["animals"]]
WEATHERS = [Weather(*row) for row in WORLD["weathers"]]

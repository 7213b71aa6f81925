"""Short stories from a grammar: ten plots, each a chain of causes, told about people who keep their names and pronouns.

What happens follows from what was said (the tool fits the harm, sums come out right, the thing is found where the
friend saw it), so a model of a few million parameters has something to learn beyond spelling.  Not literature.
"""

from collections.abc import Callable
from random import Random

from llmlab.data.demo.world import (
    ANIMALS,
    BREAKS,
    COLORS,
    FEARS,
    FRUITS,
    NUMBERS,
    PEOPLE,
    PLACES,
    SIZES,
    TOYS,
    TRADES,
    TRAITS,
    TREATS,
    WARNINGS,
    WEATHERS,
    WISHES,
    Person,
)

VALIDATION_IN = 20  # one cast in so many is told in the validation split only

Facts = dict[str, str]


def tell(random: Random, *, validation: bool) -> str:
    """Returns one story; those of the validation split have a plot, hero and friend that training never combines."""
    plots = len(PLOTS)
    while True:
        number, hero, friend = _below(random, plots), _pick(random, PEOPLE), _pick(random, PEOPLE)
        cast = (number * 2311 + hero.number * 547 + friend.number * 101) % VALIDATION_IN
        if hero.name != friend.name and (cast == 0) is validation:
            break
    choose, steps = PLOTS[number]
    facts = {**_told_of(hero), **{f"friend_{key}": value for key, value in _told_of(friend).items()}}
    facts["trait"] = _pick(random, TRAITS)
    facts.update(choose(random))
    sentences = []
    for chance, alternatives in (*OPENING, *steps, *ENDING):
        if chance == 1 or random.random() < chance:
            sentences.append(_pick(random, alternatives).format_map(facts))
    return " ".join(sentences)


def _told_of(person: Person) -> Facts:
    return {
        "hero": person.name,
        "kind": person.kind,
        "a_kind": _a(person.kind),
        "she": person.she,
        "She": person.she.capitalize(),
        "her": person.her,
        "Her": person.her.capitalize(),
        "them": person.them,
    }


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _below(random: Random, bound: int) -> int:
    return int(random.random() * bound)  # twice as fast as randrange, and as even for small bounds


def _pick(random: Random, choices):  # noqa: ANN001, ANN202
    return choices[int(random.random() * len(choices))]


def _other(random: Random, choices, than):  # noqa: ANN001, ANN202
    while (other := _pick(random, choices)) == than:
        pass
    return other

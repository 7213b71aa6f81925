"""Short stories from a grammar: ten plots, each a chain of causes, told of people who keep their names and pronouns.

What happens follows from what was said (the tool fits the harm, sums come out right, the thing is found where the
friend saw it), so a model of a few million parameters has something to learn beyond spelling.  The words are in
`stories.yaml` and `world.yaml`; here is what follows from what.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar
from zlib import crc32

from llmlab.data.demo import world
from llmlab.data.demo.world import NUMBERS, PEOPLE, WORLD, Person

VALIDATION_IN = 20  # one cast in so many is told in the validation split only

Choice = TypeVar("Choice")
Facts = dict[str, str]
Step = tuple[float, tuple[str, ...]]  # how often it is told, and in which words


def write_row(random: Random, *, validation: bool) -> dict[str, str]:
    """Returns a row with one story."""
    return {"text": tell(random, validation=validation)}


def tell(random: Random, *, validation: bool) -> str:
    """Returns one story; those of the validation split have a plot, hero and friend that training never combines."""
    while True:
        number, hero, friend = int(random.random() * len(PLOTS)), pick(random, PEOPLE), pick(random, PEOPLE)
        cast = crc32(f"{number} {hero.name} {friend.name}".encode())
        if hero.name != friend.name and (cast % VALIDATION_IN == 0) is validation:
            break
    return narrate(random, number, invent(random, number, hero, friend))


def invent(random: Random, number: int, hero: Person, friend: Person) -> Facts:
    """Returns what happens to these two in a plot of this number: the values of every slot of its steps."""
    facts = {**_facts_of(hero, ""), **_facts_of(friend, "friend_"), "trait": pick(random, WORLD["traits"])}
    facts.update(PLOTS[number][0](random, facts))
    return facts


def narrate(random: Random, number: int, facts: Facts) -> str:
    """Returns the story of a plot's facts in words chosen at random; what is always said, is said."""
    steps = (*OPENING, *PLOTS[number][1], *ENDING)
    told = [pick(random, wordings) for chance, wordings in steps if random.random() < chance]
    return " ".join(told).format_map(facts)


def pick(random: Random, choices: Sequence[Choice]) -> Choice:
    return choices[int(random.random() * len(choices))]  # as fair as `choice` for such short lists, and faster


def other(random: Random, choices: Sequence[Choice], than: Choice) -> Choice:
    return pick(random, [choice for choice in choices if choice is not than])


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _facts_of(person: Person, prefix: str) -> Facts:
    name, kind, she, her, them = person
    return {
        f"{prefix}name": name,
        f"{prefix}kind": kind,
        f"{prefix}a_kind": a(kind),
        f"{prefix}she": she,
        f"{prefix}She": she.capitalize(),
        f"{prefix}her": her,
        f"{prefix}Her": her.capitalize(),
        f"{prefix}them": them,
    }


def _read_steps(name: str) -> tuple[Step, ...]:
    """Returns a plot's steps: wordings between bars, behind a `60%` where not always told."""
    steps = []
    for step in _GRAMMAR[name]:
        head, percent, rest = step.replace("{sad}", _GRAMMAR["sad"]).partition("% ")
        chance, words = (int(head) / 100, rest) if percent else (1.0, head)
        steps.append((chance, tuple(words.split(" | "))))
    return tuple(steps)


def lost(random: Random, facts: Facts) -> Facts:
    place = pick(random, world.PLACES)
    spot = pick(random, place.spots)
    return {
        "thing": pick(random, WORLD["toys"]),
        "look": pick(random, pick(random, (world.COLORS, WORLD["sizes"]))),
        "to": place.to,
        "sight": place.sight,
        "spot": spot,
        "elsewhere": other(random, place.spots, spot),
    }


def broken(random: Random, facts: Facts) -> Facts:
    item = pick(random, world.BREAKS)
    wrong = other(random, world.BREAKS, item)
    return {
        "color": pick(random, world.COLORS),
        "thing": item.thing,
        "harm": item.harm,
        "tool": item.tool,
        "mending": item.mending,
        "wrong_tool": wrong.tool,
        "wrong_thing": wrong.thing,
    }


def shared(random: Random, facts: Facts) -> Facts:
    place = pick(random, world.PLACES)
    total = 5 + int(random.random() * 8)
    given = 1 + int(random.random() * (total - 3))
    return {
        "fruit": pick(random, WORLD["fruits"]),
        "to": place.to,
        "at": place.at,
        "sight": place.sight,
        "total": NUMBERS[total],
        "given": NUMBERS[given],
        "left": NUMBERS[total - given],
        "last": NUMBERS[total - given - 1],
    }


def weather(random: Random, facts: Facts) -> Facts:
    change, place = pick(random, world.WEATHERS), pick(random, world.PLACES)
    return {**change._asdict(), "to": place.to, "at": place.at, "sight": place.sight}


def fear(random: Random, facts: Facts) -> Facts:
    what, sight, helped, deed = pick(random, WORLD["fears"])
    return {"what": what, "sight": sight, "Sight": sight.capitalize(), "helped": helped, "deed": deed}


def animal(random: Random, facts: Facts) -> Facts:
    pet, color = pick(random, world.ANIMALS), pick(random, world.COLORS)
    return {
        **pet._asdict(),
        "pet": pet.animal,
        "a_pet": a(pet.animal),
        "A_pet": a(pet.animal).capitalize(),
        "color": color,
        "a_color": a(color),
        "wrong": other(random, world.ANIMALS, pet).food,
    }


def race(random: Random, facts: Facts) -> Facts:
    runners = [{key: facts[prefix + key] for key in ("name", "she", "them")} for prefix in ("", "friend_")]
    quick, steady = runners if random.random() < 0.5 else reversed(runners)
    return {
        "quick": quick["name"],
        "quick_she": quick["she"],
        "quick_them": quick["them"],
        "steady": steady["name"],
        "steady_she": steady["she"],
        "to": pick(random, world.PLACES).to,
        "prize": pick(random, WORLD["treats"]),
    }


def warned(random: Random, facts: Facts) -> Facts:
    deed, did, harm = pick(random, WORLD["warnings"])
    elder, elder_she = pick(random, WORLD["elders"])
    return {"deed": deed, "did": did, "harm": harm, "elder": elder, "Elder_she": elder_she.capitalize()}


def trade(random: Random, facts: Facts) -> Facts:
    start = int(random.random() * (len(WORLD["trades"]) - 1))
    (has, who, why, gets), (_, next_who, next_why, goal) = WORLD["trades"][start : start + 2]
    return {
        "has": has, "who": who, "why": why, "gets": gets, "next_who": next_who, "next_why": next_why, "goal": goal
    }  # fmt: skip


def wish(random: Random, facts: Facts) -> Facts:
    place = pick(random, world.PLACES)
    return {
        "dream": pick(random, WORLD["wishes"]),
        "treat": pick(random, WORLD["treats"]),
        "to": place.to,
        "sight": place.sight,
        "days": NUMBERS[2 + int(random.random() * 8)],
    }


_GRAMMAR = world.read_grammar("stories")
OPENING, ENDING = _read_steps("opening"), _read_steps("ending")
PLOTS: tuple[tuple[Callable[[Random, Facts], Facts], tuple[Step, ...]], ...] = tuple(
    (invent_facts, _read_steps(invent_facts.__name__))
    for invent_facts in (lost, broken, shared, weather, fear, animal, race, warned, trade, wish)
)

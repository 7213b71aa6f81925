"""Short stories from a grammar: ten plots, each a chain of causes, about people who keep their names and pronouns.
What happens follows from what was said (the tool fits the harm, sums come out right, the thing is found where the
friend saw it), so a model of a few million parameters has something to learn beyond spelling. The words are in
`stories.yaml` and `world.yaml`; here is what follows from what."""

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar
from zlib import crc32

from llmlab.data.demo import world
from llmlab.data.demo.world import NUMBERS, PEOPLE, WORLD, Person

VALIDATION_IN = 20  # one cast in so many is in the validation split only

RUNNER = {"": "name", "_she": "she", "_them": "them"}  # facts of a runner, by the end of their slots

Choice = TypeVar("Choice")
Facts = dict[str, str]
Step = tuple[float, tuple[str, ...]]  # its probability, and its wordings


def write_row(random: Random, *, validation: bool) -> dict[str, str]:
    """Returns a story; those of the validation split have a plot, hero and friend that training never combines."""
    while True:
        number, hero, friend = int(random.random() * len(PLOTS)), pick(random, PEOPLE), pick(random, PEOPLE)
        cast = crc32(f"{number} {hero.name} {friend.name}".encode())
        if hero.name != friend.name and (cast % VALIDATION_IN == 0) is validation:
            break
    return {"text": narrate(random, number, invent(random, number, hero, friend))}


def invent(random: Random, number: int, hero: Person, friend: Person) -> Facts:
    """Returns the facts of a plot with these two people: the values of every slot of its steps."""
    facts = {**_facts_of(hero, ""), **_facts_of(friend, "friend_"), "trait": pick(random, WORLD["traits"])}
    facts.update(PLOTS[number][0](random, facts))
    return facts


def narrate(random: Random, number: int, facts: Facts) -> str:
    """Returns the story of a plot's facts in wordings chosen at random."""
    steps = (*OPENING, *PLOTS[number][1], *ENDING)
    sentences = [pick(random, wordings) for chance, wordings in steps if random.random() < chance]
    return " ".join(sentences).format_map(facts)


def pick(random: Random, choices: Sequence[Choice]) -> Choice:
    return choices[int(random.random() * len(choices))]  # as fair as `choice` for such short lists, and faster


def other(random: Random, choices: Sequence[Choice], than: Choice) -> Choice:
    return pick(random, [choice for choice in choices if choice is not than])


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _facts_of(person: Person, prefix: str) -> Facts:
    more = {"a_kind": a(person.kind), "She": person.she.capitalize(), "Her": person.her.capitalize()}
    return {f"{prefix}{slot}": value for slot, value in (person._asdict() | more).items()}


def _read_steps(name: str) -> tuple[Step, ...]:
    """Returns a plot's steps: wordings between bars, behind a `60%` where their probability is not 1."""
    steps = []
    for step in _GRAMMAR[name]:
        head, percent, rest = step.replace("{sad}", _GRAMMAR["sad"]).partition("% ")
        chance, words = (int(head) / 100, rest) if percent else (1.0, head)
        steps.append((chance, tuple(words.split(" | "))))
    return tuple(steps)


def lost(random: Random, facts: Facts) -> Facts:
    place = pick(random, world.PLACES)
    spot = pick(random, place.spots)
    thing = pick(random, WORLD["toys"])
    look = pick(random, pick(random, (world.COLORS, WORLD["sizes"])))
    elsewhere = other(random, place.spots, spot)
    return {**place._asdict(), "thing": thing, "look": look, "spot": spot, "elsewhere": elsewhere}


def broken(random: Random, facts: Facts) -> Facts:
    item = pick(random, world.BREAKS)
    wrong = other(random, world.BREAKS, item)
    color = pick(random, world.COLORS)
    return {**item._asdict(), "color": color, "wrong_tool": wrong.tool, "wrong_thing": wrong.thing}


def shared(random: Random, facts: Facts) -> Facts:
    place = pick(random, world.PLACES)
    total = 5 + int(random.random() * 8)
    gift = 1 + int(random.random() * (total - 3))
    numbers = {"total": total, "given": gift, "left": total - gift, "last": total - gift - 1}
    words = {name: NUMBERS[number] for name, number in numbers.items()}
    return {**place._asdict(), **words, "fruit": pick(random, WORLD["fruits"])}


def weather(random: Random, facts: Facts) -> Facts:
    change, place = pick(random, world.WEATHERS), pick(random, world.PLACES)
    return {**change._asdict(), **place._asdict()}


def fear(random: Random, facts: Facts) -> Facts:
    what, sight, helped, deed = pick(random, WORLD["fears"])
    return {"what": what, "sight": sight, "Sight": sight.capitalize(), "helped": helped, "deed": deed}


def animal(random: Random, facts: Facts) -> Facts:
    pet, color = pick(random, world.ANIMALS), pick(random, world.COLORS)
    articles = {"a_pet": a(pet.animal), "A_pet": a(pet.animal).capitalize(), "a_color": a(color)}
    wrong = other(random, world.ANIMALS, pet).food
    return {**pet._asdict(), **articles, "pet": pet.animal, "color": color, "wrong": wrong}


def race(random: Random, facts: Facts) -> Facts:
    prefixes = ("", "friend_") if random.random() < 0.5 else ("friend_", "")
    return {
        **{f"quick{key}": facts[prefixes[0] + slot] for key, slot in RUNNER.items()},
        **{f"steady{key}": facts[prefixes[1] + slot] for key, slot in RUNNER.items()},
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
    first = {"has": has, "who": who, "why": why, "gets": gets}
    return {**first, "next_who": next_who, "next_why": next_why, "goal": goal}


def wish(random: Random, facts: Facts) -> Facts:
    place = pick(random, world.PLACES)
    dream, treat = pick(random, WORLD["wishes"]), pick(random, WORLD["treats"])
    return {**place._asdict(), "dream": dream, "treat": treat, "days": NUMBERS[2 + int(random.random() * 8)]}


_GRAMMAR = world.read_grammar("stories")
OPENING, ENDING = _read_steps("opening"), _read_steps("ending")
PLOTS: tuple[tuple[Callable[[Random, Facts], Facts], tuple[Step, ...]], ...] = tuple(
    (invent_facts, _read_steps(invent_facts.__name__))
    for invent_facts in (lost, broken, shared, weather, fear, animal, race, warned, trade, wish)
)

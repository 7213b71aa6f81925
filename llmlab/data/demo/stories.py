"""Short stories from a grammar: ten plots, each a chain of causes, about people who keep their names and pronouns.
What happens follows from what was said (the tool fits the harm, sums come out right, the thing is found where the
friend saw it), so a model of a few million parameters has something to learn beyond spelling. The words are in
`stories.yaml`, people, places and things in `world.yaml`; here is what follows from what."""

from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Any
from zlib import crc32

from llmlab.settings.files import read_table
from llmlab.simulator.tasks import Choice, pick

VALIDATION_IN = 20  # one cast in so many is in the validation split only

RUNNER = {"": "name", "_she": "she", "_them": "them"}  # facts of a runner, by the end of their slots

Step = tuple[float, tuple[str, ...]]  # its probability, and its wordings

read_grammar = partial(read_table, "llmlab.data.demo")
WORLD = read_grammar("world")
_GIRLS, _BOYS, _BEASTS = WORLD["girls"], WORLD["boys"], WORLD["beasts"]
_GIRL, _BOY = {"she": "she", "her": "her", "them": "her"}, {"she": "he", "her": "his", "them": "him"}
PEOPLE = tuple(
    [{"name": name, "kind": kind} | _GIRL for i, name in enumerate(_GIRLS) for kind in ("girl", _BEASTS[i % 10])]
    + [{"name": name, "kind": kind} | _BOY for i, name in enumerate(_BOYS) for kind in ("boy", _BEASTS[-i % 10])]
)


class Facts(dict[str, Any]):
    """Values of the slots of a plot's steps; `{a_kind}` is the kind with its article, `{She}` capitalized."""

    def __missing__(self, slot: str) -> str:
        if slot[0].isupper():
            return self[slot[0].lower() + slot[1:]].capitalize()
        if not slot.startswith("a_"):
            raise KeyError(slot)
        noun = self[slot.removeprefix("a_")]
        return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def write_row(random: Random, *, validation: bool) -> dict[str, str]:
    """Returns a story; those of the validation split have a plot, hero and friend that training never combines."""
    while True:
        number, hero, friend = int(random.random() * len(PLOTS)), pick(random, PEOPLE), pick(random, PEOPLE)
        cast = crc32(f"{number} {hero['name']} {friend['name']}".encode())
        if hero["name"] != friend["name"] and (cast % VALIDATION_IN == 0) is validation:
            break
    return {"text": narrate(random, number, invent(random, number, hero, friend))}


def invent(random: Random, number: int, hero: dict[str, str], friend: dict[str, str]) -> Facts:
    """Returns the facts of a plot with these two people."""
    friends = {f"friend_{slot}": value for slot, value in friend.items()}
    facts = Facts(hero | friends, trait=pick(random, WORLD["traits"]))
    facts.update(PLOTS[number][0](random, facts))
    return facts


def narrate(random: Random, number: int, facts: Facts) -> str:
    """Returns the story of a plot's facts in wordings chosen at random."""
    steps = (*OPENING, *PLOTS[number][1], *ENDING)
    sentences = [pick(random, wordings) for chance, wordings in steps if random.random() < chance]
    return " ".join(sentences).format_map(facts)


def other(random: Random, choices: Sequence[Choice], than: Choice) -> Choice:
    return pick(random, [choice for choice in choices if choice is not than])


def _read_steps(name: str) -> tuple[Step, ...]:
    """Returns a plot's steps: wordings between bars, behind a `60%` where their probability is not 1."""
    steps = []
    for step in _GRAMMAR[name]:
        head, percent, rest = step.replace("{sad}", _GRAMMAR["sad"]).partition("% ")
        chance, words = (int(head) / 100, rest) if percent else (1.0, head)
        steps.append((chance, tuple(words.split(" | "))))
    return tuple(steps)


def lost(random: Random, facts: Facts) -> dict[str, Any]:
    place = pick(random, WORLD["places"])
    spot = pick(random, place["spots"])
    thing = pick(random, WORLD["toys"])
    look = pick(random, pick(random, (WORLD["colors"], WORLD["sizes"])))
    return {**place, "thing": thing, "look": look, "spot": spot, "elsewhere": other(random, place["spots"], spot)}


def broken(random: Random, facts: Facts) -> dict[str, Any]:
    item = pick(random, WORLD["breaks"])
    wrong = other(random, WORLD["breaks"], item)
    color = pick(random, WORLD["colors"])
    return {**item, "color": color, "wrong_tool": wrong["tool"], "wrong_thing": wrong["thing"]}


def shared(random: Random, facts: Facts) -> dict[str, Any]:
    place = pick(random, WORLD["places"])
    total = 5 + int(random.random() * 8)
    gift = 1 + int(random.random() * (total - 3))
    numbers = {"total": total, "given": gift, "left": total - gift, "last": total - gift - 1}
    words = {name: WORLD["numbers"][number] for name, number in numbers.items()}
    return {**place, **words, "fruit": pick(random, WORLD["fruits"])}


def weather(random: Random, facts: Facts) -> dict[str, Any]:
    return {**pick(random, WORLD["weathers"]), **pick(random, WORLD["places"])}


def fear(random: Random, facts: Facts) -> dict[str, Any]:
    return pick(random, WORLD["fears"])


def animal(random: Random, facts: Facts) -> dict[str, Any]:
    found, color = pick(random, WORLD["animals"]), pick(random, WORLD["colors"])
    return {**found, "color": color, "wrong": other(random, WORLD["animals"], found)["food"]}


def race(random: Random, facts: Facts) -> dict[str, Any]:
    prefixes = ("", "friend_") if random.random() < 0.5 else ("friend_", "")
    runners = zip(("quick", "steady"), prefixes, strict=True)
    named = {runner + end: facts[prefix + slot] for runner, prefix in runners for end, slot in RUNNER.items()}
    return {**named, "to": pick(random, WORLD["places"])["to"], "prize": pick(random, WORLD["treats"])}


def warned(random: Random, facts: Facts) -> dict[str, Any]:
    return {**pick(random, WORLD["warnings"]), **pick(random, WORLD["elders"])}


def trade(random: Random, facts: Facts) -> dict[str, Any]:
    start = int(random.random() * (len(WORLD["trades"]) - 1))
    first, second = WORLD["trades"][start : start + 2]
    return {**first, "next_who": second["who"], "next_why": second["why"], "goal": second["gets"]}


def wish(random: Random, facts: Facts) -> dict[str, Any]:
    place = pick(random, WORLD["places"])
    dream, treat = pick(random, WORLD["wishes"]), pick(random, WORLD["treats"])
    return {**place, "dream": dream, "treat": treat, "days": WORLD["numbers"][2 + int(random.random() * 8)]}


_GRAMMAR = read_grammar("stories")
OPENING, ENDING = _read_steps("opening"), _read_steps("ending")
PLOTS: tuple[tuple[Callable[[Random, Facts], dict[str, Any]], tuple[Step, ...]], ...] = tuple(
    (invent_facts, _read_steps(invent_facts.__name__))
    for invent_facts in (lost, broken, shared, weather, fear, animal, race, warned, trade, wish)
)

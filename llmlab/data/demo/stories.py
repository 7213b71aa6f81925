"""Short stories from a grammar: ten plots, each a chain of causes, about people who keep their names and pronouns.
What happens follows from what was said (the tool fits the harm, sums come out right, the thing is found where the
friend saw it), so a model of a few million parameters has something to learn beyond spelling. The words are in
`stories.yaml`, people, places and things in `world.yaml`; here is what follows from what."""

from functools import partial
from itertools import pairwise
from random import Random
from typing import Any
from zlib import crc32

from llmlab.settings.files import read_table
from llmlab.simulator.tasks import pick

VALIDATION_IN = 20  # one cast in so many is in the validation split only

Step = tuple[float, tuple[str, ...]]  # its probability, and its wordings

read_grammar = partial(read_table, "llmlab.data.demo")
WORLD = read_grammar("world")
_GIRLS, _BOYS, _BEASTS = WORLD["girls"], WORLD["boys"], WORLD["beasts"]
_GIRL, _BOY = {"she": "she", "her": "her", "them": "her"}, {"she": "he", "her": "his", "them": "him"}


def _count(total: int, gift: int) -> dict[str, str]:
    """Returns in words what is left of some things when some of them, and one more, are gone."""
    numbers = {"total": total, "given": gift, "left": total - gift, "last": total - gift - 1}
    return {name: WORLD["numbers"][number] for name, number in numbers.items()}


PEOPLE = tuple(
    [{"name": name, "kind": kind} | _GIRL for i, name in enumerate(_GIRLS) for kind in ("girl", _BEASTS[i % 10])]
    + [{"name": name, "kind": kind} | _BOY for i, name in enumerate(_BOYS) for kind in ("boy", _BEASTS[-i % 10])]
)
TABLES = {
    **WORLD,
    "looks": [WORLD["colors"], WORLD["sizes"]],
    "days": WORLD["numbers"][2:10],
    # with each row the one after it, which begins where it ends
    "swaps": [first | {f"next_{key}": second[key] for key in second} for first, second in pairwise(WORLD["trades"])],
    "sums": [[_count(total, gift) for gift in range(1, total - 2)] for total in range(5, 13)],
}


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
    plot = list(PLOTS)[number]
    return {"text": narrate(random, plot, invent(random, plot, hero, friend))}


def invent(random: Random, plot: str, hero: dict[str, str], friend: dict[str, str]) -> Facts:
    """Returns the facts of a plot with these two people, as `draws` in `stories.yaml` lists them."""
    friends = {f"friend_{slot}": value for slot, value in friend.items()}
    facts = Facts(hero | friends, trait=pick(random, WORLD["traits"]))
    drawn: list[Any] = []
    for slot, table in _GRAMMAR["draws"][plot].items():
        choices = facts.get(table) or TABLES[table]
        item = pick(random, [choice for choice in choices if not any(choice is each for each in drawn)])
        while isinstance(item, list):
            item = pick(random, item)
        drawn.append(item)
        if isinstance(item, dict):
            prefix = slot if slot.endswith("_") else ""
            for key, value in item.items():
                facts[prefix + key] = value.format_map(facts) if isinstance(value, str) else value
        else:
            facts[slot] = item
    return facts


def narrate(random: Random, plot: str, facts: Facts) -> str:
    """Returns the story of a plot's facts in wordings chosen at random."""
    steps = (*OPENING, *PLOTS[plot], *ENDING)
    sentences = [pick(random, wordings) for chance, wordings in steps if random.random() < chance]
    return " ".join(sentences).format_map(facts)


def _read_steps(name: str) -> tuple[Step, ...]:
    """Returns a plot's steps: wordings between bars, behind a `60%` where their probability is not 1."""
    steps = []
    for step in _GRAMMAR[name]:
        head, percent, rest = step.replace("{sad}", _GRAMMAR["sad"]).partition("% ")
        chance, words = (int(head) / 100, rest) if percent else (1.0, head)
        steps.append((chance, tuple(words.split(" | "))))
    return tuple(steps)


_GRAMMAR = read_grammar("stories")
OPENING, ENDING = _read_steps("opening"), _read_steps("ending")
PLOTS = {plot: _read_steps(plot) for plot in _GRAMMAR["draws"]}

"""Conversations in the world of the demo stories: requests that a few million parameters can learn to follow. An
exchange is one row of `chat.yaml`: request, answer, and what every good answer contains."""

import re
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple
from zlib import crc32

from llmlab.data.demo.stories import ENDING, PEOPLE, PLOTS, VALIDATION_IN, WORLD, invent, narrate, read_grammar
from llmlab.simulator.tasks import pick

Message = dict[str, str]


class Exchange(NamedTuple):
    """A request template and its answer templates."""

    plot: str  # that has the facts; "" where those of the people are enough
    ask: str
    answers: tuple[str, ...]  # wordings; `{story}` is a whole story, `{tale}` one without "The end."
    must: tuple[str, ...]  # what a good answer contains
    within: str | None = None  # further names, colors and numbers it may mention; None is any


class System(NamedTuple):
    """A system prompt, and what it demands of every answer."""

    prompt: str
    obeyed: Callable[[str], bool] = lambda answer: True


_GRAMMAR = read_grammar("chat")
STORY_ASKS = _GRAMMAR["story_asks"]
_PRONOUNS = {"she", "her", "friend_them"}
_CLAIMABLE = {*WORLD["colors"], *WORLD["numbers"], *(person["name"] for person in PEOPLE)}


def _slots(template: str) -> list[str]:
    return re.findall(r"\{(?:a_|A_)?(\w+)\}", template)


def _named(template: str) -> tuple[str, ...]:
    return tuple(f"{{{slot}}}" for slot in dict.fromkeys(_slots(template)) if slot not in _PRONOUNS)


def _stories(answer: str) -> tuple[Exchange, ...]:
    return tuple(
        Exchange(plot, ask, (answer or story["short"],), _named(ask))
        for plot, story in _GRAMMAR["stories"].items()
        for ask in (wording.replace("ABOUT", story["about"]) for wording in STORY_ASKS)
    )


def _questions() -> tuple[Exchange, ...]:
    return tuple(
        Exchange(plot, ask, (answer,), (must,), question)
        for plot, about in _GRAMMAR["scenes"].items()
        for question, answer, must in about["questions"]
        for scene in about["scenes"]
        for ask in (f"{scene}\n\n{question}", f"{question}\n\n{scene}")
    )


def _endings() -> tuple[Exchange, ...]:
    answers = tuple(wording for wording in ENDING[0][1] if "{name}" in wording)
    return tuple(
        Exchange(plot, ask, answers, ("{name}",), scene)
        for plot, about in _GRAMMAR["scenes"].items()
        for scene in about["scenes"]
        for ask in (f"Write the ending of this story. {scene}", f"How does this story end?\n\n{scene}")
        if "{name}" in scene
    )


def _direct(*rows: Sequence[Any], repeat: bool = False) -> tuple[Exchange, ...]:
    return tuple(
        Exchange(plot, ask, (answer,), (*must, *(_named(answer) if repeat else ())), ask)
        for plot, ask, answer, must in rows
    )


GROUPS = {
    **{"tell": _stories("{story}"), "tell_short": _stories(""), "tell_to_the_end": _stories("{tale} The end.")},
    **{"answer": _questions(), "finish": _endings(), "greet": _direct(*_GRAMMAR["greetings"], repeat=True)},
    **{name: _direct(*rows) for name, rows in _GRAMMAR["exchanges"].items()},
}
SYSTEMS = {
    "in_one_sentence": System("Answer in one sentence.", lambda text: len(re.findall(r"[.!?]+(?=\W|$)", text)) == 1),
    "to_the_end": System('Say "The end." at the end.', lambda answer: answer.endswith("The end.")),
    "as_somebody": System("You are {name} the {kind}."),
}
PLANS = tuple(  # (how many in a hundred conversations, system prompt, groups of exchanges)
    (share, SYSTEMS.get(system, System("")), tuple(GROUPS[name] for name in groups))
    for share, system, *groups in _GRAMMAR["plans"]
)

_DRAWN = tuple(number for number, (share, *_) in enumerate(PLANS) for _ in range(share))


def write_row(random: Random, *, validation: bool) -> dict[str, Any]:
    """Returns one conversation; no request of the validation split is in the training split."""
    return {"messages": converse(random, validation=validation)[0]}


def converse(random: Random, *, validation: bool) -> tuple[list[Message], Callable[[str], bool]]:
    """Returns a conversation, and whether an answer does what its last request asks."""
    while True:
        _, system, groups = PLANS[pick(random, _DRAWN)]
        exchanges = _choose(random, groups)
        plot = next((exchange.plot for exchange in exchanges if exchange.plot), next(iter(PLOTS)))
        hero, friend = pick(random, PEOPLE), pick(random, PEOPLE)
        facts = invent(random, plot, hero, friend)
        request = "\n".join([system.prompt, *(exchange.ask for exchange in exchanges)]).format_map(facts)
        if hero["name"] != friend["name"] and (crc32(request.encode()) % VALIDATION_IN == 0) is validation:
            break
    facts["story"] = narrate(random, plot, facts)
    facts["tale"] = facts["story"].removesuffix(" The end.")
    messages = [{"role": "system", "content": system.prompt.format_map(facts)}] if system.prompt else []
    for exchange in exchanges:
        messages.append({"role": "user", "content": exchange.ask.format_map(facts)})
        messages.append({"role": "assistant", "content": pick(random, exchange.answers).format_map(facts)})
    return messages, judge(system, exchanges[-1], facts)


def _choose(random: Random, groups: Sequence[Sequence[Exchange]]) -> list[Exchange]:
    """Returns an exchange of each group, all of which can be about the same plot."""
    while True:
        exchanges = [pick(random, group) for group in groups]
        if len({exchange.plot for exchange in exchanges if exchange.plot}) <= 1:
            return exchanges


def judge(system: System, exchange: Exchange, facts: Mapping[str, str]) -> Callable[[str], bool]:
    """Returns whether an answer does what a request asks; it compares words, and knows nothing of grammar."""
    must = [needed.format_map(facts) for needed in exchange.must]
    may = must if exchange.within is None else [*must, *(facts[slot] for slot in _slots(exchange.within))]

    def follows(answer: str) -> bool:
        named = all(re.search(rf"(?<!\w){re.escape(needed)}(?!\w)", answer, re.I) for needed in must)
        claims_no_more = exchange.within is None or _claims(answer) <= _claims(" ".join(may))
        return system.obeyed(answer) and named and claims_no_more

    return follows


def _claims(text: str) -> set[str]:
    return _CLAIMABLE.intersection(re.findall(r"\w+", text))

"""Conversations in the world of the demo stories: requests that a few million parameters can learn to follow. An
exchange is one row of `chat.yaml`: request, answer, and what every good answer contains. And preference pairs: such an
answer and a corrupted copy. Some rejected answers are shorter than the chosen one and some longer, so length alone
tells nothing."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import product
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
NAMES = tuple(dict.fromkeys(person["name"] for person in PEOPLE))
_CLAIMABLE = {*WORLD["colors"], *WORLD["numbers"], *NAMES}

LONGEST_STORY, LONGEST_ANSWER = 160, 24  # words of a good one; the corpus has at most 145 and 14
_STORY_BEGINNINGS = tuple(ask.partition("{")[0].removesuffix("a ") for ask in STORY_ASKS)


def _slots(template: str) -> list[str]:
    return re.findall(r"\{(?:a_|A_)?(\w+)\}", template)


def _named(template: str) -> tuple[str, ...]:
    return tuple(f"{{{slot}}}" for slot in dict.fromkeys(_slots(template)) if slot not in _PRONOUNS)


def _read_groups() -> dict[str, list[Exchange]]:
    """Returns the exchanges of each group of `chat.yaml`."""
    groups: dict[str, list[Exchange]] = defaultdict(list)
    for plot, story in _GRAMMAR["stories"].items():
        answers = {"tell": "{story}", "tell_short": story["short"], "tell_to_the_end": "{tale} The end."}
        for ask in (wording.replace("ABOUT", story["about"]) for wording in STORY_ASKS):
            for name, answer in answers.items():
                groups[name].append(Exchange(plot, ask, (answer,), _named(ask)))
    endings = tuple(wording for wording in ENDING[0][1] if "{name}" in wording)
    for plot, about in _GRAMMAR["scenes"].items():
        for (question, answer, must), scene in product(about["questions"], about["scenes"]):
            for ask in (f"{scene}\n\n{question}", f"{question}\n\n{scene}"):
                groups["answer"].append(Exchange(plot, ask, (answer,), (must,), question))
        for scene in (scene for scene in about["scenes"] if "{name}" in scene):
            for ask in (f"Write the ending of this story. {scene}", f"How does this story end?\n\n{scene}"):
                groups["finish"].append(Exchange(plot, ask, endings, ("{name}",), scene))
    for name, rows in {"greet": _GRAMMAR["greetings"], **_GRAMMAR["exchanges"]}.items():
        for plot, ask, answer, must in rows:
            repeated = _named(answer) if name == "greet" else ()
            groups[name].append(Exchange(plot, ask, (answer,), (*must, *repeated), ask))
    return dict(groups)


GROUPS = _read_groups()
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


def break_off(random: Random, prompt: Sequence[Message], answer: str, other: str) -> str:
    """Ends in the middle of a sentence."""
    words = answer.split()
    count = 1 + int(random.random() * max(len(words) - 1, 1))
    return " ".join(words[:count]).rstrip('.,!?"')


def name_somebody_else(random: Random, prompt: Sequence[Message], answer: str, other: str) -> str:
    """Calls one of the people by the name of somebody who is not there."""
    request = " ".join(message["content"] for message in prompt)
    named = [name for name in NAMES if re.search(rf"\b{name}\b", answer)]
    absent = [name for name in NAMES if name not in request and name not in named]
    return re.sub(rf"\b{pick(random, named)}\b", pick(random, absent), answer) if named else answer


def answer_something_else(random: Random, prompt: Sequence[Message], answer: str, other: str) -> str:
    """Does what another request asked for."""
    return other


def repeat(random: Random, prompt: Sequence[Message], answer: str, other: str) -> str:
    """Says one sentence again and again."""
    sentences = _sentences(answer)
    last = int(random.random() * len(sentences))
    return " ".join(sentences[: last + 1] + [sentences[last]] * (2 + int(random.random() * 3)))


def go_on(random: Random, prompt: Sequence[Message], answer: str, other: str) -> str:
    """Answers, and then goes on with what nobody asked for."""
    return f"{answer} {other}"


FAILURES = ((25, break_off), (20, name_somebody_else), (20, answer_something_else), (20, repeat), (15, go_on))
"""Percent of the answers; one that a failure leaves without a fault gets another."""

_FAILURES_DRAWN = tuple(spoil for share, spoil in FAILURES for _ in range(share))


def write_pair(random: Random, *, validation: bool) -> dict[str, Any]:
    """Returns one pair; no request of the validation split is in the training split."""
    (*prompt, answer), follows = converse(random, validation=validation)
    while True:
        spoil = pick(random, _FAILURES_DRAWN)
        other = ""
        if spoil in (answer_something_else, go_on):
            other = write_row(random, validation=validation)["messages"][-1]["content"]
        rejected = {"role": "assistant", "content": spoil(random, prompt, answer["content"], other)}
        if faults([*prompt, rejected], follows):
            return {"prompt": prompt, "chosen": [answer], "rejected": [rejected]}


def faults(messages: Sequence[Message], follows: Callable[[str], bool]) -> tuple[str, ...]:
    """Returns what is wrong with the last message, an answer to a request of `demo/chat` that `follows` judges."""
    answer, request = messages[-1]["content"], messages[-2]["content"] if len(messages) > 1 else ""
    sentences = _sentences(answer)
    longest = LONGEST_STORY if request.startswith(_STORY_BEGINNINGS) else LONGEST_ANSWER
    found = {
        "does not do what was asked": not follows(answer),
        "breaks off": not re.search(r'[.!?]"?$', answer.strip()),
        "repeats itself": len(set(sentences)) < len(sentences),
        "is too long": len(answer.split()) > longest,
    }
    return tuple(fault for fault, there in found.items() if there)


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+|(?<=[.!?]\")\s+", text.strip())

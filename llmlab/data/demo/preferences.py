"""Preference pairs in the world of the demo stories: an answer of `demo/chat`, and a corrupted copy. Some rejected
answers are shorter than the chosen one and some longer, so length alone tells nothing."""

import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from llmlab.data.demo import chat
from llmlab.data.demo.chat import STORY_ASKS, Message
from llmlab.data.demo.stories import PEOPLE
from llmlab.simulator.tasks import pick

LONGEST_STORY, LONGEST_ANSWER = 160, 24  # words of a good one; the corpus has at most 145 and 14
NAMES = tuple(dict.fromkeys(person["name"] for person in PEOPLE))

_STORY_BEGINNINGS = tuple(ask.partition("{")[0].removesuffix("a ") for ask in STORY_ASKS)


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

_DRAWN = tuple(spoil for share, spoil in FAILURES for _ in range(share))


def write_row(random: Random, *, validation: bool) -> dict[str, Any]:
    """Returns one pair; no request of the validation split is in the training split."""
    (*prompt, answer), follows = chat.converse(random, validation=validation)
    while True:
        spoil = pick(random, _DRAWN)
        other = ""
        if spoil in (answer_something_else, go_on):
            other = chat.write_row(random, validation=validation)["messages"][-1]["content"]
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

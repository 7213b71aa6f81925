"""Reads conversations of demo/chat backwards, so that answers written by hand can be judged too."""

import re
from functools import cache

import pytest

from llmlab.data.demo.chat import PLANS, SYSTEMS, System, faults, judge
from llmlab.data.demo.stories import WORLD

NAMES = {"name", "friend_name", "quick", "steady"}
KNOWN = {next(iter(each.values())): each for each in (*WORLD["animals"], *WORLD["breaks"])}  # by the pet or thing
REQUESTS = {exchange.ask: exchange for _, _, groups in PLANS for group in groups for exchange in group}


@cache
def parser(template):
    """Returns a pattern that parses a template's slots, each the same wherever it occurs."""
    pattern, seen = "", set()
    for literal, article, slot in re.findall(r"([^{]*)(?:\{([aA]_)?(\w+)\})?", template):
        pattern += re.escape(literal) + (f"{article[0]}n? " if article else "")
        if slot:
            value = r"[A-Z]\w*" if slot in NAMES else r"[\w' ]+?"
            pattern += f"(?P={slot})" if slot in seen else f"(?P<{slot}>{value})"
            seen.add(slot)
    return re.compile(pattern)


def read(messages):
    """Returns what judges answers to the last request."""
    facts, system, exchange = {}, System(""), None
    for message in messages:
        if message["role"] == "system":
            for each in SYSTEMS.values():
                if match := parser(each.prompt).fullmatch(message["content"]):
                    facts, system = facts | match.groupdict(), each
        elif message["role"] == "user":
            found = (
                (each, match)
                for each in REQUESTS.values()
                if (match := parser(each.ask).fullmatch(message["content"]))
            )
            exchange, match = next(found)
            named = match.groupdict()  # with it come the facts of the animal or thing
            facts |= {**KNOWN.get(named.get("pet") or named.get("thing", ""), {}), **named}
    return judge(system, exchange, facts)


@pytest.fixture(scope="session")
def follows():
    """Whether the last message does what the conversation before it, worded as in this corpus, asks."""
    return lambda messages: read(messages[:-1])(messages[-1]["content"])


@pytest.fixture(scope="session")
def find_faults():
    """What is wrong with the last message."""
    return lambda messages: faults(messages, read(messages[:-1]))

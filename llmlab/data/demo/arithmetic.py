"""Sums and differences of one- and two-digit numbers, answered in a line that ends in `#### NUMBER`, as in GSM8K. No
problem is in both splits, nor in another wording or a sum the other way round; it may still be a step of another."""

from random import Random
from typing import Any
from zlib import crc32

from llmlab.data.demo.stories import VALIDATION_IN, read_grammar
from llmlab.simulator.tasks import pick

SIZES = ((9, 9), (9, 99), (99, 9), (99, 99))
"""The largest the two numbers can be, each as likely; the smallest is 1."""

WORDINGS = read_grammar("arithmetic")


def write_row(random: Random, *, validation: bool) -> dict[str, Any]:
    """Returns one problem as a conversation and as plain text, with its result, never negative, in `answer`."""
    while True:
        sign = pick(random, tuple(WORDINGS))
        a, b = (1 + int(random.random() * largest) for largest in pick(random, SIZES))
        low, high = sorted((a, b))
        if (crc32(f"{high} {sign} {low}".encode()) % VALIDATION_IN == 0) is validation:
            break
    if sign == "-":
        a, b = high, low
    worked, result = work(a, sign, b)
    asked, answered = pick(random, WORDINGS[sign]).format(a=a, b=b), f"{worked}. #### {result}"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return {"messages": messages, "text": f"{asked} {answered}", "answer": str(result)}


def work(a: int, sign: str, b: int) -> tuple[str, int]:
    """Returns the steps that add (or subtract) the tens of `b` and then its ones, and the result."""
    steps = []
    for part in (b - b % 10, b % 10):
        if part:
            result = a + part if sign == "+" else a - part
            steps.append(f"{a} {sign} {part} = {result}")
            a = result
    return ", ".join(steps), a

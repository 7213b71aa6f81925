"""demo/preferences: the same for everyone, splits apart, and the chosen answer is always the better one."""

import re
from collections import Counter
from random import Random

import pytest

from llmlab.data.chat.conversations import load_conversations
from llmlab.data.demo import CORPORA, demo_shards, read_shard
from llmlab.data.demo.chat import (
    FAILURES,
    answer_something_else,
    break_off,
    go_on,
    name_somebody_else,
    repeat,
)
from llmlab.data.sources import Tally
from llmlab.settings.data import DataSource


def rows(name="demo/preferences", **options):
    return [row for shard in demo_shards(name, **options) for row in read_shard(shard)]


def answers(row):
    return row["chosen"][0]["content"], row["rejected"][0]["content"]


def asked(row):
    """Returns all that a row asks; whoever answers is left out."""
    messages = row.get("prompt", row.get("messages"))
    return tuple(message["content"] for message in messages if message["role"] != "assistant")


@pytest.fixture(scope="module")
def corpus():
    return rows(size="500kB")


def test_a_corpus_is_its_name(corpus):
    assert rows(size="500kB") == corpus
    assert rows(size="500kB", seed=1) != corpus
    assert sum(shard.size for shard in demo_shards("demo/preferences")) == CORPORA["preferences"][1]


def test_splits_share_no_request_nor_does_what_was_learned_from_demo_chat(corpus):
    held = {asked(row) for row in rows(size="1MB", split="validation")}
    assert len(held) > 50
    assert not held & {asked(row) for row in corpus}
    assert not held & {asked(row) for row in rows("demo/chat", size="500kB")}


def test_the_chosen_answer_is_without_fault_and_the_rejected_one_is_not(corpus, find_faults):
    for row in corpus:
        prompt = row["prompt"]
        assert prompt[-1]["role"] == "user"
        assert find_faults([*prompt, *row["chosen"]]) == ()
        assert find_faults([*prompt, *row["rejected"]])


def test_failures_are_of_several_kinds(corpus, find_faults):
    found = Counter(fault for row in corpus for fault in find_faults([*row["prompt"], *row["rejected"]]))
    assert set(found) == {"does not do what was asked", "breaks off", "repeats itself", "is too long"}
    assert min(found.values()) > 0.1 * len(corpus)
    assert sum(share for share, _ in FAILURES) == 100


def test_neither_length_nor_the_end_alone_tells_which_is_better(corpus):
    lengths = [tuple(map(len, answers(row))) for row in corpus]
    assert 0.35 < sum(chosen < rejected for chosen, rejected in lengths) / len(lengths) < 0.65
    assert sum(answers(row)[1].endswith((".", "!", '"', "?")) for row in corpus) > 0.6 * len(corpus)


def test_text_is_clean(corpus):
    text = "\n".join(answer for row in corpus for answer in answers(row))
    assert text.isascii() and not re.search(r"[{}|]| \s|None", text)


def test_every_row_is_a_pair_and_an_instruction():
    pairs, instructions = Tally(), Tally()
    source = DataSource(name="demo/preferences", subset="50kB")
    for pair in load_conversations(source, "preferences").conversations(pairs):
        assert set(pair) == {"prompt", "chosen", "rejected", "tools"}
    for conversation in load_conversations(source).conversations(instructions):
        assert conversation["messages"][-1]["role"] == "assistant"
    assert pairs.documents == instructions.documents > 20
    assert not pairs.dropped and not instructions.dropped


ASK = "Say hello to Mia and Tom."
STORY = "Tell me a story about a fox named Tim who wants to whistle."
TOLD = "Tim was a little fox. He learned to whistle."


@pytest.mark.parametrize(
    ("request_", "answer", "expected"),
    [
        (ASK, "Hello, Mia and Tom!", ()),
        (ASK, "Hello, Mia and Tom", ("breaks off",)),
        (ASK, "Hello, Mia and", ("does not do what was asked", "breaks off")),
        (ASK, "", ("does not do what was asked", "breaks off")),
        (ASK, "Hello, Mia and Ben!", ("does not do what was asked",)),
        (ASK, "Hello, Mia and Tom! Hello, Mia and Tom!", ("repeats itself",)),
        (ASK, f"Hello, Mia and Tom! {'And I am very glad. It is a nice day! ' * 1}" + "So we go on " * 5 + "home.",
            ("is too long",)),
        (STORY, TOLD, ()),
        (STORY, f'{TOLD} "What a day!"', ()),
        (STORY, f"{TOLD} He learned to whistle.", ("repeats itself",)),
        (STORY, f"{TOLD} {'He went on and on ' * 40}home.", ("is too long",)),
    ],
)  # fmt: skip
def test_faults(request_, answer, expected, find_faults):
    assert find_faults([{"role": "user", "content": request_}, {"role": "assistant", "content": answer}]) == expected


def test_ways_to_fail():
    prompt = [{"role": "user", "content": ASK}]
    answer, other = "Hello, Mia and Tom!", "A fox likes to eat berries."
    for seed in range(20):
        random = Random(seed)
        assert answer.startswith(short := break_off(random, prompt, answer, other)) and short and short != answer
        wrong = name_somebody_else(random, prompt, answer, other)
        assert ("Mia" in wrong) + ("Tom" in wrong) == 1 and len(wrong.split()) == 4
        assert 3 <= repeat(random, prompt, answer, other).count(answer) <= 5
        assert answer_something_else(random, prompt, answer, other) == other
        assert go_on(random, prompt, answer, other) == f"{answer} {other}"
    assert name_somebody_else(Random(0), prompt, "It was red.", other) == "It was red."  # a way that does not spoil it

"""demo/arithmetic: the same for everyone, splits apart, every step and answer right, and read by `numeric_match`."""

import re
from collections import Counter

import pytest

from llmlab.data.chat.conversations import load_conversations
from llmlab.data.chat.makers import PromptEncoder
from llmlab.data.demo import CORPORA, demo_shards, read_shard
from llmlab.data.demo.arithmetic import WORDINGS, work
from llmlab.data.sources import Tally, load_text
from llmlab.rewards.matching import numeric_match
from llmlab.settings.data import DataSource


def rows(**options):
    return [row for shard in demo_shards("demo/arithmetic", **options) for row in read_shard(shard)]


def texts(row):
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


def read(question):
    """Returns the problem that a question asks, read by its words: (a, sign, b)."""
    first, second = map(int, re.findall(r"\d+", question))
    if question.startswith("Take"):
        return second, "-", first
    return first, "-" if re.search(r" - | minus ", question) else "+", second


@pytest.fixture(scope="module")
def corpus():
    return rows(size="300kB")


def test_a_corpus_is_its_name(corpus):
    assert rows(size="300kB") == corpus
    assert rows(size="300kB", seed=1) != corpus
    assert sum(shard.size for shard in demo_shards("demo/arithmetic")) == CORPORA["arithmetic"][1]


def test_splits_share_no_problem_in_any_wording_or_order(corpus):
    def problems(of):
        read_rows = (read(texts(row)[0]) for row in of)
        return {(a, sign, b) if sign == "-" else (max(a, b), sign, min(a, b)) for a, sign, b in read_rows}

    held = problems(rows(size="1MB", split="validation"))
    assert {sign for _, sign, _ in held} == {"+", "-"} and len(held) > 100
    assert not held & problems(corpus)


def test_every_answer_and_every_step_is_right(corpus):
    for row in corpus:
        question, answer = texts(row)
        a, sign, b = read(question)
        result = a + b if sign == "+" else a - b
        assert 1 <= a <= 99 and 1 <= b <= 99 and result >= 0
        assert row["answer"] == str(result) and answer.endswith(f"= {result}. #### {result}")
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", answer)
        assert answer == ", ".join(f"{x} {s} {y} = {z}" for x, s, y, z in steps) + f". #### {result}"
        assert int(steps[0][0]) == a and sum(int(y) for _, _, y, _ in steps) == b
        for x, s, y, z in steps:
            assert s == sign and int(z) == (int(x) + int(y) if s == "+" else int(x) - int(y))


def test_all_wordings_and_sizes_are_there(corpus):
    asked = Counter(re.sub(r"\d+", "N", texts(row)[0]) for row in corpus)
    assert set(asked) == {ask.format(a="N", b="N") for asks in WORDINGS.values() for ask in asks}
    assert min(asked.values()) > 0.05 * len(corpus)
    digits = Counter(tuple(len(str(number)) for number in read(texts(row)[0])[::2]) for row in corpus)
    assert set(digits) == {(1, 1), (1, 2), (2, 1), (2, 2)} and min(digits.values()) > 0.05 * len(corpus)
    assert len({texts(row) for row in corpus}) > 0.5 * len(corpus)


@pytest.mark.parametrize(
    ("problem", "worked"),
    [
        ((3, "+", 4), ("3 + 4 = 7", 7)),
        ((47, "+", 35), ("47 + 30 = 77, 77 + 5 = 82", 82)),
        ((82, "-", 35), ("82 - 30 = 52, 52 - 5 = 47", 47)),
        ((60, "-", 60), ("60 - 60 = 0", 0)),
    ],
)
def test_working(problem, worked):
    assert work(*problem) == worked


def test_numeric_match_tells_right_from_wrong(corpus):
    answers = [texts(row)[1] for row in corpus]
    expected = [row["answer"] for row in corpus]
    # the last number alone is wrong, all before it as it should be
    wrong = [
        f"{answer.rpartition(' ')[0]} {int(result) + 1}" for answer, result in zip(answers, expected, strict=True)
    ]
    assert set(numeric_match(answers, answer=expected)) == {1.0}
    assert set(numeric_match(wrong, answer=expected)) == {0.0}
    assert set(numeric_match(["I do not know."] * len(expected), answer=expected)) == {0.0}


def test_every_row_is_an_instruction():
    tally = Tally()
    source = DataSource(name="demo/arithmetic", subset="20kB")
    found = [one["messages"] for one in load_conversations(source).conversations(tally)]
    assert found == [row["messages"] for row in rows(size="20kB")]
    assert tally.documents == len(found) > 50 and not tally.dropped


def test_every_row_is_text_to_pretrain_on():
    read_texts = list(load_text(DataSource(name="demo/arithmetic", subset="20kB")).texts(Tally()))
    assert read_texts == [" ".join(texts(row)) for row in rows(size="20kB")]


def test_every_row_is_a_prompt_with_its_answer_beside_it():
    named = DataSource(name="demo/arithmetic", subset="20kB")
    source = PromptEncoder(None, max_prompt_length=None).open(named)
    for row in rows(size="20kB"):
        read_row = source.read(row)
        assert read_row["prompt"] == row["messages"][:1]
        assert read_row["columns"]["answer"] == row["answer"]

"""demo/chat: the same for everyone, splits apart, in the stories' words, and every answer does what was asked."""

import re
from collections import Counter

import pytest

from llmlab.data.demo import CORPORA, demo_shards, read_shard
from llmlab.data.demo.chat import PLANS
from llmlab.data.sources import load_text
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError


def rows(name="demo/chat", **options):
    return [row for shard in demo_shards(name, **options) for row in read_shard(shard)]


def asked(row):
    return tuple(message["content"] for message in row["messages"] if message["role"] != "assistant")


def talk(*contents, system=None):
    """Returns messages of these turns, the user's first."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


@pytest.fixture(scope="module")
def corpus():
    return rows(size="1MB")


@pytest.fixture(scope="module")
def requests(corpus):
    """Each answer with what stands before it."""
    return [
        row["messages"][: i + 1]
        for row in corpus
        for i, message in enumerate(row["messages"])
        if message["role"] == "assistant"
    ]


def test_a_corpus_is_its_name(corpus):
    assert rows(size="1MB") == corpus
    assert rows(size="1MB", seed=1) != corpus


def test_size_is_what_was_asked_for(corpus):
    size = sum(len(message["content"]) for row in corpus for message in row["messages"])
    assert size == pytest.approx(1e6, rel=0.1)
    assert sum(shard.size for shard in demo_shards("demo/chat")) == CORPORA["chat"][1]


def test_splits_share_no_request(corpus):
    validation = rows(size="2MB", split="validation")
    assert len(validation) > 100
    assert not {asked(row) for row in validation} & {asked(row) for row in corpus}
    assert len({asked(row) for row in corpus}) > 0.9 * len(corpus)


def test_roles_alternate_and_every_plan_is_there(corpus):
    shapes = Counter(tuple(message["role"][0] for message in row["messages"]) for row in corpus)
    assert all(re.fullmatch("s?(ua){1,3}", "".join(shape)) for shape in shapes)
    assert {shape.count("u") for shape in shapes} == {1, 2, 3}
    assert sum(count for shape, count in shapes.items() if shape[0] == "s") > 0.08 * len(corpus)
    assert sum(share for share, *_ in PLANS) == 100


def test_every_slot_is_filled(corpus):
    text = "\n".join(message["content"] for row in corpus for message in row["messages"])
    assert not re.search(r"[{}|]| \s|None|ABOUT", text)
    assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text)
    assert text.isascii()


def test_every_answer_follows_its_instruction(requests, follows):
    assert [messages for messages in requests if not follows(messages)] == []


def test_an_answer_to_something_else_does_not(requests, follows):
    """Answers moved to another conversation's request, which may take one by chance: the same spot, or color."""
    moved = [
        [*messages[:-1], other[-1]]
        for messages, other in zip(requests, requests[5:], strict=False)
        if messages[-1]["content"] != other[-1]["content"]
    ]
    assert sum(map(follows, moved)) < 0.01 * len(moved)
    assert not any(follows([*messages[:-1], {"role": "assistant", "content": ""}]) for messages in requests[:500])


LOST = "Mia the girl went to the park with her red ball. When it was time to go home, the ball was gone. "
SCENE = LOST + "Tom the fox looked under the bench, and there was the ball!"
STORY = "Tell me a story about a fox named Tim who wants to whistle."


@pytest.mark.parametrize(
    ("messages", "good"),
    [
        (talk(f"Who found the ball?\n\n{SCENE}", "Tom found the ball."), True),
        (talk(f"Who found the ball?\n\n{SCENE}", "Tom."), True),
        (talk(f"Who found the ball?\n\n{SCENE}", "Mia found the ball."), False),
        (talk(f"Who found the ball?\n\n{SCENE}", "Mia and Tom found the ball."), False),
        (talk(f"{SCENE}\n\nWhere was the ball?", "It was under the bench."), True),
        (talk(f"{SCENE}\n\nWhere was the ball?", "It was behind the fountain."), False),
        (talk(f"{SCENE}\n\nWhat did Mia lose?", "Mia lost a blue ball."), False),
        (talk(f"Write the ending of this story. {SCENE}", "Mia went home with a smile."), True),
        (talk(f"Write the ending of this story. {SCENE}", "Mia and Ben went home."), False),
        (talk(STORY, "Tim was a little fox. He learned to whistle."), True),
        (talk(STORY, "Timothy was a little fox. He learned to whistle."), False),
        (talk(STORY, "Tim was a little bear. He learned to whistle."), False),
        (talk(STORY, "Tim the fox can whistle.", system="Answer in one sentence."), True),
        (talk(STORY, "Tim is a fox. He can whistle.", system="Answer in one sentence."), False),
        (talk(STORY, "Tim the fox can whistle. The end.", system='Say "The end." at the end.'), True),
        (talk(STORY, "Tim the fox can whistle.", system='Say "The end." at the end.'), False),
        (talk("Who are you?", "I am Mia the owl.", system="You are Mia the owl."), True),
        (talk("Who are you?", "I am Tom the owl.", system="You are Mia the owl."), False),
        (talk("My name is Zoe.", "Hello, Zoe!", STORY, "Tim ...", "What is my name?", "Your name is Zoe."), True),
        (talk("My name is Zoe.", "Hello, Zoe!", STORY, "Tim ...", "What is my name?", "Your name is Tim."), False),
        (talk("I have an orange kite.", "Nice!", "What color is my kite?", "Your kite is orange."), True),
        (talk("I have an orange kite.", "Nice!", "What color is my kite?", "It is orange and red."), False),
        (talk("What does an owl like to eat?", "An owl likes a nut."), True),
        (talk("What does an owl like to eat?", "An owl likes milk."), False),
        (talk("Say hello to Mia and Tom.", "Hello, Mia and Tom!"), True),
        (talk("Say hello to Mia and Tom.", "Hello, Mia!"), False),
        (talk("Say hello to Mia and Tom.", "Good night, Mia and Tom!"), False),
    ],
)
def test_what_is_a_good_answer(messages, good, follows):
    assert follows(messages) is good


def test_the_words_are_those_of_the_stories(corpus):
    stories = {word for row in rows("demo/stories", size="1MB") for word in re.findall(r"\w+", row["text"])}
    words = Counter(
        word for row in corpus for message in row["messages"] for word in re.findall(r"\w+", message["content"])
    )
    assert len(words.keys() & stories) > 0.95 * len(words)
    assert sum(count for word, count in words.items() if word in stories) > 0.95 * words.total()


def test_it_is_no_text_to_pretrain_on():
    with pytest.raises(UserError, match="demo/chat: these are conversations, for llmlab sft"):
        load_text(DataSource(name="demo/chat", subset="10kB"))

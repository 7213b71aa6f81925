"""Demo corpora: the same for everyone, splits apart, and true to their own facts."""

import re

import pytest

from llmlab.data.demo import demo_shards, read_shard
from llmlab.data.demo.stories import PEOPLE, WORLD
from llmlab.settings.errors import UserError


def stories(**options):
    return [row["text"] for shard in demo_shards("demo/stories", **options) for row in read_shard(shard)]


@pytest.fixture(scope="module")
def corpus():
    return stories(size="2MB")


def test_a_corpus_is_its_name(corpus):
    assert stories(size="2MB") == corpus
    assert stories(size="2MB", seed=1) != corpus


def test_size_is_what_was_asked_for(corpus):
    assert sum(map(len, corpus)) == pytest.approx(2e6, rel=0.02)
    assert 4e6 < sum(shard.size for shard in demo_shards("demo/stories")) < 8e6
    assert sum(map(len, stories(size="1kB"))) < 3000


def test_there_are_thousands_of_sentences(corpus):
    sentences = {sentence for story in corpus for sentence in re.split(r'(?<=[.!?"]) ', story)}
    assert len(sentences) > 10_000
    assert len(set(corpus)) > 0.999 * len(corpus)


def test_splits_share_no_story_and_no_cast(corpus):
    validation = stories(size="2MB", split="validation")
    assert len(validation) > 100
    assert not set(validation) & set(corpus)


def test_every_slot_is_filled_and_articles_agree(corpus):
    text = " ".join(corpus)
    assert not re.search(r"[{}|]|\s\s|None", text)
    assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text)
    assert text.isascii()


def test_sums_come_out_right(corpus):
    number = {word: value for value, word in enumerate(WORLD["numbers"])}
    total = r"had (\w+) \w+ in a basket|In \w+ bag \w+ had (\w+) \w+\."
    given = r'"Take (\w+) of my|said \w+ and gave \w+ (\w+)\.'
    left = r"and \w+ had (\w+)\.|counted what was left: (\w+)\."
    checked = 0
    for story in corpus:
        found = [re.search(pattern, story) for pattern in (total, given, left)]
        if all(found):
            a, b, c = (number[next(filter(None, match.groups()))] for match in found)
            assert a - b == c
            checked += 1
    assert checked > 100


def test_people_keep_their_pronouns(corpus):
    pronoun = {person["name"]: person["she"] for person in PEOPLE}
    said = re.findall(r'So (\w+) went home. "I am sorry," (she|he) said', " ".join(corpus))
    assert len(said) > 50
    assert all(pronoun[name] == word for name, word in said)


def test_the_right_tool_and_the_right_food(corpus):
    text = " ".join(corpus)
    tools = {item["thing"]: item["tool"] for item in WORLD["breaks"]}
    needs = re.findall(r"The (\w+) needs ([\w ]+)\.", text)
    assert needs
    assert all(tools[thing] == tool for thing, tool in needs)
    foods = {animal["pet"]: animal["food"] for animal in WORLD["animals"]}
    likes = re.findall(r'"An? (\w+) likes ([\w ]+),"', text)
    assert likes
    assert all(foods[animal] == food for animal, food in likes)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("demo/poems", {}, "demo/poems: there is no such demo corpus .*there is demo/stories, demo/chat"),
        ("demo/story", {}, "did you mean 'stories'"),
        ("demo/stories", {"size": "lots"}, "demo/stories . lots: expected a size such as 2MB"),
        ("demo/stories", {"size": "0MB"}, "expected a size"),
        ("demo/stories", {"split": "valdation"}, "did you mean 'validation'"),
    ],
)
def test_what_does_not_exist_is_named(name, options, message):
    with pytest.raises(UserError, match=message):
        demo_shards(name, **options)

"""demo/tools and demo/tasks: the same for everyone, splits apart, episodes as the simulator plays them."""

import json
from random import Random

import pytest

from llmlab.data.chat.messages import normalize_call
from llmlab.data.demo import demo_shards, read_shard, tools
from llmlab.data.demo.tools import LAST, PROMPT
from llmlab.data.sources import load_rows
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError
from llmlab.simulator.environment import tools_of
from llmlab.simulator.world import Simulator


def rows(name, **options):
    return [row for shard in demo_shards(name, **options) for row in read_shard(shard)]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_tasks_are_prompts_of_the_simulator(split):
    tasks = rows("demo/tasks", size="40kB" if split == "train" else "400kB", split=split)
    assert tasks == rows("demo/tasks", size="40kB" if split == "train" else "400kB", split=split) and len(tasks) > 100
    simulator = Simulator()
    for row in tasks:
        simulator.reset(**row)
        category, difficulty, part, _ = row["task"].split("/")
        assert row["category"] == category == simulator.task.category
        assert row["difficulty"] == int(difficulty) == simulator.task.difficulty
        assert part == {"train": "train", "validation": "held_out"}[split]
        assert row["expected_steps"] == len(simulator.task.expected)
        assert row["prompt"] == [{"role": "user", "content": PROMPT}]
    difficulties = [row["difficulty"] for row in tasks]
    assert set(difficulties) == {1, 2, 3, 4} and difficulties.count(1) > difficulties.count(2) > difficulties.count(4)
    assert len({row["category"] for row in tasks}) == 5


def test_one_difficulty():
    assert {row["difficulty"] for row in rows("demo/tasks/3", size="10kB")} == {3}
    with pytest.raises(UserError, match="demo/tasks/5: there is no such demo corpus"):
        demo_shards("demo/tasks/5")


def test_episodes_are_solved_as_the_simulator_plays_them():
    simulator = Simulator()
    episodes = rows("demo/tools/1", size="60kB")
    assert len(episodes) > 15
    for row in episodes:
        first, *turns, last = row["messages"]
        assert first["content"].startswith(PROMPT) and last == {"role": "assistant", "content": LAST}
        assert [turn["role"] for turn in turns] == ["assistant", "tool"] * (len(turns) // 2)
        assert {tool["function"]["name"] for tool in json.loads(row["tools"])} == set(tools_of(simulator))
        for made, result in zip(turns[::2], turns[1::2], strict=True):
            (call,) = map(normalize_call, made["tool_calls"])
            assert call["function"]["name"] in tools_of(simulator) and not result["content"].startswith("error")


def test_an_episode_begins_with_the_prompt_and_the_text_of_reset():
    for seed in range(20):
        task = tools.write_task(Random(seed), validation=False)
        conversation = tools.write_row(Random(seed), validation=False)
        goal = Simulator().reset(**task)
        assert conversation["messages"][0] == {"role": "user", "content": task["prompt"][0]["content"] + goal}


@pytest.mark.parametrize("name", ["demo/tools", "demo/tasks", "demo/tools/2"])
def test_they_are_sources(name):
    source = load_rows(DataSource(name=name, subset="20kB", split="validation"), "chat")
    assert source.splits == ("train", "validation") and len(source.first()) >= 1
    assert {"messages", "prompt"} & source.first()[0].keys()

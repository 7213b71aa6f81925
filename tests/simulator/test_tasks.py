"""Generated tasks: thousands in each category and difficulty, splits apart, solved by the expert and not by chance."""

import re
from random import Random

import pytest

from llmlab.simulator.tasks import generate_task, grammar
from llmlab.simulator.world import Simulator, play_scripted, random_calls

LEVELS = [(category, level) for category, levels in grammar()["categories"].items() for level in levels]


def test_categories_and_difficulties():
    assert {category for category, _ in LEVELS} == {
        "tool_use",
        "multi_step",
        "code_generation",
        "search_and_edit",
        "refactor",
    }
    assert {level for _, level in LEVELS} == {1, 2, 3, 4} and len(LEVELS) == 20


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_thousands_of_distinct_tasks(level):
    tasks = (generate_task(*level, "train", seed) for seed in range(2_300))
    assert len({(task.goal, str(task.files)) for task in tasks}) >= 2_000


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_splits_share_no_wording_and_no_name(level):
    def compounds(split):
        tasks = [generate_task(*level, split, seed) for seed in range(150)]
        return {word for task in tasks for word in re.findall(r"[a-z]+_[a-z]+", f"{task.goal} {task.files}")}

    templates = grammar()["categories"][level[0]][level[1]]
    assert all(template["train"] and template["held_out"] for template in templates)
    for template in templates:
        assert not set(template["train"]) & {goal for other in templates for goal in other["held_out"]}
    train, held_out = compounds("train"), compounds("held_out")
    assert train and held_out and not train & held_out


def test_the_expert_solves_all_and_chance_nearly_none():
    simulator, successes, episodes = Simulator(), 0, 0
    for category, level in LEVELS:
        for split in ("train", "held_out"):
            for seed in range(20):
                task = f"{category}/{level}/{split}/{seed}"
                simulator.reset(task)
                observations = play_scripted(simulator, simulator.task.expected)
                assert simulator.success and simulator.calls == len(simulator.task.expected), task
                assert not any(found.startswith("error") for found in observations), task
                assert simulator.get_reward() == simulator.reward_range[1]
                simulator.reset(task)
                play_scripted(simulator, random_calls(simulator, Random(seed)))
                assert simulator.get_reward() < simulator.reward_range[1]
                successes, episodes = successes + simulator.success, episodes + 1
    assert episodes == 800 and successes <= 0.02 * episodes


def test_the_expert_solves_3000_more():
    simulator = Simulator()
    for seed in range(3_000):
        category, level = LEVELS[seed % len(LEVELS)]
        simulator.reset(f"{category}/{level}/train/{seed}")
        play_scripted(simulator, simulator.task.expected)
        assert simulator.success, simulator.task


@pytest.mark.parametrize("kind", ["adjective", "noun", "verb", "fruit"])
def test_no_word_is_a_part_of_another(kind):
    words = grammar()["words"][kind]
    assert [(a, b) for a in words for b in words if a != b and a in b] == []


@pytest.mark.parametrize("category", grammar()["categories"])
def test_adjectives_and_nouns_that_meet_are_of_one_split(category):
    words = grammar()["words"]
    pattern = re.compile(
        rf"\b({'|'.join(words['adjective'])}) ({'|'.join(words['noun'])})\b".replace(r"\b", r"(?<![a-z])", 1)
    )

    def pairs(split):
        tasks = [generate_task(category, 1 + seed % 4, split, seed) for seed in range(500)]
        return {pair for task in tasks for pair in pattern.findall(f"{task}".replace("_", " "))}

    train, held_out = pairs("train"), pairs("held_out")
    assert len(train) > 500 and len(held_out) > 100 and not train & held_out


@pytest.mark.parametrize("level", [3, 4])
def test_a_line_that_replaces_its_file_is_no_edit(level):
    simulator = Simulator()
    for seed in range(40):
        task = generate_task("search_and_edit", level, "train", seed)
        simulator.reset(f"search_and_edit/{level}/train/{seed}")
        for name, change in task.expected:
            if name == "search_replace":
                (line,) = [each for each in task.files[change["path"]].split("\n") if change["search"] in each]
                simulator.write_file(change["path"], line.replace(change["search"], change["replace"]))
        assert not simulator.success


def test_first_tasks_are_short_and_later_ones_longer():
    def mean_calls(level):
        return sum(
            len(generate_task(c, level, "train", seed).expected)
            for c, at in LEVELS
            if at == level
            for seed in range(40)
        )

    for seed in range(100):
        for category in grammar()["categories"]:
            task = generate_task(category, 1, "train", seed)
            assert len(task.expected) <= 2 and len(task.goal) <= 90
    assert mean_calls(1) < mean_calls(2) < mean_calls(4)

"""The simulator's tools, the rewards of the guide's `reward_config`, ends of episodes, schemas, records."""

import json
import subprocess
import sys
from typing import get_args

import pytest
from transformers.utils import get_json_schema

from llmlab.settings.errors import UserError
from llmlab.settings.rewards import RewardConfig
from llmlab.simulator.environment import tools_of
from llmlab.simulator.tasks import Call
from llmlab.simulator.world import MAX_OBSERVATION, Simulator, play_scripted

EDIT = {
    "goal": "Make it blue.",
    "files": {"a.txt": "red cup\n", "src/b.py": "x = 1\n"},
    "expected": [["read_file", {"path": "a.txt"}], ["search_replace", {"path": "a.txt"}]],
    "success": {"file_equals": {"a.txt": "blue cup"}},
}
QUESTION = {
    "goal": "What is in a.txt?",
    "files": {"a.txt": "red cup\n"},
    "expected": [["read_file", {"path": "a.txt"}], ["submit", {"answer": "red cup"}]],
    "success": {"answer_equals": "red cup"},
}


@pytest.fixture
def simulator():
    return Simulator()


def components(simulator):
    return {name: value for name, value in simulator.rewards.items() if value}


def test_tools(simulator):
    assert simulator.reset(EDIT) == "Make it blue."
    assert simulator.read_file("./a.txt") == "red cup\n"
    assert simulator.list_dir("/") == "a.txt\nsrc/" and simulator.glob("**/*.py") == "src/b.py"
    assert simulator.grep("re?d", "/") == "a.txt: red cup" and simulator.grep("green", ".") == "none"
    assert simulator.run_command("cat a.txt | wc -l") == "1\n"
    assert simulator.write_file("new/c.txt", "x") == "ok" and simulator.read_file("new/c.txt") == "x"
    assert simulator.search_replace("new/c.txt", "x", "yy") == "ok: 1 replaced"
    assert simulator.search_replace("new/c.txt", "x", "y") == "error: new/c.txt: 'x' is not in it"
    assert simulator.read_file("none") == "error: none: no such file" and not simulator.done


def test_the_expert_of_the_guide(simulator):
    simulator.reset(EDIT)
    edit = Call("search_replace", {"path": "a.txt", "search": "red", "replace": "blue"})
    play_scripted(simulator, [Call("read_file", {"path": "/a.txt"}), edit])
    assert simulator.done and simulator.success and simulator.calls == 2
    expected = {"task_complete": 10, "correct_tool": 2 * 5, "schema_pass": 2 * 2, "step_penalty": 2 * -0.5}
    assert components(simulator) == expected and simulator.get_reward() == 23
    assert simulator.read_file("a.txt") == "error: the episode is over" and simulator.calls == 2


def test_every_component(simulator):
    simulator.reset(EDIT)
    assert components(simulator) == {"task_failed": -5} and simulator.get_reward() == -5
    simulator.list_dir("src")  # wrong
    simulator.list_dir("src")  # wrong and redundant
    simulator.read_file("a.txt")  # correct
    simulator.read_file("/a.txt")  # wrong, since it is expected once; not redundant, since it is another text
    simulator.read_file(path=7)  # no text: a schema failure
    simulator.read_file()
    simulator.write_file("src/b.py", "x = 2\n")  # style
    simulator.write_file("src/b.py", "x = (\n")  # does not parse
    assert (
        simulator._reject("delete", {"path": "a.txt"}, "there is no tool delete") == "error: there is no tool delete"
    )
    assert components(simulator) == {
        "task_failed": -5,
        "step_penalty": 9 * -0.5,
        "schema_pass": 6 * 2,
        "schema_fail": 3 * -5,
        "correct_tool": 5,
        "wrong_tool": 8 * -3,
        "redundant_action": -2,
        "style_pass": 1,
    }
    assert simulator.get_reward() == sum(simulator.rewards.values()) and simulator.calls == 9
    simulator.search_replace("a.txt", "red", "blue")
    assert simulator.success and "task_failed" not in components(simulator)


def test_components_follow_the_settings():
    config = RewardConfig(**dict.fromkeys(RewardConfig.model_fields, 0.0) | {"correct_tool": 0.25})
    simulator = Simulator(reward_config=config)
    simulator.reset(QUESTION)
    simulator.read_file("a.txt")
    assert simulator.get_reward() == 0.25 and simulator.rewards.keys() == RewardConfig.model_fields.keys()


@pytest.mark.parametrize(("answer", "success", "reward"), [("red cup ", True, 23), ("blue", False, 8)])
def test_an_answer_ends_the_episode(simulator, answer, success, reward):
    simulator.reset(QUESTION)
    play_scripted(simulator, [Call("read_file", {"path": "a.txt"}), Call("submit", {"answer": answer})])
    assert simulator.done and simulator.success is success and simulator.get_reward() == reward
    assert "submit" in simulator.stop_tools


def test_a_guardrail_ends_the_episode(simulator, tmp_path):
    simulator.reset(EDIT)
    assert simulator.run_command("rm -rf /") == "error: guardrails: erase-everything, destructive-command"
    assert simulator.done and not simulator.success
    assert components(simulator) == {
        "task_failed": -5,
        "guardrail_violation": -10,
        "step_penalty": -0.5,
    }
    path = tmp_path / "mine.yaml"
    path.write_text("deny: [{name: greetings, pattern: hello}]")
    own = Simulator(guardrails=path)
    own.reset(EDIT)
    assert own.write_file("b.txt", "well\nHELLO") == "error: guardrails: greetings" and "b.txt" not in own._files.texts


def test_reward_range(simulator):
    simulator.reset("multi_step/1/train/1")
    assert simulator.reward_range == (-15, 10 + 2 * (5 + 2 - 0.5)) and simulator.calls == 0
    simulator.reset({"goal": "x", "success": {"answer_equals": "x"}})
    assert simulator.reward_range == (-15, 10 + 5 + 2 - 0.5)
    own = {**QUESTION, "success": {"answer_equals": "x"}, "expected": [["list_dir", {"path": "x"}]]}
    simulator.reset(own)  # an expert that fails
    assert simulator.reward_range == (-15, 16.5)


def test_schemas_are_what_trl_derives():
    tools = tools_of(Simulator())
    assert set(tools) == {
        "read_file",
        "write_file",
        "search_replace",
        "list_dir",
        "glob",
        "grep",
        "run_command",
        "submit",
    }
    assert set(tools) == set(get_args(Call.__annotations__["tool"]))
    for name, tool in tools.items():
        function = get_json_schema(tool)["function"]
        parameters = function["parameters"]
        assert function["name"] == name and function["description"] and "return" not in function
        assert parameters["required"] == list(parameters["properties"])
        assert all(each["type"] == "string" and each["description"] for each in parameters["properties"].values())


def test_long_observations_are_cut(simulator):
    simulator.reset({**EDIT, "files": {"a.txt": "x" * 10_000}})
    found = simulator.read_file("a.txt")
    assert found.startswith("x" * MAX_OBSERVATION + "\n") and found.endswith("... 6,000 characters more")


TRACE = """
import json
from random import Random
from llmlab.simulator.world import play_scripted, random_calls
from llmlab.simulator.tasks import grammar
from llmlab.simulator.world import Simulator
simulator = Simulator()
for category, levels in grammar()["categories"].items():
    for level in levels:
        for seed in range(2):
            goal = simulator.reset(f"{category}/{level}/train/{seed}")
            play_scripted(simulator, random_calls(simulator, Random(seed), 12))
            print(json.dumps([goal, simulator.task.files, simulator._trace, simulator.rewards]))
"""


def test_same_seed_same_trace_in_any_process():
    def trace(hash_seed):
        environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)}
        return subprocess.run([sys.executable, "-c", TRACE], env=environment, capture_output=True, check=True).stdout

    first = trace("1")
    assert first == trace("2") and len(first.splitlines()) == 40
    assert any(json.loads(line)[2] for line in first.splitlines())


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("tool_use/1/train", "expected category/difficulty/split/seed"),
        ("tool_uses/1/train/3", "did you mean 'tool_use'"),
        ("tool_use/5/train/3", "5: expected one of 1, 2, 3, 4"),
        ("tool_use/1/heldout/3", "did you mean 'held_out'"),
        ("{broken", "task = {broken"),
        ({"goal": "x"}, "success: Field required"),
        ({**EDIT, "file": {}}, "file: Extra inputs are not permitted; did you mean 'files'"),
        ({**EDIT, "expected": [["open", {"path": "a.txt"}]]}, "expected.0.0: Input should be 'read_file', "),
        (
            {"goal": "x", "success": {"python_equals": {"a.py": "x = ("}}},
            "success.python_equals.a.py: expected Python",
        ),
        ({**EDIT, "difficulty": 0}, "difficulty: Input should be greater"),
        ({**EDIT, "files": {"../x": "y"}}, "outside of the file system"),
        ({**EDIT, "files": {"a.txt": "blue cup"}}, "hold before the first call"),
    ],
)
def test_wrong_tasks_are_errors(simulator, task, words):
    with pytest.raises(UserError, match=words):
        simulator.reset(task)


def test_tasks_as_json_and_as_arrow_gives_them(simulator):
    padded = {**EDIT, "files": {**EDIT["files"], "of_another_row": None}, "category": None}
    for task in (json.dumps(EDIT), padded):
        simulator.reset(task, prompt="x", expected_steps=2)
        assert simulator.task.files == EDIT["files"] and simulator.task.category == "own"


def test_a_difficulty_as_text_is_an_error(simulator):
    with pytest.raises(UserError, match="'2': expected one of 1, 2, 3, 4"):
        simulator.reset("refactor/1/train/3", difficulty="2")


def test_difficulty_replaces_that_of_the_id(simulator):
    assert simulator.reset("refactor/1/train/3", difficulty=4) == simulator.reset("refactor/4/train/3")


@pytest.mark.parametrize(
    ("test", "wins", "loses"),
    [
        ({"file_contains": {"a.txt": "blue"}}, ("a.txt", "a blue cup"), ("a.txt", "red")),
        ({"file_equals": {"b.txt": "1\n2"}}, ("b.txt", "1 \n2\n\n"), ("b.txt", "1\n\n2")),
        ({"python_equals": {"m.py": "x = 1"}}, ("m.py", "x=1  # one\n"), ("m.py", "x = 2")),
    ],
)
def test_success_tests(simulator, test, wins, loses):
    for written, success in ((loses, False), (wins, True)):
        simulator.reset({**EDIT, "success": test})
        simulator.write_file(*written)
        assert simulator.success is success

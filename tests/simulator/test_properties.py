"""Whatever is called becomes an observation and rewards: no exception, no disk, no process, no network."""

import builtins
import inspect
import io
import json
import os
import socket
import subprocess
import time
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmlab.simulator.environment import tools_of
from llmlab.simulator.tasks import grammar, read_task
from llmlab.simulator.world import MAX_OBSERVATION, Simulator

SIMULATOR = Simulator()
TOOLS = tools_of(SIMULATOR)
TASKS = [f"{category}/{level}/train/7" for category, levels in grammar()["categories"].items() for level in levels]
WORDS = ["ls", "cat", "head", "-n", "|", ">", ">>", "grep", "sort", "find", ".", "*", "a.txt", "'", '"', "\\", "$"]
WORDS += ["uniq", "wc", "tail", "+", "-c", "echo", "(", "[", "{9}", "**", "../", "/", "\n", "\0", "é", "1", "-k", "-1"]
texts = (
    st.text(max_size=40)
    | st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
    | st.lists(st.sampled_from(WORDS), max_size=12).map("".join)
    | st.sampled_from(["(a|aa)+$", "x{99999999}", "(?:a?){30}a{30}", "a" * 1_000_000, "\ud800", "(" * 300])
)
values = (
    texts
    | st.none()
    | st.integers()
    | st.just(10**5000)
    | st.lists(texts, max_size=2)
    | st.dictionaries(texts, texts, max_size=2)
)


@st.composite
def calls(draw):
    name = draw(st.sampled_from([*TOOLS, "open", ""]))
    if name not in TOOLS:
        return name, draw(values)
    names = list(inspect.signature(TOOLS[name]).parameters)
    right = st.fixed_dictionaries(dict.fromkeys(names, texts))
    return name, draw(right | st.dictionaries(st.sampled_from([*names, "self", "cls", "x"]), values, max_size=4))


@contextmanager
def sealed():
    """Makes disk, processes and network fail."""

    def refuse(*arguments, **options):
        raise AssertionError("the world was left")

    places = {
        builtins: ["open"],
        io: ["open"],
        os: ["open", "stat", "listdir", "scandir", "remove", "system", "mkdir"],
    }
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in {**places, subprocess: ["Popen"], socket: ["socket"]}.items():
            for name in names:
                patch.setattr(owner, name, refuse)
        yield


FRAMES = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@FRAMES
@given(task=st.sampled_from(TASKS), made=st.lists(calls(), min_size=1, max_size=6))
def test_any_call_is_an_observation(task, made):
    SIMULATOR.reset(task)
    names = {*SIMULATOR.rewards}
    for name, arguments in made:
        done, calls_before, begin = SIMULATOR.done, SIMULATOR.calls, time.perf_counter()
        with sealed():
            if name in TOOLS and isinstance(arguments, dict):
                found = TOOLS[name](**arguments)
            else:
                found = SIMULATOR._reject(name, arguments, "this cannot be called")
        assert isinstance(found, str) and found.encode() is not None and len(found) <= MAX_OBSERVATION + 40
        assert SIMULATOR.calls == calls_before + (not done)
        assert time.perf_counter() - begin < 5
    assert SIMULATOR.rewards.keys() == names
    assert SIMULATOR.get_reward() == sum(SIMULATOR.rewards.values())
    assert SIMULATOR.rewards["step_penalty"] == -0.5 * SIMULATOR.calls
    schemas = SIMULATOR.rewards["schema_pass"] / 2 + SIMULATOR.rewards["schema_fail"] / -5
    assert schemas + SIMULATOR.rewards["guardrail_violation"] / -10 == SIMULATOR.calls == len(SIMULATOR._trace)
    json.dumps(SIMULATOR._trace)


@FRAMES
@given(command=st.lists(st.sampled_from(WORDS), max_size=14).map(" ".join) | st.text(max_size=60))
def test_any_command_leaves_the_other_files(command):
    task = read_task("search_and_edit/3/train/3")
    with sealed():
        SIMULATOR._start(task)
        SIMULATOR.run_command(command)
    if ">" not in command:
        assert SIMULATOR._files.texts == task.files


def test_broken_json_and_unknown_tools():
    SIMULATOR.reset(TASKS[0])
    for name, arguments in ((None, "{'path': "), ("read_file", "[1, 2"), ("erase", {}), ("read_file", [[[[[]]]]])):
        assert SIMULATOR._reject(name, arguments, "no JSON") == "error: no JSON"
    assert SIMULATOR.rewards["schema_fail"] == -20 and SIMULATOR.rewards["wrong_tool"] == -12
    assert "at most 20,000 characters" in SIMULATOR.read_file("x" * 1_000_000)


def test_a_slow_pattern_is_an_observation():
    SIMULATOR.reset({"goal": "x", "files": {"a": "a" * 5000 + "b"}, "success": {"answer_equals": "x"}})
    assert SIMULATOR.grep("(a|aa)+$", ".") == "error: this pattern takes too long"
    assert SIMULATOR.rewards["schema_pass"] == 2


def test_many_lines_share_the_time_of_a_pattern():
    line = "a" * 13 + "b\n"  # less than a millisecond each
    SIMULATOR.reset(
        {"goal": "x", "files": {f"{n}": line * 1_000 for n in range(20)}, "success": {"answer_equals": "x"}}
    )
    for observe in (lambda: SIMULATOR.grep("(a|aa)+$", "."), lambda: SIMULATOR.run_command("grep -r '(a|aa)+$' .")):
        begin = time.perf_counter()
        assert observe() == "error: this pattern takes too long"
        assert time.perf_counter() - begin < 1


def test_a_slow_guardrail_is_an_observation(tmp_path, monkeypatch):
    monkeypatch.setattr("llmlab.simulator.guardrails.TIMEOUT", 0.05)
    path = tmp_path / "slow.yaml"
    path.write_text("deny: [{name: slow, pattern: '(a|aa)+$'}]")
    simulator = Simulator(guardrails=path)
    simulator.reset({"goal": "x", "success": {"answer_equals": "x"}})
    assert "catastrophic backtracking" in simulator.write_file("b.txt", "a" * 5000 + "b")
    assert simulator.rewards["schema_fail"] == -5 and not simulator.done and not simulator._files.texts

"""Scripted policies, the two ends of the scale for a model's: the expert, who solves every task, and chance."""

from random import Random
from typing import Any

from llmlab.simulator.environment import Environment, tools_of
from llmlab.simulator.tasks import Call, ToolTask

_BAD = (None, 7, [], {"path": 1}, "{", "x" * 50)


def expert_calls(task: ToolTask) -> list[Call]:
    """Returns the calls that solve a task."""
    return list(task.expected)


def random_calls(task: ToolTask, random: Random, count: int = 20) -> list[Call]:
    """Returns calls of random tools, some of which do not exist, with random arguments, some of which are wrong."""
    tools = {
        "read_file": ("path",),
        "write_file": ("path", "content"),
        "search_replace": ("path", "search", "replace"),
        "list_dir": ("path",),
        "glob": ("pattern",),
        "grep": ("pattern", "path"),
        "run_command": ("command",),
        "open": ("path",),
    }
    words = [*task.files, *task.goal.split(), "ls", "*", "."]

    def pick(choices: Any) -> Any:
        return choices[int(random.random() * len(choices))]

    def argument() -> Any:
        return pick(_BAD) if random.random() < 0.1 else pick(words)

    names = [pick([*tools, "submit"] if random.random() < 0.2 else [*tools]) for _ in range(count)]
    return [Call(name, {key: argument() for key in tools.get(name, ("answer",))}) for name in names]


def play_scripted(environment: Environment, calls: list[Call]) -> list[str]:
    """Makes calls until the episode is done, and returns their observations."""
    tools, observations = tools_of(environment), []
    for name, arguments in calls:
        if environment.done:
            break
        call = tools.get(name)
        found = call(**arguments) if call else environment._reject(name, arguments, f"there is no tool {name}")
        observations.append(found)
    return observations

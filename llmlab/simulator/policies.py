"""Scripted policies, the two ends of the scale for a model's: the expert, who solves every task, and chance."""

from inspect import signature
from random import Random
from typing import Any

from llmlab.simulator.environment import Environment, tools_of
from llmlab.simulator.tasks import Call, ToolTask
from llmlab.simulator.world import Simulator


def expert_calls(task: ToolTask) -> list[Call]:
    """Returns the calls that solve a task."""
    return list(task.expected)


def random_calls(environment: Simulator, random: Random, count: int = 20) -> list[Call]:
    """Returns calls of random tools, one of which does not exist, with random arguments, some of which are wrong."""
    tools = {name: [*signature(tool).parameters] for name, tool in tools_of(environment).items()}
    words = [*environment.task.files, *environment.task.goal.split(), "ls", "*", ".", None, 7, {"path": 1}, "x" * 50]

    def pick(choices: list[Any]) -> Any:
        return choices[int(random.random() * len(choices))]

    names = [pick([*tools, "open"]) for _ in range(count)]
    return [Call(name, {key: pick(words) for key in tools.get(name, ["path"])}) for name in names]


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

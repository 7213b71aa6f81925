"""Tasks of the simulator: the expert's episodes (`demo/tools`), and prompts for learning from rewards (`demo/tasks`).
Tasks of the validation split are held-out ones: other wordings, names and layouts. A last part of the name is one
difficulty, as in `demo/tasks/1`; without it the easier ones are more frequent."""

import json
from functools import cache
from random import Random
from typing import Any

from llmlab.simulator.environment import schemas_of
from llmlab.simulator.tasks import grammar, pick
from llmlab.simulator.world import Simulator, play_scripted

PROMPT = "Task: "  # the environment appends the goal
LAST = "Done."
SCHEMAS_SHARE = 1 / 32
"""Of the texts that begin with the schemas of all tools."""
DIFFICULTIES = (1, 1, 1, 1, 1, 2, 2, 2, 3, 4)


def write_task(random: Random, *, validation: bool, difficulty: int | None = None) -> dict[str, Any]:
    """Returns a prompt and the columns that the simulator and rewards read."""
    category, level = pick(random, list(grammar()["categories"])), difficulty or pick(random, DIFFICULTIES)
    task = f"{category}/{level}/{'held_out' if validation else 'train'}/{int(random.random() * 1e9)}"
    simulator = Simulator()
    simulator.reset(task)
    return {
        "prompt": [{"role": "user", "content": PROMPT}],
        "task": task,
        "category": category,
        "difficulty": level,
        "expected_steps": len(simulator.task.expected),
    }


def write_row(random: Random, *, validation: bool, difficulty: int | None = None) -> dict[str, Any]:
    """Returns an episode of the expert as a conversation with tools, and as plain text."""
    simulator = Simulator()
    goal = simulator.reset(write_task(random, validation=validation, difficulty=difficulty)["task"])
    calls = simulator.task.expected
    messages: list[dict[str, Any]] = [{"role": "user", "content": PROMPT + goal}]
    lines = [PROMPT + goal]
    for call, observation in zip(calls, play_scripted(simulator, calls), strict=True):
        function = {"name": call.tool, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
        called = [{"type": "function", "function": function}]
        messages.append({"role": "assistant", "content": "", "tool_calls": called})
        lines += [f'{{"name": "{call.tool}", "arguments": {function["arguments"]}}}', observation]
        messages.append({"role": "tool", "content": observation})
    if random.random() < SCHEMAS_SHARE:  # so that a tokenizer and a model that begin here know their words
        lines.insert(0, _schemas())
    messages.append({"role": "assistant", "content": LAST})
    return {"messages": messages, "tools": _schemas(), "text": "\n".join(lines)}


@cache
def _schemas() -> str:
    """Returns the JSON schemas of the simulator's tools, as trainers derive them."""
    return json.dumps(schemas_of(Simulator))

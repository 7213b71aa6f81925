"""Rewards for tool calls: whether they succeed, how many there are, and whether they are the allowed ones. Calls are
the messages' `tool_calls`, or those in text that `calls` reads; tools run elsewhere."""

import ast
import json
import re
from contextlib import suppress
from typing import Annotated, Any

from annotated_types import Ge

from llmlab.data.chat.messages import UnusableRow, parse_tools, result_text, text_of
from llmlab.rewards.completions import Completion, answer, read_messages, tool_calls
from llmlab.rewards.function import Row, RowError, Score, reward_function
from llmlab.settings.errors import UserError

_ERROR = re.compile(r"\s*(?:[A-Za-z_.]*(?:error|exception)\s*(?::|\Z)|traceback \(most recent)", re.IGNORECASE)


@reward_function()
def tool_success(completion: Completion, row: Row, *, absent: Annotated[float, Ge(0)] | None = 0.0) -> Score:
    """Scores the share of tool calls that succeed.

    In an episode a call succeeds when a result follows it that is no error: not `{"error": ...}`, `"success": false`,
    `"status": "error"`, `"is_error": true`, nor a text that starts like an exception. Where nothing ran (a text, or
    messages without results) a call succeeds when it is well-formed and, with a column `tools`, names one of them:
    names or JSON schemas, as lists or JSON text.

    Args:
        absent: the score without any call, at most 1; None says that the reward does not apply. Rows whose `tools` are
            empty never get it.

    Returns:
        A share from 0 to 1; `absent` without calls.

    Source: seed, RL guide, section 3.
    """
    calls = tool_calls(completion)
    results = [message["content"] for message in read_messages(completion) if message["role"] == "tool"]
    offered = names_of(row.get("tools"))
    if not calls:
        return absent if offered or "tools" not in row else None
    if results:
        succeeded = sum(not is_error(result) for result in results)
        return min(succeeded / max(len(calls), len(results)), 1.0)
    return sum(call.name is not None and (offered is None or call.name in offered) for call in calls) / len(calls)


@reward_function(weight=-0.1, high="most")
def verbosity_penalty(
    completion: Completion, row: Row, *, steps: Annotated[int, Ge(0)] = 1, most: Annotated[int, Ge(1)] = 20
) -> float:
    """Counts the steps, that is tool calls, beyond the expected number; its weight is negative.

    The column `expected_steps` holds the number of calls that a row needs. The length of a text is scored by `length`.

    Args:
        steps: the expected number where there is no such column or value.
        most: the largest count: the guide's `max_episode_length`, with which its bound of -2.5 comes out.

    Returns:
        Extra steps, from 0 to `most`.

    Source: seed, RL guide, section 3, "Per extra step".
    """
    expected = row.get("expected_steps")
    extra = len(tool_calls(completion)) - (steps if expected is None else int(expected))
    return float(min(max(extra, 0), most))


@reward_function(weight=-0.5)
def off_policy_penalty(
    completion: Completion, row: Row, *, only_tools: list[str] | None = None, only_answers: list[str] | None = None
) -> Score:
    """Marks completions that deviate from what is expected: a tool or an answer outside the allowed ones.

    The columns `allowed_tools` (an empty list allows none) and `allowed_answers` (compared without surrounding space)
    say what a row allows. A single deviation counts fully, however many calls there are; a call that cannot
    be read is one.

    Args:
        only_tools: allowed tools where the column does not say.
        only_answers: allowed answers where the column does not say.

    Returns:
        1 for a deviation, else 0 (the weight is negative); None where a row says neither.

    Source: seed, RL guide, section 3, "Deviates from expected".
    """
    if only_tools is only_answers is None and row.keys().isdisjoint(("allowed_tools", "allowed_answers")):
        raise UserError("expected `only_tools` or `only_answers`, or a column `allowed_tools` or `allowed_answers`")
    tools, answers = row.get("allowed_tools"), row.get("allowed_answers")
    tools = names_of(only_tools if tools is None else tools)
    answers = only_answers if answers is None else [answers] if isinstance(answers, str) else answers
    if tools is None and answers is None:
        return None
    deviates = tools is not None and any(call.name not in tools for call in tool_calls(completion))
    if answers is not None:
        deviates |= answer(completion).strip() not in {str(text).strip() for text in answers}
    return float(deviates)


def names_of(tools: Any) -> set[str] | None:
    """Returns the names of tools given as names or as JSON schemas, also in JSON text; None for None."""
    if tools is None:
        return None
    try:
        functions = [tool if isinstance(tool, str) else tool.get("function") or tool for tool in parse_tools(tools)]
        return {text_of(each if isinstance(each, str) else each["name"]) for each in functions}
    except (UnusableRow, AttributeError, KeyError, TypeError):
        expected = "a list of names or schemas with a name, also as JSON text"
        raise RowError(f"tools: expected {expected}, found {tools!r:.100}") from None


def is_error(result: Any) -> bool:
    """Whether a tool's result is an error, in the ways that tools and trainers write one."""
    result = result_text(result) if isinstance(result, list) else result
    if isinstance(result, str):
        for read in (json.loads, ast.literal_eval):  # the second reads `str({...})`: literals only, nothing runs
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                if isinstance(value := read(result.strip()), dict):
                    return is_error(value)
        return _ERROR.match(result) is not None
    return isinstance(result, dict) and (
        bool(result.get("error"))
        or any(result.get(key) is True for key in ("is_error", "isError"))
        or any(result.get(key) is False for key in ("success", "ok"))
        or str(result.get("status", "")).lower() in ("error", "failed", "failure")
    )

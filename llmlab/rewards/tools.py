"""Rewards for tool calls: whether they succeed, how many there are, and whether they are the allowed ones.

Calls are the messages' `tool_calls`, or those in text that `calls.py` reads. Running tools is the trainer's or the
environment's business; here are only the records.
"""

import ast
import json
import re
from typing import Annotated, Any

from annotated_types import Ge

from llmlab.data.chat.messages import UnusableRow, parse_tools, result_text
from llmlab.rewards.calls import tool_calls
from llmlab.rewards.completions import Completion, answer, tool_results
from llmlab.settings.errors import UserError

_ERROR = re.compile(r"\s*(?:[A-Za-z_.]*(?:error|exception)\s*(?::|\Z)|traceback \(most recent)", re.IGNORECASE)


def tool_success(
    completions: list[Completion],
    tools: list[Any] | None = None,
    *,
    absent: Annotated[float, Ge(0)] | None = 0.0,
    **columns: Any,
) -> list[float | None]:
    """Scores the share of tool calls that succeed.

    In an episode a call succeeds when a result follows it that is no error: not `{"error": ...}`, `"success": false`,
    `"status": "error"`, `"is_error": true`, nor a text that starts like an exception. Where nothing ran (a text, or
    messages without results) a call succeeds when it is well-formed and, with `tools` known, names one of them.

    Args:
        completions: texts or messages of the batch.
        tools: column of the tools a row offers: names, or their JSON schemas; as lists or JSON texts.
        absent: the score without any call, at most 1; none says that the reward does not apply. Rows whose `tools` are
            empty are never charged for calling none.
        columns: not used.

    Returns:
        A share from 0 to 1; `absent` without calls.

    Source: seed, RL guide, section 3.
    """
    scores: list[float | None] = []
    for row, completion in enumerate(completions):
        calls, results = tool_calls(completion), tool_results(completion)
        offered = None if tools is None else names_of(tools[row])
        if not calls:
            scores.append(None if tools is not None and not offered else absent)
        elif results:
            good = sum(not is_error(result) for result in results)
            scores.append(min(good / max(len(calls), len(results)), 1.0))
        else:
            good = sum(call.name is not None and (offered is None or call.name in offered) for call in calls)
            scores.append(good / len(calls))
    return scores


def verbosity_penalty(
    completions: list[Completion],
    expected_steps: list[Any] | None = None,
    *,
    steps: Annotated[int, Ge(0)] = 1,
    most: Annotated[int, Ge(1)] = 20,
    **columns: Any,
) -> list[float | None]:
    """Counts the steps, that is tool calls, beyond the expected number; its weight is negative.

    The length of a text is `length`'s business.

    Args:
        completions: texts or messages of the batch.
        expected_steps: column of the number of calls that a row needs.
        steps: the expected number where there is no such column or value.
        most: the largest count: the guide's `max_episode_length`, with which its bound of -2.5 comes out.
        columns: not used.

    Returns:
        Extra steps, from 0 to `most`.

    Source: seed, RL guide, section 3, "Per extra step".
    """
    scores: list[float | None] = []
    for row, completion in enumerate(completions):
        given = None if expected_steps is None else expected_steps[row]
        extra = len(tool_calls(completion)) - (steps if given is None else int(given))
        scores.append(float(min(max(extra, 0), most)))
    return scores


def off_policy_penalty(
    completions: list[Completion],
    allowed_tools: list[Any] | None = None,
    allowed_answers: list[Any] | None = None,
    *,
    only_tools: list[str] | None = None,
    only_answers: list[str] | None = None,
    **columns: Any,
) -> list[float | None]:
    """Marks completions that deviate from what is expected: a tool or an answer outside the allowed ones.

    One deviation is enough, so that it does not thin out among many calls; a call that cannot be read is one.

    Args:
        completions: texts or messages of the batch.
        allowed_tools: column of each row's allowed tools; an empty list allows none.
        allowed_answers: column of each row's allowed answers, compared without surrounding space.
        only_tools: allowed tools where the column does not say.
        only_answers: allowed answers where the column does not say.
        columns: not used.

    Returns:
        1 for a deviation, else 0 (the weight is negative); None where a row says neither.

    Raises:
        UserError: there is neither parameter nor column.

    Source: seed, RL guide, section 3, "Deviates from expected".
    """
    if all(given is None for given in (allowed_tools, allowed_answers, only_tools, only_answers)):
        raise UserError("expected `only_tools` or `only_answers`, or a column `allowed_tools` or `allowed_answers`")
    scores: list[float | None] = []
    for row, completion in enumerate(completions):
        of_row = None if allowed_tools is None else allowed_tools[row]
        known = names_of(only_tools if of_row is None else of_row)
        said = None if allowed_answers is None else allowed_answers[row]
        texts = only_answers if said is None else [said] if isinstance(said, str) else said
        strays = known is not None and any(call.name not in known for call in tool_calls(completion))
        strays |= texts is not None and answer(completion).strip() not in {str(text).strip() for text in texts}
        scores.append(None if known is None and texts is None else float(strays))
    return scores


def names_of(tools: Any) -> set[str] | None:
    """Returns the names of tools given as names or as JSON schemas, also in JSON text; None where nothing is given."""
    if tools is None:
        return None
    try:
        listed = parse_tools(tools)
    except UnusableRow:
        raise UserError(
            f"tools: expected a list of names or schemas, also as JSON text, found {tools!r:.60}"
        ) from None
    functions = [(tool.get("function") or tool) if isinstance(tool, dict) else {"name": tool} for tool in listed]
    names = [function.get("name") if isinstance(function, dict) else None for function in functions]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"tools: expected names or schemas with a name, found {listed!r:.100}")
    return set(names)


def is_error(result: Any) -> bool:
    """Whether what a tool answered is an error, in the ways that tools and trainers write one."""
    text = result_text(result) if isinstance(result, list) else result
    if isinstance(text, str):
        for read in (json.loads, ast.literal_eval):  # the second reads `str({...})`: literals only, nothing runs
            try:
                value = read(text.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(value, dict):
                return is_error(value)
        return _ERROR.match(text) is not None
    if not isinstance(text, dict):
        return False
    return (
        bool(text.get("error"))
        or any(text.get(key) is True for key in ("is_error", "isError"))
        or any(text.get(key) is False for key in ("success", "ok"))
        or str(text.get("status", "")).lower() in ("error", "failed", "failure")
    )

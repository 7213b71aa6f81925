"""Reads completions: the answer, everything the model wrote, its tool calls and their results, its code blocks.

A completion is a text, or a list of messages (a reply, or an episode with tool results in it). Everything here takes
time in proportion to the text, whatever a model writes, and nothing judges.
"""

import json
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from llmlab.settings.errors import UserError, did_you_mean

Completion = str | list[dict[str, Any]]

DEEPEST = 100
"""Levels of nested JSON that are read: a fixed number, where Python's own limit depends on who calls."""

_FENCE = re.compile(r"\s*(`{3,}|~{3,})\s*([^\s`{]*)")
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class ToolCall(NamedTuple):
    """A tool call as the model wrote it; the name is None where it cannot be read as one."""

    name: str | None
    arguments: Any


def answer(completion: Completion) -> str:
    """Returns the text of the last message that the model wrote, or the whole text."""
    if isinstance(completion, str):
        return completion
    texts = [text_of(message.get("content")) for message in completion if message.get("role") == "assistant"]
    return texts[-1] if texts else ""


def written(completion: Completion) -> str:
    """Returns everything that the model wrote: the texts of all its turns, and its tool calls as JSON."""
    if isinstance(completion, str):
        return completion
    parts = []
    for message in completion:
        if message.get("role") == "assistant":
            parts.append(text_of(message.get("content")))
            for call in message.get("tool_calls") or ():
                parts.append(json.dumps(call, ensure_ascii=False, default=str))
    return "\n".join(part for part in parts if part)


def text_of(content: Any) -> str:
    """Returns the text of a message's content: a string, a list of parts, or nothing."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        return "".join(text_of(part.get("text") if isinstance(part, dict) else part) for part in content)
    return str(content)


def tool_calls(completion: Completion) -> list[ToolCall]:
    """Returns the calls in order: the messages' `tool_calls`, or `<tool_call>{JSON}</tool_call>` in text."""
    if isinstance(completion, str):
        return [*_calls_in_text(completion)]
    calls: list[ToolCall] = []
    for message in completion:
        if message.get("role") == "assistant":
            structured = message.get("tool_calls")
            calls += map(_call, structured) if structured else _calls_in_text(text_of(message.get("content")))
    return calls


def tool_results(completion: Completion) -> list[Any]:
    """Returns what the tools answered in an episode; a text has none, since the model wrote all of it itself."""
    if isinstance(completion, str):
        return []
    return [message.get("content") for message in completion if message.get("role") == "tool"]


def code_blocks(text: str, languages: Iterable[str]) -> list[str]:
    """Returns the fenced blocks in one of these languages, dedented; one that is cut off counts too."""
    wanted = {language.lower() for language in languages}
    blocks: list[str] = []
    fence, language, lines = "", "", []
    for line in text.split("\n"):
        if not fence:
            if opened := _FENCE.match(line):
                fence, language, lines = opened[1], opened[2].lower(), []
        elif (end := line.strip()).startswith(fence) and not end.strip(fence[0]):
            blocks += [textwrap.dedent("\n".join(lines)) + "\n"] if language in wanted else []
            fence = ""
        else:
            lines.append(line)
    if fence and language in wanted:
        blocks.append(textwrap.dedent("\n".join(lines)) + "\n")
    return blocks


def read_json(text: str) -> Any:
    """Reads one JSON value strictly: no NaN or Infinity, at most `DEEPEST` levels; fenced as `json` is fine.

    Raises:
        ValueError: it is not JSON, or is deeper than that.
    """
    text = text.strip()
    if text.startswith("```") and (blocks := code_blocks(text, ("json", ""))):
        text = blocks[0] if text.count("```") <= 2 else text
    try:
        value = json.loads(text, parse_constant=_refuse, parse_int=_integer)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError("nested too deeply")


def units(completion: Completion, unit: str, ids: Sequence[int] | None) -> Sequence[Any]:
    """Returns a completion cut into `words`, `characters` or `tokens`.

    Raises:
        UserError: tokens are asked for where there are none.
    """
    if unit == "tokens":
        if ids is None:
            raise UserError("unit = tokens: there are no token ids here (training has them); expected words")
        return ids
    text = written(completion)
    return text.split() if unit == "words" else text


def column_of(columns: dict[str, Any], name: str, parameter: str) -> list[Any]:
    """Returns a column of the data set.

    Args:
        columns: what the reward was called with.
        name: the column.
        parameter: the reward's parameter that names the column, for the message.

    Raises:
        UserError: there is no such column.
    """
    found = columns.get(name)
    if not isinstance(found, list):
        given = ("prompts", "completion_ids", "environments")
        there = sorted(key for key, value in columns.items() if isinstance(value, list) and key not in given)
        names = ", ".join(there) or "none"
        raise UserError(
            f"{parameter} = {name}: there is no such column beside prompt and completion (found {names})"
            + did_you_mean(name, there)
        )
    return found


def _calls_in_text(text: str) -> Iterator[ToolCall]:
    for part in text.split(_OPEN)[1:]:
        body, closed, _ = part.partition(_CLOSE)
        try:
            yield _call(read_json(body) if closed else None)
        except ValueError:
            yield ToolCall(None, None)


def _call(call: Any) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return ToolCall(name, function.get("arguments")) if name and isinstance(name, str) else ToolCall(None, None)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 4000 else math.copysign(math.inf, -1 if digits[0] == "-" else 1)

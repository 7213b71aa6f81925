"""Reads completions: the answer, everything the model wrote, what tools answered, its code blocks and JSON.

A completion is a text, or a list of messages (a reply, or an episode with tool results in it). Everything here takes
time in proportion to the text, whatever a model writes, and nothing judges.
"""

import json
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from llmlab.data.chat.messages import Call, Message, UnusableRow, plain_call, read_turns
from llmlab.settings.errors import UserError, did_you_mean

Completion = str | list[dict[str, Any]]

DEEPEST = 100
"""Levels of nested JSON that are read: a fixed number, where Python's own limit depends on who calls."""

_SPACE = re.compile(r"[ \t\n\r]*")
_FENCE = re.compile(r"\s*(`{3,}|~{3,})\s*([^\s`{]*)")


class UnreadableCompletion(UserError):
    """A completion that holds what is not understood, such as an image, and so must not be read as an empty answer."""


def read_messages(completion: list[dict[str, Any]]) -> list[Message]:
    """Returns the messages of a completion in one form; a call that is none keeps no name and what was written.

    Raises:
        UnreadableCompletion: there is something in them that is not understood.
    """
    try:
        return read_turns(completion, lenient_call) if completion else []
    except UnusableRow as reason:
        raise UnreadableCompletion(f"these messages cannot be read: {reason}") from None


def lenient_call(call: Any) -> Call:
    """Returns a call as `plain_call` does; what cannot be one has None as its name, and all of it as arguments."""
    try:
        return plain_call(call)
    except UnusableRow:
        return {"type": "function", "function": {"name": None, "arguments": call}}


def answer(completion: Completion) -> str:
    """Returns the text of the last message that the model wrote, or the whole text."""
    if isinstance(completion, str):
        return completion
    texts = [message["content"] for message in read_messages(completion) if message["role"] == "assistant"]
    return texts[-1] if texts else ""


def written(completion: Completion) -> str:
    """Returns everything that the model wrote: texts and reasoning of all its turns, and its tool calls as JSON."""
    if isinstance(completion, str):
        return completion
    parts = []
    for message in read_messages(completion):
        if message["role"] == "assistant":
            parts += [message.get("reasoning_content"), message["content"]]
            for call in message.get("tool_calls", ()):
                parts.append(json.dumps(call, ensure_ascii=False, default=str))
    return "\n".join(part for part in parts if part)


def tool_results(completion: Completion) -> list[str]:
    """Returns what the tools answered in an episode; a text has none, since the model wrote all of it itself."""
    if isinstance(completion, str):
        return []
    return [message["content"] for message in read_messages(completion) if message["role"] == "tool"]


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
    value, end = decode_json(text)
    if text[end:].strip():
        raise ValueError("text after the JSON")
    return value


def decode_json(text: str, start: int = 0) -> tuple[Any, int]:
    """Returns the JSON value that begins here, after space, and where it ends; as strict as `read_json`.

    Raises:
        ValueError: there is none, or it is too deep.
    """
    try:
        value, end = _DECODER.raw_decode(text, _SPACE.match(text, start).end())  # type: ignore[union-attr]
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
            return value, end
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


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 4000 else math.copysign(math.inf, -1 if digits[0] == "-" else 1)


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_int=_integer)

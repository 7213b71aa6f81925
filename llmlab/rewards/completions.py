"""Reads completions: the answer, everything the model wrote, tool results, code blocks and JSON. A completion is a
text, or a list of messages (a reply, or an episode with tool results in it). Everything here takes time in proportion
to the text, whatever a model writes, and nothing judges."""

import json
import math
import re
import textwrap
from collections.abc import Iterable
from typing import Any

from llmlab.data.chat.messages import Call, Message, UnusableRow, normalize_call, read_turns
from llmlab.settings.errors import UserError

Completion = str | list[dict[str, Any]]

MAX_DEPTH = 100  # levels of nested JSON that are read, where Python's own limit depends on the caller
_SPACE = re.compile(r"[ \t\n\r]*")
_FENCE = re.compile(r"\s*(`{3,}|~{3,})\s*([^\s`{]*)")


class RowError(UserError):
    """One row cannot be scored: its completion, or its value of a column, is not what the reward reads."""


def read_messages(completion: Completion) -> list[Message]:
    """Returns the messages of a completion in one form; a malformed tool call keeps no name and what was written."""
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    try:
        return read_turns(completion, lenient_call) if completion else []
    except UnusableRow as reason:
        raise RowError(f"these messages cannot be read: {reason}") from None


def lenient_call(call: Any) -> Call:
    """Returns a tool call as `normalize_call` does; a malformed one gets the name None and all of it as arguments."""
    try:
        return normalize_call(call)
    except UnusableRow:
        return {"type": "function", "function": {"name": None, "arguments": call}}


def answer(completion: Completion) -> str:
    """Returns the text of the last message that the model wrote, or the whole text."""
    texts = [message["content"] for message in read_messages(completion) if message["role"] == "assistant"]
    return texts[-1] if texts else ""


def model_text(completion: Completion) -> str:
    """Returns all that the model generated: texts and reasoning of all its turns, and its tool calls as JSON."""
    parts = []
    for message in read_messages(completion):
        if message["role"] == "assistant":
            parts += [message.get("reasoning_content"), message["content"]]
            parts += [json.dumps(call, ensure_ascii=False, default=str) for call in message.get("tool_calls", ())]
    return "\n".join(part for part in parts if part)


def tool_results(completion: Completion) -> list[str]:
    """Returns the tool results of an episode; a text has none, since the model wrote all of it itself."""
    return [message["content"] for message in read_messages(completion) if message["role"] == "tool"]


def code_blocks(text: str, languages: Iterable[str]) -> list[str]:
    """Returns the fenced blocks in one of these languages, dedented; one that is cut off counts too."""
    blocks: list[tuple[str, list[str]]] = []
    fence = ""
    for line in text.split("\n"):
        if not fence:
            if opening := _FENCE.match(line):
                fence = opening[1]
                blocks.append((opening[2].lower(), []))
        elif (end := line.strip()).startswith(fence) and not end.strip(fence[0]):
            fence = ""
        else:
            blocks[-1][1].append(line)
    return [textwrap.dedent("\n".join(lines)) + "\n" for language, lines in blocks if language in languages]


def read_json(text: str) -> Any:
    """Reads one JSON value, fenced as `json` or bare; ValueError for NaN, Infinity, or over `MAX_DEPTH` levels."""
    text = text.strip()
    if text.startswith("```") and text.count("```") <= 2 and (blocks := code_blocks(text, ("json", ""))):
        text = blocks[0]
    value, end = decode_json(text)
    if text[end:].strip():
        raise ValueError("text after the JSON")
    return value


def decode_json(text: str, start: int = 0) -> tuple[Any, int]:
    """Returns the JSON value that begins here, after space, and where it ends; as strict as `read_json`."""
    try:
        value, end = _DECODER.raw_decode(text, _SPACE.match(text, start).end())  # type: ignore[union-attr]
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        outer = [value for value in level if isinstance(value, dict | list)]
        level = [inner for each in outer for inner in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return value, end
    raise ValueError("nested too deeply")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _integer(digits: str) -> int | float:
    """Reads an integer; one beyond the digits that Python converts is infinite."""
    return int(digits) if len(digits) < 4000 else math.copysign(math.inf, -1 if digits[0] == "-" else 1)


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_int=_integer)

"""Recognizes instruction data by its columns and turns each row into messages (and tools).

Every format becomes the same thing, so sources of different formats can be mixed.  Rendering messages to tokens is the
chat template's business; preference pairs are not read here.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmlab.settings.errors import UserError, did_you_mean

Row = dict[str, Any]
Message = dict[str, Any]

ROLES = {
    "user": ("user", "human", "prompter", "instruction", "question"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatgpt", "answer"),
    "system": ("system", "developer"),
    "tool": ("tool", "observation", "function_response", "function", "ipython"),
    "call": ("function_call", "tool_call"),
}
ROLE_OF = {spelling: role for role, spellings in ROLES.items() for spelling in spellings}


class UnusableRow(ValueError):
    """A row that cannot become messages; the reason is counted and reported."""


@dataclass(frozen=True)
class Format:
    """A format of instruction data: the columns that tell it, those it may have besides, and how a row is read."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], list[Message]]
    optional: tuple[str, ...] = ()


def _messages(row: Row) -> list[Message]:
    return read_turns(row["messages"])


def _conversations(row: Row) -> list[Message]:
    return read_turns(row["conversations"])


def _alpaca(row: Row) -> list[Message]:
    given = _text(row["input"]) if row.get("input") else ""
    prompt = _text(row["instruction"]) + (f"\n\n{given}" if given.strip() else "")
    past = [turn for pair in _list(row.get("history"), "history") for turn in _past(pair)]
    return [*past, *_pair(prompt, row["output"])]


def _past(pair: Any) -> list[Message]:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise UnusableRow("expected history as pairs of request and answer")
    return _pair(*pair)


def _prompt_completion(row: Row) -> list[Message]:
    if isinstance(row["prompt"], list):
        return read_turns([*row["prompt"], *_list(row["completion"], "completion")])
    return _pair(row["prompt"], row["completion"])


def _sharegpt_chosen(row: Row) -> list[Message]:
    return [*read_turns(row["conversations"]), _turn(row["chosen"])]


def _prompt_chosen(row: Row) -> list[Message]:
    prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    if isinstance(row["chosen"], str):
        return read_turns([*prompt, {"role": "assistant", "content": row["chosen"]}])
    start, chosen = read_turns(prompt), read_turns(row["chosen"])
    if chosen[0]["role"] not in ("system", "user"):
        return [*start, *chosen]
    system = start[:1] if start[0]["role"] == "system" and chosen[0]["role"] != "system" else []
    return [*system, *chosen]  # it repeats the prompt


def _chosen(row: Row) -> list[Message]:
    return read_turns(row["chosen"]) if isinstance(row["chosen"], list) else transcript_messages(_text(row["chosen"]))


PLAIN_TEXT = Format("plain text", ("text",), lambda row: [])
FORMATS = (
    Format("messages", ("messages",), _messages, ("tools", "system")),
    Format("ShareGPT preference", ("conversations", "chosen", "rejected"), _sharegpt_chosen, ("tools", "system")),
    Format("preference", ("prompt", "chosen", "rejected"), _prompt_chosen, ("tools", "system")),
    Format("ShareGPT conversations", ("conversations",), _conversations, ("tools", "system")),
    Format("Alpaca", ("instruction", "output"), _alpaca, ("input", "system", "history")),
    Format(
        "instruction/response", ("instruction", "response"), lambda row: _pair(row["instruction"], row["response"])
    ),
    Format(
        "instruction preference",
        ("instruction", "chosen_response", "rejected_response"),
        lambda row: _pair(row["instruction"], row["chosen_response"]),
    ),
    Format("prompt/completion", ("prompt", "completion"), _prompt_completion, ("tools", "system")),
    Format("prompt/response", ("prompt", "response"), lambda row: _pair(row["prompt"], row["response"])),
    Format("question/answer", ("question", "answer"), lambda row: _pair(row["question"], row["answer"]), ("system",)),
    Format("hh-rlhf transcript", ("chosen", "rejected"), _chosen),
    PLAIN_TEXT,
)
"""In the order in which they are tried; of a preference pair the chosen side is what fine-tuning learns."""


def recognize(columns: Iterable[str], where: str) -> Format:
    """Returns the format that these columns tell.

    Args:
        columns: the columns found.
        where: the source, for the message.

    Raises:
        UserError: none does; it shows the columns found, the schemas expected, and the closest match.
    """
    found = set(columns)
    for candidate in FORMATS:
        if set(candidate.columns) <= found:
            return candidate
    raise closest(FORMATS, found, where, "instruction data")


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Returns the length of the common beginning."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def closest(formats: Iterable[Format], found: set[str], where: str, kind: str) -> UserError:
    """Returns the error for columns that no format has, with the format that comes closest."""
    formats = list(formats)
    nearest = max(formats, key=lambda form: _nearness(form, found))
    missing = [name for name in nearest.columns if name not in found]
    schemas = "; ".join(f"{f.name} ({', '.join(f.columns)})" for f in formats)
    return UserError(
        f"{where}: no format of {kind} has the columns {', '.join(sorted(found))}; expected one of: {schemas}. "
        f"The closest is {nearest.name}, which lacks {', '.join(missing)}{did_you_mean(missing[0], found)}"
    )


def _nearness(form: Format, found: set[str]) -> float:
    """How well columns fit a format: one for each that is there, half for a near spelling, less what it lacks."""
    there = sum(name in found for name in form.columns)
    near = sum(name not in found and bool(did_you_mean(name, found)) for name in form.columns)
    return there + near / 2 - (len(form.columns) - there - near) / 4


def to_messages(row: Row, form: Format) -> Row:
    """Returns `{"messages": [...], "tools": [...] or None}` of a row, or `{"text": ...}` of plain text.

    Raises:
        UnusableRow: it lacks a column, has no turn of the assistant, an unknown role, or text that is not text.
    """
    for column in form.columns:
        if row.get(column) is None:
            raise UnusableRow(f"without '{column}'")
    if form is PLAIN_TEXT:
        if not _text(row["text"]).strip():
            raise UnusableRow("empty")
        return {"text": row["text"]}
    messages = read_system(row, form) + form.read(row)
    if not any(message["role"] == "assistant" for message in messages):
        raise UnusableRow("no turn of the assistant")
    return {"messages": messages, "tools": read_tools(row, form)}


def read_system(row: Row, form: Format) -> list[Message]:
    """Returns the system prompt that stands in a column of its own, as no or one message."""
    if "system" in form.optional and isinstance(row.get("system"), str) and row["system"].strip():
        return [{"role": "system", "content": _text(row["system"])}]
    return []


def read_tools(row: Row, form: Format) -> list[dict[str, Any]] | None:
    """Returns the tools of a row where its format may have some."""
    return _tools(row.get("tools")) if "tools" in form.optional else None


def transcript_messages(text: str) -> list[Message]:
    """Returns the turns of an Anthropic transcript: `\\n\\nHuman: ... \\n\\nAssistant: ...`."""
    parts = ("\n\n" + text.strip()).split("\n\nHuman:")
    messages: list[Message] = []
    for part in parts[1:]:
        question, *answers = part.split("\n\nAssistant:")
        messages.append({"role": "user", "content": question.strip()})
        messages += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    if not messages:
        raise UnusableRow("no 'Human:' turn in the transcript")
    return messages


def _pair(prompt: Any, answer: Any) -> list[Message]:
    return [{"role": "user", "content": _text(prompt)}, {"role": "assistant", "content": _text(answer)}]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise UnusableRow(f"expected text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a character
        raise UnusableRow("not valid Unicode") from None
    return value


def _list(value: Any, name: str) -> list[Any]:
    """Returns a list that may be absent."""
    if value is not None and not isinstance(value, list):
        raise UnusableRow(f"expected {name} as a list, found {type(value).__name__}")
    return value or []


def read_turns(turns: Any) -> list[Message]:
    """Returns turns as messages, whatever they call roles and text."""
    if not isinstance(turns, list) or not turns:
        raise UnusableRow("no turns")
    return [_turn(turn) for turn in turns]


def _turn(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise UnusableRow(f"expected a turn with a role, found {type(turn).__name__}")
    spelled = turn.get("role") or turn.get("from") or turn.get("speaker")
    role = ROLE_OF.get(str(spelled).lower())
    content = turn["content"] if "content" in turn else turn.get("value", turn.get("text"))
    if role is None:
        raise UnusableRow(f"unknown role '{spelled}'")
    calls = _list(turn.get("tool_calls"), "tool_calls")
    if role == "call":  # ShareGPT keeps the assistant's call as JSON text in a turn of its own
        return {"role": "assistant", "content": "", "tool_calls": _calls(_text(content))}
    if calls:
        return {"role": role, "content": _text(content or ""), "tool_calls": [_plain_call(call) for call in calls]}
    return {"role": role, "content": _text(content)}


def _calls(text: str) -> list[dict[str, Any]]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise UnusableRow("a function call that is not JSON") from None
    return [_plain_call(call) for call in (value if isinstance(value, list) else [value])]


def _plain_call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UnusableRow("a function call without a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            raise UnusableRow("a function call whose arguments are not JSON") from None
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError:
            raise UnusableRow("tools that are not JSON") from None
    tools = _list([value] if isinstance(value, dict) else value, "tools")
    if not all(isinstance(tool, dict) for tool in tools):
        raise UnusableRow("expected tools as JSON schemas")
    return tools or None

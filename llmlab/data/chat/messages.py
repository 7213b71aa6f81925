"""Normalizes messages (roles, content parts, tool calls) of datasets, APIs and models to the OpenAI chat format:
`role`, `content` as text, perhaps `tool_calls` and `reasoning_content`. Others raise UnusableRow with the reason."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from llmlab.settings.files import read_table

Row = dict[str, Any]
Message = dict[str, Any]
Call = dict[str, Any]

ROLES, PARTS, FOLLOWERS = read_table("llmlab.data.chat", "messages").values()
ROLE_OF = {spelling: role for role, spellings in ROLES.items() for spelling in spellings}


class UnusableRow(ValueError):
    """A row that cannot be used; its reason is counted and reported."""


def normalize_call(call: Any) -> Call:
    """Returns a tool call in OpenAI's form, its arguments parsed."""
    if isinstance(call, str):
        raise UnusableRow("a function call that is not JSON")
    call = call if isinstance(call, dict) else {}
    function = next((call[key] for key in ("function", "tool_call") if call.get(key) is not None), call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise UnusableRow("a function call without a name")
    spellings = ("arguments", "parameters", "input", "args")
    arguments = next((function[key] for key in spellings if function.get(key) is not None), {})
    if isinstance(arguments, str):
        arguments = parse_json(arguments, "a function call whose arguments are not JSON")
    if not isinstance(arguments, dict):
        raise UnusableRow(f"a function call whose arguments are {type(arguments).__name__}, not an object")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def read_turns(turns: Any, read_call: Callable[[Any], Call] = normalize_call) -> list[Message]:
    """Returns turns (a role, and content as text or parts) as messages; a turn with tool results may give several."""
    if not isinstance(turns, list) or not turns:
        raise UnusableRow("no turns")
    return [message for turn in turns for message in _read_turn(turn, read_call)]


def is_empty(message: Message) -> bool:
    """Whether a message has neither content nor tool calls."""
    return not (message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))


def join_turns(messages: list[Message]) -> list[Message]:
    """Merges consecutive assistant messages, joined by a blank line."""
    joined: list[Message] = []
    for message in messages:
        if not joined or not message["role"] == joined[-1]["role"] == "assistant":
            joined.append(message)
            continue
        both = {"role": "assistant", "content": _paragraphs(joined[-1]["content"], message["content"])}
        sides = (joined[-1], message)
        if reasoning := _paragraphs(*(side.get("reasoning_content", "") for side in sides)):
            both["reasoning_content"] = reasoning
        if calls := [call for side in sides for call in side.get("tool_calls", ())]:
            both["tool_calls"] = calls
        joined[-1] = both
    return joined


def result_text(content: Any) -> str:
    """Returns a tool's result as text: text, text parts, or any other value as JSON."""
    if has_parts(content):
        return _read_parts("result", content).text
    return text_of(content if isinstance(content, str) or content is None else json.dumps(content, ensure_ascii=False))


def has_parts(content: Any) -> bool:
    """Whether a value is a list of content parts, not a list that a tool returned."""
    return isinstance(content, list) and any(isinstance(part, dict) and "type" in part for part in content)


def text_of(value: Any) -> str:
    """Returns a value that must be valid text."""
    if not isinstance(value, str):
        raise UnusableRow(f"expected text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can encode lone surrogates
        raise UnusableRow("not valid Unicode") from None
    return value


def list_of(value: Any, name: str) -> list[Any]:
    """Returns a list that may be absent."""
    if value is not None and not isinstance(value, list):
        raise UnusableRow(f"expected {name} as a list, found {type(value).__name__}")
    return value or []


def parse_json(text: str, problem: str) -> Any:
    """Returns the value of a JSON text, or raises UnusableRow with the problem."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UnusableRow(problem) from None


def parse_tools(value: Any) -> list[Any]:
    """Returns tools that may be JSON text, one alone, or absent, as a list."""
    if isinstance(value, str):
        value = parse_json(value, "tools that are not JSON") if value.strip() else None
    return list_of([value] if isinstance(value, dict) else value, "tools")


class _Parts(NamedTuple):
    """What the content of a turn consists of; the text is None where there is none."""

    text: Any
    reasoning: str = ""
    calls: list[Any] = []
    results: list[str] = []


def _read_turn(turn: Any, read_call: Callable[[Any], Call]) -> list[Message]:
    if not isinstance(turn, dict):
        raise UnusableRow(f"expected a turn with a role, found {type(turn).__name__}")
    spelled = turn.get("role") or turn.get("from") or turn.get("speaker")
    role = ROLE_OF.get(str(spelled).lower())
    content = turn["content"] if "content" in turn else turn.get("value", turn.get("text"))
    if role is None:
        raise UnusableRow(f"unknown role '{spelled}'")
    if role == "call":  # ShareGPT keeps the assistant's call as JSON text in a turn of its own
        text = text_of(content)
        try:
            calls = json.loads(text)
        except (ValueError, RecursionError):
            calls = text  # which is no call
        calls = calls if isinstance(calls, list) else [calls]
        return [{"role": "assistant", "content": "", "tool_calls": [read_call(call) for call in calls]}]
    if role == "tool" and not has_parts(content):
        content = result_text(content)
    parts = _read_parts(role, content) if isinstance(content, list) else _Parts(content)
    calls = list_of(turn.get("tool_calls"), "tool_calls") or parts.calls
    if not calls and isinstance(turn.get("function_call"), dict):
        calls = [turn["function_call"]]  # OpenAI's older form
    if calls and role != "assistant":
        raise UnusableRow(f"tool calls in a turn of the {role}")
    results = [{"role": "tool", "content": result} for result in parts.results]
    if results and not parts.text:
        return results
    spellings = ("reasoning_content", *PARTS["reasoning"])
    reasoning = parts.reasoning or next((turn[key] for key in spellings if turn.get(key)), "")
    text = turn.get("refusal") if parts.text is None else parts.text
    message = {"role": role, "content": text_of("" if text is None and (calls or reasoning) else text)}
    if reasoning and role == "assistant":
        message["reasoning_content"] = text_of(reasoning)
    if calls:
        message["tool_calls"] = [read_call(call) for call in calls]
    return [*results, message]


def _read_parts(role: str, content: list[Any]) -> _Parts:
    texts, reasoning, calls, results = [], [], [], []
    for part in content:
        if not isinstance(part, dict):
            raise UnusableRow(f"expected a content part with a type, found {type(part).__name__}")
        kind = str(part.get("type") or ("text" if "text" in part else None))
        text = part.get("text") if part.get(kind) is None else part[kind]
        if kind in PARTS["text"]:
            texts.append(text_of(text))
        elif kind in PARTS["reasoning"] and role == "assistant":
            reasoning.append(text_of(text))
        elif kind in PARTS["call"] and role == "assistant":
            calls.append(part)
        elif kind in PARTS["result"] and role in ("user", "tool"):
            result = result_text(part.get("output") if part.get("content") is None else part["content"])
            results.append(json.dumps({"error": result}, ensure_ascii=False) if part.get("is_error") else result)
        else:
            raise UnusableRow(f"content part '{kind}' in a turn of the {role}, which is not supported")
    return _Parts("".join(texts), "".join(reasoning), calls, results)


def _paragraphs(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)

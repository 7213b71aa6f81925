"""Reads completions: the answer, everything the model wrote, code blocks, JSON, and tool calls, the messages' own or
those that their text spells in the form of the model's family. A completion is a text, or a list of messages.
Everything here takes time in proportion to the text, executes nothing, and nothing judges: a malformed call stays a
call, without a name; calls quoted while thinking are none. Where the tokenizer has a response template, TRL's trainers
parse text before rewards see it."""

import ast
import json
import math
import re
import textwrap
from collections.abc import Iterable
from typing import Any, NamedTuple

from llmlab.data.chat.messages import Call, Message, UnusableRow, normalize_call, read_turns
from llmlab.settings.errors import UserError
from llmlab.simulator.tasks import parse_python

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


class ToolCall(NamedTuple):
    """A tool call as the model wrote it; the name is None where it is malformed."""

    name: str | None
    arguments: Any


MALFORMED = ToolCall(None, None)
MAX_CALLS = 1_000  # of a text that are read; no environment runs so many
_MARK = re.compile(
    r"<think>|<tool_call>(?!\s*<function=)|<function=|<\|python_tag\|>|\[TOOL_CALLS\]|<\|tool_call_start\|>"
    r"|<｜tool▁calls▁begin｜>(?!\s*<｜tool▁call▁begin｜>)|<｜tool▁call▁begin｜>"
)
_JSON_FORMS = {  # by mark: (prefix pattern with the name as a group, suffix)
    "<tool_call>": ("", r"\s*</tool_call>"),
    "[TOOL_CALLS]": (r"\s*(?:([A-Za-z_][\w.-]{0,200})(?:\[CALL_ID\][\w-]{0,64})?(?:\[ARGS\])?)?", ""),
    "<｜tool▁call▁begin｜>": (
        r"\s*(?:[^<｜\n]{1,200}<｜tool▁sep｜>([^<{`\n]{1,200})\n```json|([^<｜\n]{1,200})<｜tool▁sep｜>)",
        r"\s*(?:```)?\s*<｜tool▁call▁end｜>",
    ),
}
_SEPARATOR = r"\s*;?\s*"
_BARE_JSON = re.compile(r'\[?\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"[^"]*"\s*,\s*"(?:param|arg)')
_BARE_LIST = re.compile(r"\[\s*[A-Za-z_][\w.]*\(\s*(?:\)|[A-Za-z_]\w*\s*=)")
_CALL_KEYS = {"name", "parameters", "arguments", "type", "id"}
_STOPS = ("<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<|endoftext|>", "</s>", " ", "\n")


def tool_calls(completion: Completion) -> list[ToolCall]:
    """Returns the calls in order: the messages' `tool_calls`, else those in the text."""
    calls: list[ToolCall] = []
    for message in read_messages(completion):
        if message["role"] == "assistant":
            own = [ToolCall(**call["function"]) for call in message.get("tool_calls", ())]
            calls += own or calls_in_text(message["content"])
    return calls


def read_turn(text: str) -> Message:
    """Returns what a model wrote in one turn as a message: the text before its first call, and the calls."""
    calls = calls_in_text(text)
    if not calls:
        return {"role": "assistant", "content": _strip_stop_tokens(text)}
    first = next((mark.start() for mark in _MARK.finditer(text) if mark[0] != "<think>"), 0)
    functions = [{"type": "function", "function": call._asdict()} for call in calls]
    return {"role": "assistant", "content": text[:first].strip(), "tool_calls": functions}


def calls_in_text(text: str) -> list[ToolCall]:
    """Returns the calls in a text: of Hermes and Qwen, Qwen3-Coder, Llama 3, Mistral, DeepSeek, or pythonic."""
    thinking, end, rest = text.partition("</think>")
    if end and "<think>" not in thinking:  # the chat template opened it
        text = rest
    if calls := _bare_calls(text):
        return calls
    scan, marked = _Cursor(text), False
    while len(calls) < MAX_CALLS and (mark := _MARK.search(text, scan.position)):
        scan.position = mark.end()
        marked = marked or mark[0] != "<think>"
        try:
            for call in _read_call(scan, mark[0]):
                calls.append(call)  # those before a malformed one stay
        except ValueError:
            if mark[0] == "<think>":
                return calls  # truncated inside <think>
            calls.append(MALFORMED)
    return calls if marked else _bare_calls(text[scan.position :])


class _Cursor:
    """A position in a text; what is read moves it, or raises ValueError where the syntax is another."""

    def __init__(self, text: str):
        self.text, self.position = text, 0

    def until(self, close: str) -> str:
        start, end = self.position, self.text.index(close, self.position)
        self.position = end + len(close)
        return self.text[start:end]

    def match(self, pattern: str) -> re.Match[str]:
        match = re.compile(pattern).match(self.text, self.position)
        if match is None:
            raise ValueError(f"expected {pattern}")
        self.position = match.end()
        return match

    def json(self) -> Any:
        value, self.position = decode_json(self.text, self.position)
        return value


def _read_call(scan: _Cursor, mark: str) -> Iterable[ToolCall]:
    if mark in _JSON_FORMS:
        before, after = _JSON_FORMS[mark]
        name, value = next(filter(None, scan.match(before).groups()), None), scan.json()
        scan.match(after)
        return _json_calls(value if name is None else {"name": name.strip(), "arguments": value})
    if mark == "<function=":
        return [_xml_call(scan)]
    if mark == "<|python_tag|>":
        return _llama_calls(scan)
    if mark == "<|tool_call_start|>":
        return _python_calls(scan.until("<|tool_call_end|>"))
    if mark == "<think>":
        scan.until("</think>")
        return []
    return [MALFORMED]


def _xml_call(scan: _Cursor) -> ToolCall:
    """Returns `NAME><parameter=KEY>VALUE</parameter></function>` with values as text, or Llama's JSON inside."""
    name, body = scan.match(r"([^<>\s]{1,200})>")[1], scan.until("</function>")
    if body.lstrip().startswith("{"):
        return _json_calls({"name": name, "arguments": read_json(body)})[0]
    space, *parameters = body.split("<parameter=")
    values = {}
    for parameter in parameters:
        key, opened, value = parameter.partition(">")
        value, closed, after = value.rpartition("</parameter>")
        if not (opened and closed) or after.strip():
            return MALFORMED
        values[key.strip()] = value.removeprefix("\n").removesuffix("\n")
    return MALFORMED if space.strip() else ToolCall(name, values)


def _llama_calls(scan: _Cursor) -> Iterable[ToolCall]:
    """Yields JSON calls with semicolons between, or calls in Python's syntax."""
    start = scan.position
    try:
        value = scan.json()
    except ValueError:
        mark = _MARK.search(scan.text, start)
        scan.position = mark.start() if mark else len(scan.text)
        yield from _python_calls(scan.text[start : scan.position])
        return
    yield from _json_calls(value)
    while scan.text.startswith(("{", "["), scan.match(_SEPARATOR).end()):
        yield from _json_calls(scan.json())


def _bare_calls(text: str) -> list[ToolCall]:
    """Returns the calls of a text that is nothing else: Llama's JSON, one or several, or a list in Python's syntax."""
    text = _strip_stop_tokens(text)
    if not text.startswith(("{", "[")):
        return []
    scan, values = _Cursor(text), []
    try:
        while scan.position < len(text):
            value = scan.json()
            values += value if isinstance(value, list) else [value]
            scan.match(_SEPARATOR)
    except ValueError:
        if _BARE_LIST.match(text):
            return _python_calls(text)
        return [MALFORMED] if _BARE_JSON.match(text) else []
    return _json_calls(values) if values and all(map(_is_call, values)) else []


def _is_call(value: Any) -> bool:
    """Whether JSON without a mark is a call, not an answer that happens to be JSON."""
    keys = set(value) if isinstance(value, dict) else set()
    named = "name" in keys and keys & {"parameters", "arguments"} and keys <= _CALL_KEYS
    return bool(named) or keys >= {"type", "function"} and isinstance(value["function"], dict)


def _json_calls(value: Any) -> list[ToolCall]:
    """Returns the call, or the list of calls, that a JSON value is."""
    values = value if isinstance(value, list) else [value]
    return [ToolCall(**lenient_call(each)["function"]) for each in values] or [MALFORMED]


def _python_calls(source: str) -> list[ToolCall]:
    """Returns `[f(a=1), g()]` or `f(a=1)` as calls; arguments are literals."""
    tree = parse_python(_strip_stop_tokens(source), "eval")
    nodes = [] if tree is None else tree.body.elts if isinstance(tree.body, ast.List) else [tree.body]
    return [_python_call(node) for node in nodes] or [MALFORMED]


def _python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args or not all(keyword.arg for keyword in node.keywords):
        return MALFORMED
    try:
        name = ast.unparse(node.func).removesuffix(".call")  # Llama's built-in tools: `brave_search.call(...)`
        arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return MALFORMED
    return ToolCall(name, arguments) if re.fullmatch(r"[\w.]+", name) else MALFORMED


def _strip_stop_tokens(text: str) -> str:
    """Returns a text without space and end tokens around it."""
    text = text.strip()
    end = len(text)
    while stop := next((stop for stop in _STOPS if text.endswith(stop, 0, end)), ""):
        end -= len(stop)
    return text[:end].strip()

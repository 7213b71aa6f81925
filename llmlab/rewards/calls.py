"""Tool calls of completions: the messages' own, or those that their text spells in the way of the model's family.

Text is read as literal data in time proportional to its length, and nothing in it is ever run.  What opens a call and
cannot be read stays a call, without a name; calls that are quoted while thinking are none.  Where the tokenizer has a
response template, TRL's trainers parse text with it, and rewards see the messages that it makes.
"""

import ast
import re
import warnings
from typing import Any, NamedTuple

from llmlab.rewards.completions import Completion, decode_json, lenient_call, read_json, read_messages
from llmlab.rewards.python import LONGEST


class ToolCall(NamedTuple):
    """A tool call as the model wrote it; the name is None where it cannot be read as one."""

    name: str | None
    arguments: Any


UNREADABLE = ToolCall(None, None)
MOST = 1_000
"""Calls of a text that are read; no environment runs so many."""

_SPACE = re.compile(r"\s*")
_XML_NAME = re.compile(r"([^<>\s]{1,200})>")
_MISTRAL_NAME = re.compile(r"([A-Za-z_][\w.-]{0,200})(?:\[CALL_ID\][\w-]{0,64})?(?:\[ARGS\])?")
_DEEPSEEK_NAME = re.compile(r"([^<｜\n]{1,200})<｜tool▁sep｜>(?:([^<{`\n]{1,200})\n```json)?")
_BARE_JSON = re.compile(r'\[?\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"[^"]*"\s*,\s*"(?:param|arg)')
_BARE_LIST = re.compile(r"\[\s*[A-Za-z_][\w.]*\(\s*(?:\)|[A-Za-z_]\w*\s*=)")
_CALL_KEYS = {"name", "parameters", "arguments", "type", "id"}
_STOPS = ("<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<|endoftext|>", "</s>", " ", "\n")


def tool_calls(completion: Completion) -> list[ToolCall]:
    """Returns the calls in order: the messages' `tool_calls`, else those in the text."""
    if isinstance(completion, str):
        return calls_in_text(completion)
    calls: list[ToolCall] = []
    for message in read_messages(completion):
        if message["role"] == "assistant":
            own = [ToolCall(**call["function"]) for call in message.get("tool_calls", ())]
            calls += own or calls_in_text(message["content"])
    return calls


def calls_in_text(text: str) -> list[ToolCall]:
    """Returns the calls in a text: of Hermes and Qwen, Qwen3-Coder, Llama 3, Mistral, DeepSeek, or pythonic."""
    scan, marked = _Scan(text), False
    if "<think>" not in text.partition("</think>")[0]:
        scan.region("</think>")  # the template opened the thinking
    if calls := _bare(text[scan.position :]):
        return calls
    while len(calls) < MOST and (mark := _MARK.search(text, scan.position)):
        scan.position = mark.end()
        if mark[0] in _FORMS:
            calls += _FORMS[mark[0]](scan)
            marked = True
        elif scan.region("</think>") is None:
            return calls  # cut off while thinking
    return calls if marked else _bare(text[scan.position :])


class _Scan:
    """A text, and how far it has been read."""

    def __init__(self, text: str):
        self.text, self.position = text, 0
        self._last: dict[str, int] = {}

    def region(self, close: str) -> str | None:
        """Returns the text before a closing mark and reads past it; None where there is none."""
        if close not in self._last:  # so that a text is not searched again and again for what it lacks
            self._last[close] = self.text.rfind(close)
        if self.position > self._last[close]:
            return None
        start, end = self.position, self.text.find(close, self.position)
        self.position = end + len(close)
        return self.text[start:end]

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Returns a match right here and reads past it."""
        if match := pattern.match(self.text, self.position):
            self.position = match.end()
        return match

    def skip(self, word: str) -> bool:
        """Reads past space, and past a word where it stands here; whether it did."""
        self.take(_SPACE)
        found = self.text.startswith(word, self.position)
        self.position += len(word) * found
        return found

    def json(self) -> Any:
        """Returns the JSON value that stands here and reads past it; ValueError where there is none."""
        value, self.position = decode_json(self.text, self.position)
        return value


def _hermes(scan: _Scan) -> list[ToolCall]:
    """`<tool_call>{JSON}</tool_call>`; what Qwen3-Coder has inside is read by itself."""
    scan.take(_SPACE)
    if scan.text.startswith("<function=", scan.position):
        return []
    try:
        value = scan.json()
    except ValueError:
        return [UNREADABLE]
    return _calls(value) if scan.skip("</tool_call>") else [UNREADABLE]


def _function(scan: _Scan) -> list[ToolCall]:
    """`<function=NAME><parameter=KEY>VALUE</parameter></function>` with values as text, or Llama's JSON inside."""
    name, body = scan.take(_XML_NAME), scan.region("</function>")
    if name is None or body is None:
        return [UNREADABLE]
    if body.lstrip().startswith("{"):
        try:
            return _calls({"name": name[1], "arguments": read_json(body)})
        except ValueError:
            return [UNREADABLE]
    space, *parameters = body.split("<parameter=")
    values = {}
    for parameter in parameters:
        key, opened, value = parameter.partition(">")
        value, closed, after = value.rpartition("</parameter>")
        if not (opened and closed) or after.strip():
            return [UNREADABLE]
        values[key.strip()] = value.removeprefix("\n").removesuffix("\n")
    return [UNREADABLE if space.strip() else ToolCall(name[1], values)]


def _llama(scan: _Scan) -> list[ToolCall]:
    """`<|python_tag|>` and JSON calls, or calls in Python's syntax."""
    calls, start = [], scan.position
    try:
        while scan.skip(";") or scan.text.startswith(("{", "["), scan.position):
            calls += _calls(scan.json())
    except ValueError:
        calls += [UNREADABLE] if calls else []
    if calls:
        return calls
    mark = _MARK.search(scan.text, start)
    scan.position = mark.start() if mark else len(scan.text)
    return _pythonic(scan.text[start : scan.position])


def _mistral(scan: _Scan) -> list[ToolCall]:
    """`[TOOL_CALLS][{JSON}, ...]`, or `[TOOL_CALLS]NAME[ARGS]{JSON}`."""
    scan.take(_SPACE)
    name = scan.take(_MISTRAL_NAME)
    try:
        value = scan.json()
    except ValueError:
        return [UNREADABLE]
    return _calls({"name": name[1], "arguments": value} if name else value)


def _deepseek(scan: _Scan) -> list[ToolCall]:
    """`NAME<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜>`; V3 has `function<｜tool▁sep｜>NAME` and fenced JSON."""
    scan.take(_SPACE)
    name = scan.take(_DEEPSEEK_NAME)
    try:
        value = scan.json() if name else None
    except ValueError:
        name = None
    scan.skip("```")
    if name is None or not scan.skip("<｜tool▁call▁end｜>"):
        return [UNREADABLE]
    return _calls({"name": (name[2] or name[1]).strip(), "arguments": value})


def _deepseek_list(scan: _Scan) -> list[ToolCall]:
    scan.take(_SPACE)
    return [] if scan.text.startswith("<｜tool▁call▁begin｜>", scan.position) else [UNREADABLE]


def _listed(scan: _Scan) -> list[ToolCall]:
    region = scan.region("<|tool_call_end|>")
    return [UNREADABLE] if region is None else _pythonic(region)


_FORMS = {
    "<tool_call>": _hermes,
    "<function=": _function,
    "<|python_tag|>": _llama,
    "[TOOL_CALLS]": _mistral,
    "<｜tool▁calls▁begin｜>": _deepseek_list,
    "<｜tool▁call▁begin｜>": _deepseek,
    "<|tool_call_start|>": _listed,
}
_MARK = re.compile("|".join(map(re.escape, ("<think>", *_FORMS))))


def _bare(text: str) -> list[ToolCall]:
    """Returns the calls of a text that is nothing else: Llama's JSON, one or several, or a list in Python's syntax."""
    text = _without_stops(text)
    if not text.startswith(("{", "[")):
        return []
    scan, values = _Scan(text), []
    try:
        while scan.position < len(text):
            value = scan.json()
            values += value if isinstance(value, list) else [value]
            scan.skip(";")
    except ValueError:
        if _BARE_LIST.match(text):
            return _pythonic(text)
        return [UNREADABLE] if _BARE_JSON.match(text) else []
    return _calls(values) if values and all(map(_is_call, values)) else []


def _is_call(value: Any) -> bool:
    """Whether JSON that no mark announces is a call, and not an answer that happens to be JSON."""
    if not isinstance(value, dict):
        return False
    if value.get("type") == "function" and isinstance(value.get("function"), dict):
        return True
    return "name" in value and not {"parameters", "arguments"}.isdisjoint(value) and value.keys() <= _CALL_KEYS


def _pythonic(source: str) -> list[ToolCall]:
    """Returns `[f(a=1), g()]` or `f(a=1)` as calls; arguments are literals."""
    source = _without_stops(source)
    try:
        if len(source) > LONGEST:
            return [UNREADABLE]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the model's code
            node = ast.parse(source, mode="eval").body
        nodes = node.elts if isinstance(node, ast.List) else [node]
        return [_python_call(node) for node in nodes] or [UNREADABLE]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return [UNREADABLE]


def _python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args or not all(keyword.arg for keyword in node.keywords):
        return UNREADABLE
    name = ast.unparse(node.func).removesuffix(".call")  # Llama's built-in tools: `brave_search.call(...)`
    if not re.fullmatch(r"[\w.]+", name):
        return UNREADABLE
    try:
        return ToolCall(name, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords})
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return UNREADABLE


def _calls(value: Any) -> list[ToolCall]:
    """Returns what JSON says: one call, or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [ToolCall(**lenient_call(each)["function"]) for each in values] or [UNREADABLE]


def _without_stops(text: str) -> str:
    text = text.strip()
    end = len(text)
    while stop := next((stop for stop in _STOPS if text.endswith(stop, 0, end)), ""):
        end -= len(stop)
    return text[:end].strip()

"""Recognizes instruction data by its columns and turns each row into messages (and tools).

Every format becomes the same thing, so sources of different formats can be mixed.  Rendering messages to tokens is the
chat template's business; preference pairs are not read here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmlab.data.chat.messages import (
    Message,
    Row,
    UnusableRow,
    is_empty,
    list_of,
    parse_tools,
    read_turns,
    text_of,
)
from llmlab.settings.errors import UserError, did_you_mean

LABELS = ("label", "kto_tag")  # columns that say whether a completion is good: KTO's, arXiv 2402.01306


@dataclass(frozen=True)
class Format:
    """A format of instruction data: the columns that tell it, those it may have besides, and how a row is read."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], list[Message]]
    optional: tuple[str, ...] = ("tools", "system")


def _messages(row: Row) -> list[Message]:
    return read_turns(row["messages"])


def _conversations(row: Row) -> list[Message]:
    return read_turns(row["conversations"])


def _alpaca(row: Row) -> list[Message]:
    given = text_of(row["input"]) if row.get("input") else ""
    prompt = text_of(row["instruction"]) + (f"\n\n{given}" if given.strip() else "")
    past = [turn for pair in list_of(row.get("history"), "history") for turn in _past(pair)]
    return [*past, *_pair(prompt, row["output"])]


def _past(pair: Any) -> list[Message]:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise UnusableRow("expected history as pairs of request and answer")
    return _pair(*pair)


def _prompt_completion(row: Row) -> list[Message]:
    if isinstance(row["prompt"], list):
        return read_turns([*row["prompt"], *list_of(row["completion"], "completion")])
    return _pair(row["prompt"], row["completion"])


def _sharegpt_chosen(row: Row) -> list[Message]:
    return [*read_turns(row["conversations"]), *read_turns([row["chosen"]])]


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
    return (
        read_turns(row["chosen"]) if isinstance(row["chosen"], list) else transcript_messages(text_of(row["chosen"]))
    )


PLAIN_TEXT = Format("plain text", ("text",), lambda row: [], ())
FORMATS = (
    Format("messages", ("messages",), _messages, ("tools", "system")),
    Format("ShareGPT preference", ("conversations", "chosen", "rejected"), _sharegpt_chosen, ("tools", "system")),
    Format("preference", ("prompt", "chosen", "rejected"), _prompt_chosen, ("tools", "system")),
    Format("ShareGPT conversations", ("conversations",), _conversations, ("tools", "system")),
    Format("Alpaca", ("instruction", "output"), _alpaca, ("input", "tools", "system", "history")),
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
    Format("question/answer", ("question", "answer"), lambda row: _pair(row["question"], row["answer"])),
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


def label_column(form: Format, rows: Iterable[Row]) -> str | None:
    """Returns the column that makes rows unpaired preferences (true or false beside a completion), if one does."""
    rows = list(rows)
    if form is PLAIN_TEXT or "chosen" in form.columns:
        return None
    values = {name: [row[name] for row in rows if row.get(name) is not None] for name in LABELS}
    return next((name for name in LABELS if values[name] and None not in map(truth_of, values[name])), None)


def truth_of(value: Any) -> bool | None:
    """Returns a label as true or false: a boolean, 1 or 0, or their names; None for anything else."""
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())


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
        if not text_of(row["text"]).strip():
            raise UnusableRow("empty")
        return {"text": row["text"]}
    messages = read_system(row, form) + form.read(row)
    if not any(message["role"] == "assistant" for message in messages):
        raise UnusableRow("no turn of the assistant")
    if all(is_empty(message) for message in messages if message["role"] == "assistant"):
        raise UnusableRow("no turn of the assistant says anything")
    return {"messages": messages, "tools": read_tools(row, form)}


def read_system(row: Row, form: Format) -> list[Message]:
    """Returns the system prompt that stands in a column of its own, as no or one message."""
    if "system" in form.optional and isinstance(row.get("system"), str) and row["system"].strip():
        return [{"role": "system", "content": text_of(row["system"])}]
    return []


def read_tools(row: Row, form: Format) -> list[dict[str, Any]] | None:
    """Returns the tools of a row where its format may have some."""
    if "tools" not in form.optional:
        return None
    tools = parse_tools(row.get("tools"))
    if not all(isinstance(tool, dict) for tool in tools):
        raise UnusableRow("expected tools as JSON schemas")
    return tools or None


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
    return [{"role": "user", "content": text_of(prompt)}, {"role": "assistant", "content": text_of(answer)}]

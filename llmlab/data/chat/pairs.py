"""Reads preference pairs from their formats: a prompt, and a better and a worse answer to it, all as messages."""

from collections.abc import Iterable
from typing import Any

from llmlab.data.chat.formats import (
    FORMATS,
    LABELS,
    PLAIN_TEXT,
    Format,
    closest,
    read_system,
    read_tools,
    shared_length,
    transcript_messages,
)
from llmlab.data.chat.messages import Message, Row, UnusableRow, is_empty, read_turns
from llmlab.settings.errors import UserError

PAIRS = ("ShareGPT preference", "preference", "instruction preference", "hh-rlhf transcript")
PAIR_FORMATS = tuple(form for form in FORMATS if form.name in PAIRS)


def recognize_pairs(columns: Iterable[str], where: str) -> Format:
    """Returns the format of preference data that these columns tell.

    Raises:
        UserError: none does; it shows the columns found, the schemas expected, and the closest match.
    """
    found = set(columns)
    for candidate in PAIR_FORMATS:
        if set(candidate.columns) <= found:
            return candidate
    label = next((name for name in LABELS if name in found), None)
    if label and any(set(form.columns) <= found for form in FORMATS if form is not PLAIN_TEXT):
        raise UserError(
            f"{where}: not supported: its column '{label}' tells unpaired preferences (KTO), and this stage compares "
            "two answers to one prompt; give rows of prompt, chosen (an answer whose label is true) and rejected (one "
            "to the same prompt whose label is false), or fine-tune on the good ones: llmlab sft --only-label true"
        )
    raise closest(PAIR_FORMATS, found, where, "preference data")


def to_pair(row: Row, form: Format) -> Row:
    """Returns `{"prompt": [...], "chosen": [...], "rejected": [...], "tools": [...] or None}` of a row.

    Where a row has two whole conversations, as hh-rlhf and UltraFeedback do, their common beginning is the prompt.

    Raises:
        UnusableRow: it lacks a column, an answer is empty or not the assistant's, or both answers are the same.
    """
    for column in form.columns:
        if row.get(column) is None:
            raise UnusableRow(f"without '{column}'")
    if form.name == "instruction preference":
        prompt = _user(row["instruction"])
        chosen, rejected = (_side(row[f"{side}_response"], form) for side in ("chosen", "rejected"))
    elif form.name == "ShareGPT preference":
        prompt = read_turns(row["conversations"])
        chosen, rejected = read_turns([row["chosen"]]), read_turns([row["rejected"]])
    else:
        given = row["prompt"] if "prompt" in form.columns else []
        start = read_turns(given) if isinstance(given, list) and given else _user(given)
        prompt, chosen, rejected = _split(start, _side(row["chosen"], form), _side(row["rejected"], form))
    prompt = read_system(row, form) + prompt
    if chosen == rejected:
        raise UnusableRow("chosen and rejected are the same")
    for side in (chosen, rejected):
        if not side or is_empty(side[0]):
            raise UnusableRow("an empty completion")
        if any(message["role"] != "assistant" for message in (side[0], side[-1])):
            raise UnusableRow("a completion that is not the assistant's")
    if not prompt:
        raise UnusableRow("an empty prompt")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "tools": read_tools(row, form)}


def _user(text: Any) -> list[Message]:
    return read_turns([{"role": "user", "content": text}]) if text else []


def _side(value: Any, form: Format) -> list[Message]:
    if isinstance(value, list):
        return read_turns(value)
    if form.name == "hh-rlhf transcript":
        return transcript_messages(value) if isinstance(value, str) else read_turns(value)
    return read_turns([{"role": "assistant", "content": value}])


def _split(
    start: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Returns prompt, chosen and rejected, where the sides may repeat the prompt."""
    shared = shared_length(chosen, rejected)
    same = chosen[:shared]
    if same and same[0]["role"] == "user":  # the sides repeat the prompt, but for its system prompt
        start = [message for message in start[:1] if message["role"] == "system"]
    elif same and same[0]["role"] == "system":
        start = []
    return start + same, chosen[shared:], rejected[shared:]

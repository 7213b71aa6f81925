"""Prompts that completions are sampled for, from rows of any format, with all other columns of the row for rewards.

How sources are read, held out, mixed and cached is `rows.py`.  Prompts stay messages here: the trainer makes tokens of
them.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from llmlab.data.chat.conversations import ConversationSource
from llmlab.data.chat.formats import (
    FORMATS,
    Format,
    closest,
    read_system,
    read_tools,
    shared_length,
    transcript_messages,
)
from llmlab.data.chat.messages import Message, Row, UnusableRow, read_turns
from llmlab.data.chat.rendering import check_tools, encode_prompt
from llmlab.data.sources import choose_column, load_rows
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError

RESERVED = ("completions", "completion_ids", "prompts", "trainer_state", "log_metric", "log_extra", "environments")
"""Names under which the trainer itself gives rewards something; `image` and `images` would be read as pictures."""


def _before_answer(turns: list[Message]) -> list[Message]:
    """Returns everything before the last turn of the assistant that ends a conversation."""
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return turns


def user_turn(text: Any) -> list[Message]:
    """Returns a text as a conversation that begins with it."""
    return read_turns([{"role": "user", "content": text}])


def _prompt(row: Row) -> list[Message]:
    return read_turns(row["prompt"]) if isinstance(row["prompt"], list) else user_turn(row["prompt"])


def _alpaca(row: Row) -> list[Message]:
    """Returns what supervised fine-tuning shows before the answer."""
    form = next(form for form in FORMATS if form.name == "Alpaca")
    return _before_answer(form.read({**row, "output": ""}))


def _transcripts(row: Row) -> list[Message]:
    """Returns what the transcripts of a pair have in common, the assistant's part left out."""
    sides = [
        transcript_messages(row[side]) if isinstance(row[side], str) else read_turns(row[side])
        for side in ("chosen", "rejected")
    ]
    return _before_answer(sides[0][: shared_length(*sides)])


PROMPT = Format("prompt", ("prompt",), _prompt, ("tools", "system"))
PROMPT_FORMATS = (
    PROMPT,
    Format("messages", ("messages",), lambda row: _before_answer(read_turns(row["messages"])), ("tools", "system")),
    Format(
        "ShareGPT conversations",
        ("conversations",),
        lambda row: _before_answer(read_turns(row["conversations"])),
        ("tools", "system"),
    ),
    Format("question", ("question",), lambda row: user_turn(row["question"])),
    Format("instruction", ("instruction",), _alpaca, ("input", "tools", "system", "history")),
    Format("hh-rlhf transcript", ("chosen", "rejected"), _transcripts),
)
"""In the order in which they are tried."""


def recognize_prompts(columns: Iterable[str], where: str) -> Format:
    """Returns the format of prompts that these columns tell.

    Raises:
        UserError: none does; it shows the columns found, the schemas expected, and the closest match.
    """
    found = set(columns)
    for candidate in PROMPT_FORMATS:
        if set(candidate.columns) <= found:
            return candidate
    raise closest(PROMPT_FORMATS, found, where, "prompts")


@dataclass(frozen=True)
class PromptSource(ConversationSource):
    """A source of prompts that was found and understood; with `column`, that column is the user's text."""

    def read(self, row: Row) -> dict[str, Any]:
        """Returns `{"prompt": [...], "tools": [...] or None, "columns": {...}}` of a row.

        Raises:
            UnusableRow: it lacks a column, its prompt is empty or not followed by the assistant.
        """
        for column in self.form.columns if self.column is None else (self.column,):
            if row.get(column) is None:
                raise UnusableRow(f"without '{column}'")
        if self.column is not None:
            prompt = user_turn(row[self.column])
        else:
            prompt = read_system(row, self.form) + self.form.read(row)
        if not any(message["role"] != "system" and message["content"].strip() for message in prompt):
            raise UnusableRow("an empty prompt")
        if prompt[-1]["role"] not in ("user", "tool"):
            raise UnusableRow("a prompt that is not the user's turn at its end")
        others = {
            name: value
            for name, value in row.items()
            if name != "prompt" and name not in RESERVED and name not in ("image", "images")
        }
        return {"prompt": prompt, "tools": read_tools(row, self.form), "columns": others}


class PromptMaker:
    """Makes rows of a prompt and of the other columns, both as JSON; a `RowMaker`.

    Args:
        tokenizer: with a chat template.
        max_prompt_length: longest prompt in tokens, longer ones are left out; None keeps all.
    """

    columns = Features({"prompt": Value("string"), "columns": Value("string")})
    counts = ("tokens",)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_prompt_length: int | None):
        self.tokenizer = tokenizer
        self.max_prompt_length = max_prompt_length
        self.limit = f"max_prompt_length = {max_prompt_length}"
        self.identity = {"prompts": max_prompt_length}

    def open(self, named: DataSource, split: str | None = None, at_most: int | None = None) -> PromptSource:
        """Finds a source of prompts and recognizes its format.

        Raises:
            UserError: there is no such source, or no format has its columns.
        """
        found = load_rows(named, split=split, at_most=at_most)
        first = found.first()
        names = list(dict.fromkeys(name for row in first for name in row))
        if not names:
            raise UserError(f"{named.name}: it has no rows")
        if named.column is not None:
            column = choose_column(named, first)
            form = Format(f"column '{column}'", (column,), lambda row: [])
        else:
            form, column = recognize_prompts(names, named.name), None
        return PromptSource(named.name, found.rows, form, found.identity, found.splits, column, count=found.count)

    def make(self, conversation: dict[str, Any]) -> dict[str, Any]:
        """Returns a prompt as a row.

        Raises:
            UnusableRow: the chat template cannot show it or its tools, or it is too long.
        """
        tools = conversation["tools"]
        ids, prompt = encode_prompt(self.tokenizer, conversation["prompt"], tools)
        check_tools(self.tokenizer.decode(ids), prompt, tools)
        columns = conversation["columns"] | ({"tools": tools} if tools else {})
        if self.max_prompt_length is not None and len(ids) > self.max_prompt_length:
            raise UnusableRow(f"longer than {self.limit} tokens")
        return {
            "prompt": json.dumps(prompt),
            "columns": json.dumps(columns, default=str),
            "tokens": len(ids),
            "whole": len(ids),
        }


def as_read(rows: Dataset) -> Dataset:
    """Returns rows of prompts as the trainer and rewards see them: messages, and every column of any row."""
    names = list(dict.fromkeys(name for text in rows["columns"] for name in json.loads(text)))

    def expand(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        others = [json.loads(text) for text in batch["columns"]]
        return {
            "prompt": [json.loads(text) for text in batch["prompt"]],
            **{name: [columns.get(name) for columns in others] for name in names},
        }

    return rows.with_transform(expand)

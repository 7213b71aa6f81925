"""Rows of online training: prompts to sample completions for, with all other columns of the row for rewards.

Prompts stay messages here: the trainer tokenizes them.
"""

import json
from typing import Any

from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from llmlab.data.chat.conversations import ConversationSource, load_conversations
from llmlab.data.chat.messages import Row, UnusableRow
from llmlab.data.chat.rendering import check_tools, encode_prompt
from llmlab.settings.data import DataSource


class PromptMaker:
    """Makes rows of a prompt and of the other columns, both as JSON; a `RowMaker`.

    Prompts of more than `max_prompt_length` tokens are unusable; None keeps all.
    """

    columns = Features({"prompt": Value("string"), "columns": Value("string")})
    counts = ("tokens",)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_prompt_length: int | None):
        self.tokenizer = tokenizer
        self.max_prompt_length = max_prompt_length
        self.limit = f"max_prompt_length = {max_prompt_length}"
        self.identity = {"prompts": max_prompt_length}

    def open(self, source: DataSource, at_most: int | None = None) -> ConversationSource:
        return load_conversations(source, "prompts", at_most=at_most)

    def make(self, row: Row) -> dict[str, Any]:
        tools = row["tools"]
        ids, prompt = encode_prompt(self.tokenizer, row["prompt"], tools)
        check_tools(self.tokenizer.decode(ids), prompt, tools)
        if self.max_prompt_length is not None and len(ids) > self.max_prompt_length:
            raise UnusableRow(f"longer than {self.limit} tokens")
        columns = row["columns"] | ({"tools": tools} if tools else {})
        return {
            "prompt": json.dumps(prompt),
            "columns": json.dumps(columns, default=str),
            "tokens": len(ids),
            "whole": len(ids),
        }


def decode_prompts(rows: Dataset) -> Dataset:
    """Returns rows of prompts as the trainer and rewards see them: messages, and every column of any row."""
    names = list(dict.fromkeys(name for text in rows["columns"] for name in json.loads(text)))

    def expand(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        others = [json.loads(text) for text in batch["columns"]]
        return {
            "prompt": [json.loads(text) for text in batch["prompt"]],
            **{name: [columns.get(name) for columns in others] for name in names},
        }

    return rows.with_transform(expand)

"""Rows of supervised fine-tuning: tokens and labels of whole conversations, their masks proven.

How sources are read, held out, mixed and cached is `rows.py`; which tokens are trained is `rendering.py`.
"""

from dataclasses import replace
from typing import Any

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from llmlab.data.chat.conversations import ConversationSource, load_conversations
from llmlab.data.chat.rendering import LossOn, Renderer, find_problem
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError


class InstructionMaker:
    """Makes rows of `input_ids` and `labels`, cut at the end; a `RowMaker`.

    Args:
        tokenizer: with a chat template, unless all rows are plain text.
        max_seq_len: longest row in tokens.
        loss_on: what is trained: every turn of the assistant, its last one (`completion`), or all tokens.
        stops: ids at which the model stops, beside those that the tokenizer tells.
        only_label: of unpaired preferences, the label of the rows to train on.
    """

    columns = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
    counts = ("tokens", "trained_tokens", "cut")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_len: int,
        loss_on: LossOn = "assistant",
        stops: tuple[int, ...] = (),
        only_label: bool | None = None,
    ):
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer, loss_on, stops)
        self.max_seq_len = max_seq_len
        self.limit = f"max_seq_len = {max_seq_len}"
        self.only_label = only_label
        self.identity = {
            "loss_on": loss_on,
            "stops": self.renderer.stops,
            "max_seq_len": max_seq_len,
            "only_label": only_label,
        }

    def open(self, named: DataSource, split: str | None = None, at_most: int | None = None) -> ConversationSource:
        """Finds a source and recognizes its format.

        Raises:
            UserError: it holds unpaired preferences and nothing says which of them to learn, or the other way round.
        """
        source = load_conversations(named, split=split, at_most=at_most)
        if source.label is not None and self.only_label is None:
            raise UserError(
                f"{source.name}: its column '{source.label}' tells unpaired preferences (KTO), good answers "
                "and bad ones, and fine-tuning would learn both; set only_label=true (--only-label true) to learn the "
                "good ones, or rename the column if it means something else"
            )
        if source.label is None and self.only_label is not None:
            raise UserError(
                f"only_label = {str(self.only_label).lower()}: {source.name} has no column 'label' that is true or "
                "false beside a completion; leave only_label out"
            )
        return replace(source, only_label=self.only_label)

    def make(self, conversation: dict[str, Any]) -> dict[str, Any]:
        """Returns a conversation as a row.

        Raises:
            UnusableRow: the chat template cannot show it.
        """
        row = self.renderer.render(conversation)
        problem = find_problem(row, self.tokenizer, self.renderer.stops)
        ids, labels = row.input_ids[: self.max_seq_len], row.labels[: self.max_seq_len]
        trained = sum(label != -100 for label in labels)
        return {
            "input_ids": ids,
            "labels": labels,
            "tokens": len(ids),
            "trained_tokens": trained,
            "cut": int(len(row.input_ids) > self.max_seq_len),
            "whole": len(row.input_ids),
            "lost": not problem and trained == 0,
            "problem": problem,
        }

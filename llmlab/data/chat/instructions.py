"""Rows of supervised fine-tuning: tokens and labels of whole conversations, their loss masks checked."""

from dataclasses import replace
from typing import Any

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from llmlab.data.chat.conversations import ConversationSource, load_conversations
from llmlab.data.chat.messages import Row
from llmlab.data.chat.rendering import LossOn, Renderer, find_problem
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError


class InstructionMaker:
    """Makes rows of `input_ids` and `labels`, truncated at the end; a `RowMaker`.

    `loss_on`, `stops`: see `Renderer`.  `only_label`: of unpaired preferences, the label of the rows to train on.
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
        self.identity = {"instructions": [loss_on, self.renderer.stops, max_seq_len, only_label]}

    def open(self, source: DataSource, at_most: int | None = None) -> ConversationSource:
        found = load_conversations(source, at_most=at_most)
        if found.label is not None and self.only_label is None:
            raise UserError(
                f"{source.name}: its column '{found.label}' marks unpaired preferences (KTO), good answers "
                "and bad ones, and fine-tuning would learn both; set only_label=true (--only-label true) to learn the "
                "good ones, or rename the column if it means something else"
            )
        if found.label is None and self.only_label is not None:
            raise UserError(
                f"only_label = {str(self.only_label).lower()}: {source.name} has no column 'label' that is true or "
                "false beside a completion; leave only_label out"
            )
        return replace(found, only_label=self.only_label)

    def make(self, conversation: Row) -> dict[str, Any]:
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

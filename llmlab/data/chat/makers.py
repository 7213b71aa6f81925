"""Encoders from conversations, preference pairs and prompts to dataset rows, which `rows.py` reads and mixes."""

import json
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from llmlab.data.chat.conversations import ConversationSource, load_conversations
from llmlab.data.chat.messages import Row, UnusableRow
from llmlab.data.chat.rendering import LossOn, RenderedRow, Renderer, check_tools, encode_prompt
from llmlab.data.splits import Use
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError

IDS = List(Value("int32"))


@dataclass(eq=False)
class RowEncoder:
    """Base class: encodes rows. Its fields but the tokenizer are settings that decide the rows."""

    use: ClassVar[Use]
    limit: ClassVar[str]  # the field that limits the length
    columns: ClassVar[Features]  # for the trainer
    counts: ClassVar[tuple[str, ...]]  # of each row whose sums are reported; `cut` is whether it was truncated
    tokenizer: PreTrainedTokenizerBase

    @property
    def identity(self) -> list[Any]:
        """What decides the rows beside the tokenizer, for the cache key."""
        return [self.use, *(getattr(self, each.name) for each in fields(self) if each.name != "tokenizer")]

    def open(self, source: DataSource, at_most: int | None = None) -> ConversationSource:
        """Opens a source; at most `at_most` rows will be read."""
        return load_conversations(source, self.use, at_most=at_most)

    def make(self, conversation: Row) -> dict[str, Any]:
        """Returns `columns`, `counts` and those of the checks in `rows.py` that apply."""
        raise NotImplementedError


@dataclass(eq=False)
class InstructionEncoder(RowEncoder):
    """Rows of supervised fine-tuning, truncated on the right; of unpaired preferences those with `only_label`."""

    use, limit = "instructions", "max_seq_len"
    columns = Features({"input_ids": IDS, "labels": IDS})
    counts = ("tokens", "trained_tokens", "cut")
    max_seq_len: int
    loss_on: LossOn = "assistant"
    stops: tuple[int, ...] = ()
    only_label: bool | None = None

    def __post_init__(self) -> None:
        self.renderer = Renderer(self.tokenizer, self.loss_on, self.stops)

    def open(self, source: DataSource, at_most: int | None = None) -> ConversationSource:
        found = super().open(source, at_most)
        if found.label is not None and self.only_label is None:
            marks = f"its column '{found.label}' marks unpaired preferences (KTO), good answers and bad ones"
            advice = "set only_label=true (--only-label true) to learn the good ones, or rename the column"
            raise UserError(f"{source.name}: {marks}, and fine-tuning would learn both; {advice}")
        if found.label is None and self.only_label is not None:
            label = str(self.only_label).lower()
            problem = f"{source.name} has no column 'label' that is true or false beside a completion"
            raise UserError(f"only_label = {label}: {problem}; leave only_label out")
        return replace(found, only_label=self.only_label)

    def make(self, conversation: Row) -> dict[str, Any]:
        row = self.renderer.render(conversation)
        problem = self.renderer.find_problem(row)
        ids, labels = row.input_ids[: self.max_seq_len], row.labels[: self.max_seq_len]
        trained = sum(label != -100 for label in labels)
        counts = {"tokens": len(ids), "trained_tokens": trained, "cut": int(len(row.input_ids) > self.max_seq_len)}
        checks = {"whole": len(row.input_ids), "lost": not problem and trained == 0, "problem": problem}
        return {"input_ids": ids, "labels": labels, **counts, **checks}


@dataclass(eq=False)
class PreferenceEncoder(RowEncoder):
    """Rows of preference optimization: prompts truncated on the left, completions on the right."""

    use, limit = "preferences", "max_length"
    columns = Features({"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS})
    counts = ("tokens", "prompt_cut", "cut")
    max_length: int
    max_prompt_length: int | None = None
    stops: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.renderer = Renderer(self.tokenizer, "all", self.stops)

    def make(self, conversation: Row) -> dict[str, Any]:
        prompt, chosen, rejected = self.renderer.render_pair(conversation)
        if chosen == rejected:
            raise UnusableRow("chosen and rejected are the same")
        longest = max(len(chosen), len(rejected))
        context = prompt if self.max_prompt_length is None else prompt[-self.max_prompt_length :]
        room = max(self.max_length - len(context), 0)
        ids = {"prompt_ids": context, "chosen_ids": chosen[:room], "rejected_ids": rejected[:room]}
        tokens = 2 * len(context) + len(chosen[:room]) + len(rejected[:room])
        counts = {"tokens": tokens, "prompt_cut": int(len(context) < len(prompt)), "cut": int(longest > room)}
        problems = [self.renderer.find_problem(RenderedRow(each, [True] * len(each))) for each in (chosen, rejected)]
        checks = {"whole": len(prompt) + longest, "problem": problems[0] or problems[1]}
        # after truncation chosen and rejected must still differ
        return {**ids, **counts, **checks, "lost": chosen[:room] == rejected[:room]}


@dataclass(eq=False)
class PromptEncoder(RowEncoder):
    """Rows of online training: a prompt as messages, and the row's other columns for rewards, both as JSON."""

    use, limit = "prompts", "max_prompt_length"
    columns = Features({"prompt": Value("string"), "columns": Value("string")})
    counts = ("tokens",)
    max_prompt_length: int | None

    def make(self, conversation: Row) -> dict[str, Any]:
        tools = conversation["tools"]
        ids, prompt = encode_prompt(self.tokenizer, conversation["prompt"], tools)
        check_tools(self.tokenizer.decode(ids), prompt, tools)
        if self.max_prompt_length is not None and len(ids) > self.max_prompt_length:
            raise UnusableRow(f"longer than max_prompt_length = {self.max_prompt_length} tokens")
        columns = json.dumps(conversation["columns"] | ({"tools": tools} if tools else {}), default=str)
        return {"prompt": json.dumps(prompt), "columns": columns, "tokens": len(ids), "whole": len(ids)}


def decode_prompts(rows: Dataset) -> Dataset:
    """Returns rows of prompts as the trainer and rewards take them: messages, and the union of all rows' columns."""
    names = list(dict.fromkeys(name for text in rows["columns"] for name in json.loads(text)))

    def decode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        others = [json.loads(text) for text in batch["columns"]]
        prompts = {"prompt": [json.loads(text) for text in batch["prompt"]]}
        return prompts | {name: [columns.get(name) for columns in others] for name in names}

    return rows.with_transform(decode)

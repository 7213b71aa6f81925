"""Rows of preference optimization: a prompt and two completions of it, as tokens."""

from typing import Any

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from llmlab.data.chat.conversations import ConversationSource, load_conversations
from llmlab.data.chat.messages import Row, UnusableRow
from llmlab.data.chat.rendering import Renderer
from llmlab.settings.data import DataSource


class PreferenceMaker:
    """Makes rows of `prompt_ids`, `chosen_ids` and `rejected_ids`; a `RowMaker`.

    A completion is what the chat template writes after the prompt, the end of the turn included.  Prompts are
    truncated on the left to `max_prompt_length`, completions on the right to what is left of `max_length`.
    """

    columns = Features({name: List(Value("int32")) for name in ("prompt_ids", "chosen_ids", "rejected_ids")})
    counts = ("tokens", "prompt_cut", "cut")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        max_prompt_length: int | None = None,
        stops: tuple[int, ...] = (),
    ):
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer, "all", stops)
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.limit = f"max_length = {max_length}"
        self.identity = {"preferences": [self.renderer.stops, max_length, max_prompt_length]}

    def open(self, source: DataSource, at_most: int | None = None) -> ConversationSource:
        return load_conversations(source, "preferences", at_most=at_most)

    def make(self, pair: Row) -> dict[str, Any]:
        prompt, chosen, rejected = self.renderer.render_pair(pair)
        if chosen == rejected:
            raise UnusableRow("chosen and rejected are the same")
        longest = max(len(chosen), len(rejected))
        kept = prompt if self.max_prompt_length is None else prompt[-self.max_prompt_length :]
        room = max(self.max_length - len(kept), 0)
        return {
            "prompt_ids": kept,
            "chosen_ids": chosen[:room],
            "rejected_ids": rejected[:room],
            "tokens": 2 * len(kept) + len(chosen[:room]) + len(rejected[:room]),
            "prompt_cut": int(len(kept) < len(prompt)),
            "cut": int(longest > room),
            "whole": len(prompt) + longest,
            "lost": chosen[:room] == rejected[:room],  # what is left must still tell the two apart
            "problem": self._problem(chosen) or self._problem(rejected),
        }

    def _problem(self, completion: list[int]) -> str:
        stops = self.renderer.stops
        end = next((k for k in reversed(range(len(completion))) if completion[k] in stops), None)
        if end is not None and not self.tokenizer.decode(completion[end + 1 :]).strip():
            return ""
        last = self.tokenizer.decode(completion[-1:])
        return f"a completion does not end its turn (it ends with {last!r}), so the model would never stop"

"""Plays episodes: a model writes, the tools that it calls run, their results are appended, until the episode ends.

Tokens that the model sampled are kept as they were sampled and never encoded again. What samples is the caller's:
GRPO and PPO give their trainer's sampling, RS-SFT, AWR, gates and `llmlab episodes` that of `inference.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from llmlab.data.chat.messages import Message

Sampler = Callable[[list[list[int]]], list[list[int]]]
"""Returns the tokens that follow each prompt, up to and with the token that ends the turn."""


class Task(NamedTuple):
    """What an episode begins with: an environment, the prompt's messages, and the columns that `reset` gets."""

    environment: Any
    prompt: list[Message]
    columns: dict[str, Any]


@dataclass
class Episode:
    """An episode as it was played.

    `completion_ids` are all tokens after the prompt, `mask` is 1 for those that the model sampled and 0 for results
    of tools, both (time,). `completion` has the same as messages of the assistant and of tools.
    """

    environment: Any
    prompt: list[Message]  # with the text of `reset`
    prompt_ids: list[int]
    completion_ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    completion: list[Message] = field(default_factory=list)
    calls: int = 0
    end: Literal["done", "answer", "calls", "length"] = "answer"
    """The environment's or a stop tool's, a turn without a call, `max_episode_length`, or the room for tokens."""


def play(
    tasks: Sequence[Task],
    sample: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_episode_length: int = 20,
    max_new_tokens: int,
    max_length: int | None,
    tool_timeout: float = 30.0,
) -> list[Episode]:
    """Plays one episode of each task, all at the same time, turn by turn.

    Args:
        tasks: environments must be distinct objects.
        sample: returns at most `max_new_tokens` tokens for each row of token ids.
        tokenizer: with a chat template that shows tools and their results.
        max_episode_length: calls of tools after which an episode ends.
        max_new_tokens: of one turn.
        max_length: longest prompt and completion together in tokens; an episode ends where a turn might not fit.
        tool_timeout: seconds after which a call of a tool is abandoned.
    """
    raise NotImplementedError

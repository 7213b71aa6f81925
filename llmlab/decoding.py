"""Continues rows of tokens with any Transformers causal language model: the loop behind chat, sampling and rollouts.

What is sampled, and how, is Transformers' `GenerationConfig`; where the loop cannot be right, `generate` does the work.
"""

from typing import Any, NamedTuple

from transformers import GenerationConfig


class Decoded(NamedTuple):
    """Completions, up to and with the end token, and the log-probabilities of their tokens, where they were asked for.

    Log-probabilities are those of `log_softmax(logits / temperature)` in fp32, as TRL scores tokens: before top-k,
    top-p and penalties. They are None where `generate` did the work.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]] | None


def decode(
    model: Any,
    rows: list[list[int]],
    config: GenerationConfig,
    *,
    max_length: int | None = None,
    batch_size: int | None = None,
    log_probs: bool = False,
) -> Decoded:
    """Continues rows of token ids, in the order of the rows.

    The model samples in evaluation mode and is left as it was. Identical prompts are read once; rows that finish make
    room for those that wait. The global random state of torch is drawn from.

    Args:
        model: a causal language model or a PEFT model, wherever its weights are; precision is that of the model, or of
            the autocast that this is called in.
        rows: prompts, each of at least one token, without padding.
        config: `max_new_tokens`, end tokens and sampling options; what it leaves open is the model's own.
        max_length: of prompt and completion together; None is no limit.
        batch_size: rows that are decoded at the same time; None is all.
        log_probs: whether to return the log-probabilities of the tokens.
    """
    raise NotImplementedError

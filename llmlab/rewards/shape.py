"""Rewards for a completion's shape: how long it is, and how much of it repeats itself.

Everything the model wrote counts, its tool calls too; what tools answered does not.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge

from llmlab.rewards.completions import Completion, units

Unit = Literal["words", "characters", "tokens"]


def length(
    completions: list[Completion],
    completion_ids: list[Sequence[int]] | None = None,
    *,
    target: Annotated[int, Ge(1)] = 200,
    unit: Unit = "words",
    **columns: Any,
) -> list[float | None]:
    """Scores how near a completion's length is to a target: 1 at the target, 0 at nothing and at twice the target.

    Args:
        completions: texts or messages of the batch.
        completion_ids: the completions' tokens, given by trainers.
        target: the best length.
        unit: what is counted: `words`, `characters` or `tokens`.
        columns: not used.

    Returns:
        `max(0, 1 - |length - target| / target)`.

    Raises:
        UserError: tokens are to be counted where there are none.
    """
    scores: list[float | None] = []
    for row, completion in enumerate(completions):
        count = len(units(completion, unit, None if completion_ids is None else completion_ids[row]))
        scores.append(max(0.0, 1 - abs(count - target) / target))
    return scores


def repetition_penalty(
    completions: list[Completion],
    completion_ids: list[Sequence[int]] | None = None,
    *,
    n: Annotated[int, Ge(1)] = 3,
    unit: Unit = "words",
    **columns: Any,
) -> list[float | None]:
    """Scores the share of n-grams that occurred before in the same completion; its weight is negative.

    Args:
        completions: texts or messages of the batch.
        completion_ids: the completions' tokens, given by trainers.
        n: size of the n-grams.
        unit: what they are made of; `characters` suits languages that do not space words.
        columns: not used.

    Returns:
        `1 - different / all`, from 0 (also for fewer than n units) to below 1.

    Raises:
        UserError: tokens are to be counted where there are none.

    Source: Yeo et al. 2025 (arXiv:2502.03373), appendix C.2.
    """
    scores: list[float | None] = []
    for row, completion in enumerate(completions):
        parts = units(completion, unit, None if completion_ids is None else completion_ids[row])
        grams = [tuple(parts[start : start + n]) for start in range(len(parts) - n + 1)]
        scores.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return scores

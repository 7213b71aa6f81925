"""Rewards for a completion's shape, length and repetition, of everything the model wrote but results of tools."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge

from llmlab.rewards.completions import Completion, model_text
from llmlab.rewards.function import Row, reward_function
from llmlab.settings.errors import UserError

Unit = Literal["words", "characters", "tokens"]


@reward_function()
def length(completion: Completion, row: Row, *, target: Annotated[int, Ge(1)] = 200, unit: Unit = "words") -> float:
    """Scores how near a completion's length is to a target: 1 at the target, falling linearly to 0 at zero and at
    twice the target.

    Args:
        target: the best length.
        unit: what is counted: `words`, `characters` or `tokens`, which trainers pass as `completion_ids`.

    Returns:
        `max(0, 1 - |length - target| / target)`.
    """
    return max(0.0, 1 - abs(len(_units(completion, unit, row)) - target) / target)


@reward_function(weight=-1.0)
def repetition_penalty(
    completion: Completion, row: Row, *, n: Annotated[int, Ge(1)] = 3, unit: Unit = "words"
) -> float:
    """Scores the share of n-grams that occurred before in the same completion; its weight is negative.

    Args:
        n: size of the n-grams.
        unit: what they consist of: `words`, `tokens`, or `characters`, for languages without spaces between words.

    Returns:
        `1 - different / all`, from 0 (also for fewer than n units) to below 1.

    Source: Yeo et al. 2025 (arXiv:2502.03373), appendix C.2.
    """
    units = _units(completion, unit, row)
    grams = [tuple(units[start : start + n]) for start in range(len(units) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _units(completion: Completion, unit: Unit, row: Row) -> Sequence[Any]:
    """Returns what the model wrote, cut into units."""
    if unit == "tokens":
        if row.get("completion_ids") is None:
            raise UserError("unit = tokens: there are no token ids here (training has them); expected words")
        return row["completion_ids"]
    text = model_text(completion)
    return text.split() if unit == "words" else text

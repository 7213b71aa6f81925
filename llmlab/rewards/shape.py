"""Rewards for all that the model wrote but results of tools: its length, repetition, and whether it stays inside
guardrails, which `llmlab/simulator/guardrails.py` reads from files."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from llmlab.rewards.completions import Completion, model_text
from llmlab.rewards.function import Row, reward_function
from llmlab.settings.errors import UserError
from llmlab.settings.paths import expand
from llmlab.simulator.guardrails import SHIPPED, read_guardrails

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


@reward_function(weight=2.0, low="violation", note="guardrails_broken")
def guardrail_pass(
    completion: Completion,
    row: Row,
    *,
    file: str | None = None,
    defaults: bool = True,
    violation: Annotated[float, Le(0)] = 0.0,
) -> tuple[float, str]:
    """Scores whether everything the model wrote, its tool calls too, stays inside the guardrails.

    The names of broken guardrails go into TRL's table of completions.

    Args:
        file: a YAML file of guardrails of your own, of the form of `llmlab/simulator/guardrails.yaml`.
        defaults: include the shipped guardrails.
        violation: the score of a violation; -1 turns it into a penalty of the full weight, the guide's alternative.

    Returns:
        1 where no guardrail is broken, else `violation`.

    Source: seed, RL guide, section 3, "Extra important (or -2.0 penalty)".
    """
    rules = [read_guardrails(SHIPPED)] if defaults else []
    rules += [read_guardrails(expand(file))] if file else []
    if not any(rule.deny or rule.allow for rule in rules):
        raise UserError("there is no guardrail to watch for: expected a `file` that has some, or defaults = true")
    text = model_text(completion)
    broken = [name for rule in rules for name in rule.broken_by(text)]
    return float(violation) if broken else 1.0, ", ".join(broken)

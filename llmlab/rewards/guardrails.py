"""The reward for staying inside guardrails, which `llmlab/simulator/guardrails.py` reads from files."""

from typing import Annotated

from annotated_types import Le

from llmlab.rewards.completions import Completion, model_text
from llmlab.rewards.function import Row, reward_function
from llmlab.settings.errors import UserError
from llmlab.settings.paths import expand
from llmlab.simulator.guardrails import SHIPPED, read_guardrails


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

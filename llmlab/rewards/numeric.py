"""The reward for the right number, as in GSM8K: the number after the last `####`, else the last number in the text.

Numbers are compared as decimals, so that size costs nothing; what is not a number is never evaluated.
"""

import re
from decimal import Context, Decimal
from typing import Annotated, Any

from annotated_types import Ge

from llmlab.rewards.completions import Completion, answer, column_of
from llmlab.settings.errors import UserError

MARK = "####"
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,4}(?![0-9]))?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?:(?<![\w.)])(?P<sign>[-+\u2212])[ ]?)?(?:[$\u20ac\u00a3][ ]?)?(?P<over>{_UNSIGNED})"
    rf"(?:[ ]?/[ ]?(?P<under>{_UNSIGNED}))?"
)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_EXACT = Context(prec=60, Emax=10**6, Emin=-(10**6), traps=[])
_LAST = 20_000  # characters in which the number is looked for


def numeric_match(
    completions: list[Completion], *, column: str = "answer", tolerance: Annotated[float, Ge(0)] = 1e-6, **columns: Any
) -> list[float | None]:
    """Scores whether the answer's number is the expected one.

    Reads `1,234.50`, `-3`, `$18`, `.5` and `2e3`, fractions such as `1/2` and `\\frac{1}{2}` as decimals, `50%` as 50.

    Args:
        completions: texts or messages of the batch.
        column: the column of expected answers: numbers, or texts read in the same way (a GSM8K solution with `####`).
        tolerance: largest difference, as a share of the expected number; whole numbers must be equal.
        columns: the column that is named.

    Returns:
        1 or 0; None where the row has no expected answer.

    Raises:
        UserError: there is no such column, or an expected answer holds no number.

    Source: Cobbe et al. 2021 (arXiv:2110.14168) for the form of the answer.
    """
    scores: list[float | None] = []
    for row, (completion, expected) in enumerate(zip(completions, column_of(columns, column, "column"), strict=True)):
        if expected is None:
            scores.append(None)
            continue
        goal = number_in(str(expected))
        if goal is None:
            raise UserError(f"row {row}: {column} = {str(expected)[-60:]!r}: there is no number in it")
        said = number_in(answer(completion))
        scores.append(float(said is not None and _close(said, goal, tolerance)))
    return scores


def number_in(text: str) -> Decimal | None:
    """Returns the number after the last `####`, else the last number; None where there is none."""
    before, mark, after = text.rpartition(MARK)
    text = _FRACTION.sub(r"\1/\2", after[:_LAST] if mark else after[-_LAST:])
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    match = matches[0] if mark else matches[-1]
    value = _decimal(match["over"])
    if match["under"]:
        value = _EXACT.divide(value, _decimal(match["under"]))
    if not value.is_finite():
        return None
    return value.copy_negate() if match["sign"] in ("-", "\u2212") else value


def _decimal(digits: str) -> Decimal:
    return Decimal(digits.replace(",", ""))


def _close(said: Decimal, goal: Decimal, tolerance: float) -> bool:
    if said == goal or (_is_whole(said) and _is_whole(goal)):
        return said == goal
    difference = _EXACT.abs(_EXACT.subtract(said, goal))
    return difference <= _EXACT.multiply(Decimal(tolerance), _EXACT.abs(goal))


def _is_whole(value: Decimal) -> bool:
    return value == value.to_integral_value()

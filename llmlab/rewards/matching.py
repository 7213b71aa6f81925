"""Rewards for the expected answer: word for word, as a number (GSM8K's form), or as a regular expression. Numbers are
compared as decimals, never evaluated; patterns run with a time limit, since they can backtrack without end."""

import re
from decimal import Context, Decimal
from typing import Annotated, Any

from annotated_types import Ge

from llmlab.rewards.completions import Completion, answer
from llmlab.rewards.function import Row, RowError, Score, column_value, reward_function
from llmlab.simulator.guardrails import compile_pattern, time_limit

MARK = "####"
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,4}(?![0-9]))?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?:(?<![\w.)])(?P<sign>[-+\u2212])[ ]?)?(?:[$\u20ac\u00a3][ ]?)?(?P<over>{_UNSIGNED})"
    rf"(?:[ ]?/[ ]?(?P<under>{_UNSIGNED}))?"
)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_EXACT = Context(prec=60, Emax=10**6, Emin=-(10**6), traps=[])
_MAX_CHARACTERS = 20_000  # in which the number is looked for


@reward_function()
def exact_match(completion: Completion, row: Row, *, column: str = "answer", ignore_case: bool = False) -> Score:
    """Scores whether the answer equals the expected one; whitespace is normalized.

    Args:
        column: the column of expected answers; a list means several accepted answers.
        ignore_case: compare without case.

    Returns:
        1 or 0; None where the row has no expected answer.
    """
    expected = column_value(row, column)
    if expected is None:
        return None

    def plain(text: Any) -> str:
        text = " ".join(str(text).split())
        return text.casefold() if ignore_case else text

    return float(plain(answer(completion)) in map(plain, expected if isinstance(expected, list) else [expected]))


@reward_function()
def regex_match(
    completion: Completion, row: Row, *, pattern: str | None = None, column: str = "regex", full: bool = False
) -> Score:
    """Scores whether a regular expression matches the answer.

    Args:
        pattern: of the `regex` module (Python's `re` and more), with DOTALL; None takes each row's from a column.
        column: the column of patterns.
        full: match the whole answer, not a part of it.

    Returns:
        1 or 0; None where the row has no pattern.
    """
    import regex

    if pattern is not None:
        compiled = compile_pattern(pattern, "pattern", regex.DOTALL)
    elif (pattern := column_value(row, column, "without a pattern, ")) is not None:
        compiled = compile_pattern(pattern, column, regex.DOTALL, RowError)
    else:
        return None
    with time_limit(pattern) as timeout:
        match = compiled.fullmatch if full else compiled.search
        return float(match(answer(completion), timeout=timeout) is not None)


@reward_function()
def numeric_match(
    completion: Completion, row: Row, *, column: str = "answer", tolerance: Annotated[float, Ge(0)] = 1e-6
) -> Score:
    """Scores whether the answer's number is the expected one.

    Reads `1,234.50`, `-3`, `$18`, `.5` and `2e3`, fractions such as `1/2` and `\\frac{1}{2}` as decimals, `50%` as 50.

    Args:
        column: the column of expected answers: numbers, or texts read in the same way (a GSM8K solution with `####`).
        tolerance: largest relative difference; whole numbers must be equal.

    Returns:
        1 or 0; None where the row has no expected answer.

    Source: Cobbe et al. 2021 (arXiv:2110.14168) for the form of the answer.
    """
    expected = column_value(row, column)
    if expected is None:
        return None
    target = number_in(str(expected))
    if target is None:
        raise RowError(f"{column} = {str(expected)[-60:]!r}: there is no number in it")
    number = number_in(answer(completion))
    return float(number is not None and _is_close(number, target, tolerance))


def number_in(text: str) -> Decimal | None:
    """Returns the number after the last `####`, else the last number; None where there is none."""
    _, mark, after = text.rpartition(MARK)
    text = _FRACTION.sub(r"\1/\2", after[:_MAX_CHARACTERS] if mark else after[-_MAX_CHARACTERS:])
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    match = matches[0] if mark else matches[-1]
    value = Decimal(match["over"].replace(",", ""))
    if match["under"]:
        value = _EXACT.divide(value, Decimal(match["under"].replace(",", "")))
    if not value.is_finite():
        return None
    return value.copy_negate() if match["sign"] in ("-", "\u2212") else value


def _is_close(number: Decimal, target: Decimal, tolerance: float) -> bool:
    if all(value == value.to_integral_value() for value in (number, target)):
        return number == target
    difference = _EXACT.abs(_EXACT.subtract(number, target))
    return difference <= _EXACT.multiply(Decimal(tolerance), _EXACT.abs(target))

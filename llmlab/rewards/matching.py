"""Rewards for the expected answer: word for word, or as a regular expression.

Patterns run with a time limit, since model output can trigger catastrophic backtracking.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmlab.rewards.completions import Completion, answer
from llmlab.rewards.function import Row, RowError, Score, column_value, reward_function
from llmlab.settings.errors import UserError

TIMEOUT = 1.0
"""Seconds that one pattern may take on one completion."""


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


def compile_pattern(pattern: str, where: str, flags: int, error_type: type[UserError] = UserError) -> Any:
    """Compiles a pattern of the `regex` module, which keeps compiled ones; `where` names it in the error."""
    import regex

    try:
        return regex.compile(pattern, flags)
    except regex.error as error:
        raise error_type(f"{where} = {pattern}: this is not a regular expression: {error}") from None


@contextmanager
def time_limit(pattern: str) -> Iterator[float]:
    """Yields the `timeout` of a search, and names the pattern that exceeds it."""
    try:
        yield TIMEOUT
    except TimeoutError:
        raise RowError(
            f"pattern = {pattern}: took over {TIMEOUT:g} s on this completion: catastrophic backtracking; "
            "avoid repeats inside repeats such as (a|aa)+"
        ) from None

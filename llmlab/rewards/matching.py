"""Rewards for saying the expected thing: word for word, or as a regular expression.

Patterns run with a time limit, since what a model writes can make a careless one take for ever.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from llmlab.rewards.completions import Completion, answer, column_of
from llmlab.settings.errors import UserError

SECONDS = 1.0
"""Time that one pattern may take on one completion."""


def exact_match(
    completions: list[Completion], *, column: str = "answer", ignore_case: bool = False, **columns: Any
) -> list[float | None]:
    """Scores whether the answer equals the expected one; runs of space count as one space.

    Args:
        completions: texts or messages of the batch.
        column: the column of expected answers; a list in a row is several that are right.
        ignore_case: upper and lower case alike.
        columns: the column that is named.

    Returns:
        1 or 0; None where the row has no expected answer.

    Raises:
        UserError: there is no such column.
    """

    def plain(text: Any) -> str:
        text = " ".join(str(text).split())
        return text.casefold() if ignore_case else text

    scores: list[float | None] = []
    for completion, expected in zip(completions, column_of(columns, column, "column"), strict=True):
        right = expected if isinstance(expected, list) else [expected]
        said = plain(answer(completion))
        scores.append(None if expected is None else float(any(said == plain(text) for text in right)))
    return scores


def regex_match(
    completions: list[Completion],
    *,
    pattern: str | None = None,
    column: str = "regex",
    full: bool = False,
    **columns: Any,
) -> list[float | None]:
    """Scores whether a regular expression occurs in the answer.

    Args:
        completions: texts or messages of the batch.
        pattern: of the `regex` module (Python's `re` and more); `.` stands for every character, lines too. None takes
            each row's from a column.
        column: the column of patterns.
        full: the whole answer must match, not a part of it.
        columns: the column that is named.

    Returns:
        1 or 0; None where the row has no pattern.

    Raises:
        UserError: a pattern is wrong, or takes over a second on a completion (it backtracks without end).
    """
    if pattern is not None:
        patterns: list[Any] = [pattern] * len(completions)
        compile_pattern(pattern, "pattern", dot_all=True)
    else:
        patterns = column_of(columns, column, "without a pattern, column")
    scores: list[float | None] = []
    for row, (completion, wanted) in enumerate(zip(completions, patterns, strict=True)):
        if wanted is None:
            scores.append(None)
            continue
        compiled = compile_pattern(wanted, f"row {row}: {column}", dot_all=True)
        look = compiled.fullmatch if full else compiled.search
        try:
            scores.append(float(look(answer(completion), timeout=SECONDS) is not None))
        except TimeoutError:
            raise _too_slow(wanted, f"row {row}: ") from None
    return scores


@lru_cache(maxsize=1024)
def compile_pattern(pattern: str, where: str, dot_all: bool = False) -> Any:
    """Compiles a pattern: of `regex_match` as it stands, of guardrails for any case and each line.

    Raises:
        UserError: it is wrong; `where` says whose it is.
    """
    import regex

    try:
        return regex.compile(pattern, regex.DOTALL if dot_all else regex.IGNORECASE | regex.MULTILINE)
    except regex.error as error:
        raise UserError(f"{where} = {pattern}: this is not a regular expression: {error}") from None


def search_all(pattern: str, text: str) -> Iterator[Any]:
    """Yields the matches of a guardrail's pattern in a text.

    Raises:
        UserError: it takes over a second.
    """
    try:
        yield from compile_pattern(pattern, "pattern").finditer(text, timeout=SECONDS)
    except TimeoutError:
        raise _too_slow(pattern) from None


def _too_slow(pattern: str, where: str = "") -> UserError:
    return UserError(
        f"{where}pattern = {pattern}: took over {SECONDS:g} s on this completion: it backtracks without end; "
        "avoid repeats inside repeats such as (a|aa)+"
    )

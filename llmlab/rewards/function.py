"""`@reward_function`: a reward is written for one completion, and called with a batch, as TRL's trainers do.

Weighing and combining rewards is `compose`; `Reward` checks what custom functions return.
"""

import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from typing import Any

from llmlab.settings.errors import UserError, did_you_mean

TRL_INPUTS = ("completions", "prompts", "completion_ids", "environments", "trainer_state", "log_metric", "log_extra")
"""What TRL's trainers pass to a reward beside the columns of the data set."""


Row = dict[str, Any]
Score = float | None


class RowError(UserError):
    """One row cannot be scored: its completion, or its value of a column, is not what the reward reads."""


@contextmanager
def row_errors(row: int) -> Iterator[None]:
    """Adds the row's number to a `RowError`."""
    try:
        yield
    except RowError as error:
        raise UserError(f"row {row}: {error}") from None


def reward_function(
    *, weight: float = 1.0, low: float | str = 0.0, high: float | str = 1.0, note: str | None = None, threads: int = 1
) -> Callable[[Callable[..., Any]], Callable[..., list[float | None]]]:
    """Turns a function that scores one completion into a reward, which takes a batch.

    The function gets the completion, the row's columns as a mapping, and the reward's parameters as keyword-only
    arguments. It returns a number, or None where the reward does not apply.

    Args:
        weight: default weight in a composed reward.
        low: smallest score, or the name of the parameter that sets it.
        high: largest score, or the name of the parameter that sets it.
        note: column of notes in TRL's table of completions; the function then returns a score and a note.
        threads: rows scored at the same time, for functions that wait for a process.

    Returns:
        The decorator. Rewards are called with `completions` (texts or lists of messages), parameters, and columns as
        lists; they return a list of numbers or None, and have `weight` and `bounds` as attributes.
    """

    def decorate(score: Callable[..., Any]) -> Callable[..., list[float | None]]:
        completion, row, *parameters = inspect.signature(score).parameters.values()
        names = {parameter.name for parameter in parameters}

        @wraps(score)
        def score_batch(completions: list[Any], **columns: Any) -> list[float | None]:
            options = {name: columns.pop(name) for name in names & columns.keys()}
            lists = {name: column for name, column in columns.items() if isinstance(column, list)}

            def score_row(number: int) -> Any:
                with row_errors(number):
                    values = {name: column[number] for name, column in lists.items()}
                    return score(completions[number], values, **options)

            with ThreadPoolExecutor(threads) as pool:
                scores = list((pool.map if threads > 1 else map)(score_row, range(len(completions))))
            if note is None:
                return scores
            if columns.get("log_extra") is not None:
                columns["log_extra"](note, [text for _, text in scores])
            return [value for value, _ in scores]

        columns = row.replace(name="columns", kind=row.VAR_KEYWORD)
        signature = inspect.Signature([completion.replace(name="completions"), *parameters, columns])
        score_batch.__signature__ = signature  # type: ignore[attr-defined]
        score_batch.weight, score_batch.bounds = weight, (low, high)  # type: ignore[attr-defined]
        return score_batch

    return decorate


def column_value(row: Row, column: str, condition: str = "") -> Any:
    """Returns a row's value of the column that a parameter names."""
    if column not in row:
        others = sorted(row.keys() - set(TRL_INPUTS))
        raise UserError(
            f"{condition}column = {column}: there is no such column beside prompt and completion "
            f"(found {', '.join(others) or 'none'}){did_you_mean(column, others)}"
        )
    return row[column]

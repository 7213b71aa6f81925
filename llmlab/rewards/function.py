"""`@reward_function` makes a reward of a function of one completion; `Reward` checks what any function returns. Both
are called with a batch, as TRL's trainers do. Weighing and combining rewards is `compose`."""

import inspect
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any, SupportsFloat

from llmlab.rewards.completions import Completion, RowError, model_text
from llmlab.settings.errors import UserError, did_you_mean, reading, reason_of, shorten
from llmlab.simulator.guardrails import SlowPattern

TRL_INPUTS = ("completions", "prompts", "completion_ids", "environments", "trainer_state", "log_metric", "log_extra")
"""What TRL's trainers pass to a reward beside the columns of the dataset."""

Row = dict[str, Any]
Score = float | None


def reward_function(
    *, weight: float = 1.0, low: float | str = 0.0, high: float | str = 1.0, note: str | None = None, threads: int = 1
) -> Callable[[Callable[..., Any]], Callable[..., list[float | None]]]:
    """Turns `score(completion, row, *, parameters)`, a number or None, into a reward, which takes a batch. Bounds may
    be names of parameters; with a `note`, a column of TRL's table of completions, it returns a score and a note."""

    def decorate(score: Callable[..., Any]) -> Callable[..., list[float | None]]:
        completion, row, *parameters = inspect.signature(score).parameters.values()
        names = {parameter.name for parameter in parameters}

        @wraps(score)
        def score_batch(completions: list[Any], **columns: Any) -> list[float | None]:
            options = {name: columns.pop(name) for name in names & columns.keys()}
            lists = {name: column for name, column in columns.items() if isinstance(column, list)}

            def score_row(number: int) -> Any:
                values = {name: column[number] for name, column in lists.items()}
                try:
                    return score(completions[number], values, **options)
                except (RowError, SlowPattern) as error:  # of this row alone
                    raise UserError(f"row {number}: {error}") from None

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
        found = f"(found {', '.join(others) or 'none'}){did_you_mean(column, others)}"
        raise UserError(f"{condition}column = {column}: there is no such column beside prompt and completion {found}")
    return row[column]


class Reward:
    """A reward function with weight and range whose output is validated.

    Args:
        function: takes `completions` and columns as keyword lists, returns one number or None a completion. Columns
            with the name of an argument that `functools.partial` gave it are not passed to it.
        name: under which it is logged.
        weight: factor of its values in a composed reward.
        low: lower bound; values are clipped to it; None where it is unknown.
        high: upper bound; values are clipped to it; None where it is unknown.
        cap: largest absolute value of weight x value.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        weight: float = 1.0,
        low: float | None = None,
        high: float | None = None,
        cap: float | None = None,
    ):
        call = function if inspect.isroutine(function) else getattr(function, "func", function.__call__)
        self.name = self.__name__ = name or getattr(function, "__name__", type(function).__name__)
        self.function, self.weight, self.low, self.high, self.cap = function, weight, low, high, cap
        if inspect.iscoroutinefunction(call):
            raise UserError(f"reward '{self.name}': this function is async; give it to GRPOTrainer itself")
        accepted = inspect.signature(function).parameters
        self._takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
        self._accepted, self._parameters = frozenset(accepted), frozenset(getattr(function, "keywords", ()))

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        """Returns one number a completion, or None where the reward does not apply."""
        completions = list(completions)
        taken = (columns.keys() if self._takes_all else self._accepted) - self._parameters
        columns = {name: column for name, column in columns.items() if name in taken}
        try:
            values = self.function(completions=completions, **columns)
        except UserError as error:
            raise UserError(f"reward '{self.name}': {error}") from None
        except (Exception, SystemExit) as error:  # whatever a user's function raises
            where, error = self._find_failure(completions, columns, error)
            reason = f"{type(error).__name__}: {reason_of(error)}"
            raise UserError(f"reward '{self.name}' failed {where}: {reason}") from error
        with reading(f"reward '{self.name}' gave {type(values).__name__}; expected a list with a number a completion"):
            values = list(values)
        if len(values) != len(completions):
            raise UserError(f"reward '{self.name}' gave {len(values)} values for {len(completions)} completions")
        return [None if value is None else self._number(value, row, completions) for row, value in enumerate(values)]

    def _number(self, value: Any, row: int, completions: list[Completion]) -> float:
        """Returns a value as a number within the range."""
        with reading(f"reward '{self.name}' gave {type(value).__name__}", "a number"):
            number = float(value) if isinstance(value, SupportsFloat) else math.nan
        if not math.isfinite(number):
            where = _where(row, completions)
            raise UserError(f"reward '{self.name}' gave {shorten(repr(value))} {where}; expected a finite number")
        number = number if self.low is None else max(number, self.low)
        return number if self.high is None else min(number, self.high)

    def _find_failure(
        self, completions: list[Completion], columns: dict[str, Any], error: BaseException
    ) -> tuple[str, BaseException]:
        """Returns where the first row is that fails alone, and its error; else those of the batch."""
        for row in range(len(completions)):
            row_columns = {
                name: [column[row]] if isinstance(column, list) and len(column) == len(completions) else column
                for name, column in columns.items()
                if name not in ("log_metric", "log_extra")
            }
            try:
                self.function(completions=[completions[row]], **row_columns)
            except (Exception, SystemExit) as alone:
                return _where(row, completions), alone
        return f"in a batch of {len(completions)}", error

    def contribution(self, value: float) -> float:
        """Returns weight x value within the cap."""
        weighted = self.weight * value
        return weighted if self.cap is None else min(max(weighted, -self.cap), self.cap)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The smallest and largest contribution; None where one of them is unknown."""
        if self.weight == 0:
            return 0.0, 0.0
        low = self.contribution(-math.inf if self.low is None else self.low)
        high = self.contribution(math.inf if self.high is None else self.high)
        return (min(low, high), max(low, high)) if math.isfinite(low) and math.isfinite(high) else None


def _where(row: int, completions: list[Completion]) -> str:
    """Returns a row's number and the beginning of its completion."""
    try:
        text: Any = model_text(completions[row])
    except UserError:
        text = completions[row]
    return f"at row {row} of {len(completions)} ({shorten(repr(text))})"

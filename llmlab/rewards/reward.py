"""One reward with its name, weight and range, whose values are checked, with the row and the reason in the error.

TRL's trainers take it as it stands; it then gives the bare values, and its weight is for `compose`.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat

from llmlab.rewards.completions import Completion, model_text
from llmlab.settings.errors import UserError, reading, reason_of


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
        self.name = name or getattr(function, "__name__", type(function).__name__)
        self.function, self.weight, self.low, self.high, self.cap = function, weight, low, high, cap
        if inspect.iscoroutinefunction(call):
            raise UserError(f"reward '{self.name}': this function is async; give it to GRPOTrainer itself")
        accepted = inspect.signature(function).parameters
        self._takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
        self._accepted, self._parameters = frozenset(accepted), frozenset(getattr(function, "keywords", ()))

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        """Returns one number a completion, or None where the reward does not apply.

        Args:
            completions: texts or messages of the batch.
            columns: `prompts` and the columns of the data set as lists, and whatever else a trainer passes.
        """
        completions = list(completions)
        columns = {
            name: column
            for name, column in columns.items()
            if name not in self._parameters and (self._takes_all or name in self._accepted)
        }
        try:
            values = self.function(completions=completions, **columns)
        except UserError as error:
            raise UserError(f"reward '{self.name}': {error}") from None
        except (Exception, SystemExit) as error:  # whatever a user's function raises
            row, error = self._find_row(completions, columns, error)
            where = f"in a batch of {len(completions)}" if row is None else _where(row, completions)
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
            raise UserError(f"reward '{self.name}' gave {_short(repr(value))} {where}; expected a finite number")
        number = number if self.low is None else max(number, self.low)
        return number if self.high is None else min(number, self.high)

    def _find_row(
        self, completions: list[Completion], columns: dict[str, Any], error: BaseException
    ) -> tuple[int | None, BaseException]:
        """Returns the first row that fails alone, and its error; None where only the whole batch fails."""
        for row in range(len(completions)):
            row_columns = {
                name: [column[row]] if isinstance(column, list) and len(column) == len(completions) else column
                for name, column in columns.items()
                if name not in ("log_metric", "log_extra")
            }
            try:
                self.function(completions=[completions[row]], **row_columns)
            except (Exception, SystemExit) as alone:
                return row, alone
        return None, error

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
    return f"at row {row} of {len(completions)} ({_short(repr(text))})"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."

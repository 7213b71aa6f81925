"""One reward with its name, weight and range, whose values are checked: what is wrong stops with the row and reason.

TRL's trainers take it as it stands; it then gives the bare values, and its weight is for `compose`.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat

from llmlab.rewards.completions import Completion, UnreadableCompletion, written
from llmlab.settings.errors import UserError, reading, reason_of


class Reward:
    """A reward function that never fails silently.

    Args:
        function: takes `completions` and columns as keyword lists, gives one number or None a completion.
        name: under which it is logged.
        weight: factor of its values in a composed reward.
        low: the smallest value, which smaller ones are raised to; None where nobody knows.
        high: the largest value, which larger ones are lowered to; None where nobody knows.
        cap: largest size, positive or negative, of weight x value.
        parameters: columns of the data set that are kept from the function, since its parameters have their names.
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
        parameters: frozenset[str] = frozenset(),
    ):
        self.name = name or getattr(function, "__name__", type(function).__name__)
        self.function, self.weight, self.low, self.high, self.cap = function, weight, low, high, cap
        self.parameters = parameters
        call = function if inspect.isroutine(function) else getattr(function, "func", function.__call__)
        if inspect.iscoroutinefunction(call):
            raise UserError(f"reward '{self.name}': this function is async; give it to GRPOTrainer itself")
        accepted = inspect.signature(function).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
        self._accepted = None if takes_all else frozenset(accepted)

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        """Returns one number a completion, or None where the reward does not apply.

        Args:
            completions: texts or messages of the batch.
            columns: `prompts` and the columns of the data set as lists, and whatever else a trainer passes.

        Raises:
            UserError: the function failed, or gave what is no finite number; the message has the reward and the row.
        """
        completions = list(completions)
        columns = {
            key: value
            for key, value in columns.items()
            if key not in self.parameters and (self._accepted is None or key in self._accepted)
        }
        try:
            values = self.function(completions=completions, **columns)
        except UnreadableCompletion as error:
            row, error = self._blame(completions, columns, error)
            raise UserError(f"reward '{self.name}': row {row}: {error}") from None
        except UserError as error:
            raise UserError(f"reward '{self.name}': {error}") from None
        except (Exception, SystemExit) as error:  # whatever a user's function raises, in the words of its row
            row, error = self._blame(completions, columns, error)
            reason = f"{type(error).__name__}: {reason_of(error)}"
            where = f"in a batch of {len(completions)}" if row is None else _where(row, completions)
            raise UserError(f"reward '{self.name}' failed {where}: {reason}") from error
        return self._checked(values, completions)

    def _checked(self, values: Any, completions: list[Completion]) -> list[float | None]:
        kind = type(values).__name__
        with reading(f"reward '{self.name}' gave {kind}; expected a list with a number a completion"):
            values = list(values)
        if len(values) != len(completions):
            raise UserError(f"reward '{self.name}' gave {len(values)} values for {len(completions)} completions")
        checked: list[float | None] = []
        for row, value in enumerate(values):
            with reading(f"reward '{self.name}' gave {type(value).__name__}", "a number"):
                number = None if value is None else float(value) if isinstance(value, SupportsFloat) else math.nan
            if number is not None and not math.isfinite(number):
                where = _where(row, completions)
                raise UserError(f"reward '{self.name}' gave {_short(repr(value))} {where}; expected a finite number")
            if number is not None:
                number = number if self.low is None else max(number, self.low)
                number = number if self.high is None else min(number, self.high)
            checked.append(number)
        return checked

    def _blame(
        self, completions: list[Completion], columns: dict[str, Any], error: BaseException
    ) -> tuple[int | None, BaseException]:
        """Returns the first row that fails alone, and how; None where only the whole batch fails."""
        for row in range(len(completions)):
            of_row = {
                key: [value[row]] if isinstance(value, list) and len(value) == len(completions) else value
                for key, value in columns.items()
                if key not in ("log_metric", "log_extra")
            }
            try:
                self.function(completions=[completions[row]], **of_row)
            except (Exception, SystemExit) as alone:  # the same as above
                return row, alone
        return None, error

    def contribution(self, value: float) -> float:
        """Returns weight x value within the cap."""
        weighted = self.weight * value
        return weighted if self.cap is None else min(max(weighted, -self.cap), self.cap)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The smallest and largest contribution, None where nobody knows."""
        if self.weight == 0:
            return 0.0, 0.0
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        ends = sorted((self.contribution(low), self.contribution(high)))
        return (ends[0], ends[1]) if all(map(math.isfinite, ends)) else None


def _where(row: int, completions: list[Completion]) -> str:
    try:
        text: Any = written(completions[row])
    except UnreadableCompletion:
        text = completions[row]
    return f"at row {row} of {len(completions)} ({_short(repr(text))})"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."

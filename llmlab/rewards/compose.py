"""Several rewards as one number: the weighted sum, in [0, 1] by the smallest and largest value that it can have.

With the guide's eight rewards and weights these bounds are the guide's. The positive ones add up to
1 + 1 + 1 + 1 + 0.5 + 2 = 6.5. The penalties are at most 0.1 x 20 extra steps (20 is the guide's longest episode) and
0.5, which is -2.5. Other weights, ranges and caps change the bounds in the same way: each component adds
weight x smallest and weight x largest value.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmlab.rewards.completions import Completion
from llmlab.rewards.loading import load_rewards
from llmlab.rewards.reward import Reward
from llmlab.settings.errors import SettingsError, UserError
from llmlab.settings.rewards import RewardSettings, as_list


class Scores(NamedTuple):
    """What a batch was worth: one total a completion, and each component's values by its name."""

    totals: list[float | None]
    components: dict[str, list[float | None]]


class ComposedReward:
    """The weighted sum of rewards, which TRL's trainers take as one reward function.

    A component that does not apply to a row (None) is left out of the row's sum and of its bounds, so that rows of
    different kinds stay comparable; a row to which none applies has no reward.

    Args:
        components: the rewards.
        normalize: map the sum to [0, 1].

    Raises:
        SettingsError: with `normalize`, components whose range nobody knows, or a sum that is always the same.

    Source: seed, RL guide, section 3, "Normalize to [0, 1]".
    """

    __name__ = "reward"

    def __init__(self, components: Sequence[Reward], normalize: bool = True):
        if not components:
            raise UserError("rewards: expected at least one")
        seen: Counter[str] = Counter()
        self.components: dict[str, Reward] = {}
        for reward in components:
            seen[reward.name] += 1
            label = reward.name if seen[reward.name] == 1 else f"{reward.name}_{seen[reward.name]}"
            self.components[label] = reward
        self.normalize = normalize
        if normalize:
            unknown = [label for label, reward in self.components.items() if reward.bounds is None]
            if unknown:
                raise SettingsError(
                    f"reward '{label}': its range is not known; give it min and max (or cap), "
                    "or set normalize_rewards = false"
                    for label in unknown
                )
            low, high = self.bounds  # type: ignore[misc]
            if low == high:
                raise UserError("rewards: the sum is always the same, since every weight is 0")

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The smallest and largest weighted sum before it is normalized, None where nobody knows."""
        ends = [reward.bounds for reward in self.components.values()]
        known = [end for end in ends if end is not None]
        return None if len(known) < len(ends) else (sum(low for low, _ in known), sum(high for _, high in known))

    def __call__(
        self, completions: Sequence[Completion], log_metric: Any = None, log_extra: Any = None, **columns: Any
    ) -> list[float | None]:
        """Returns one number a completion, or None where no component applies.

        Args:
            completions: texts or messages of the batch.
            log_metric: TRL's: is told each component's mean value as `reward_components/NAME/mean`.
            log_extra: TRL's: is told each component's values, for the table of completions.
            columns: `prompts` and the columns of the data set as lists, and whatever else a trainer passes.

        Raises:
            UserError: a component failed, or gave what is no finite number.
        """
        scores = self.score(completions, log_metric=log_metric, log_extra=log_extra, **columns)
        for label, values in scores.components.items():
            numbers = [value for value in values if value is not None]
            if log_metric is not None and numbers:
                log_metric(f"reward_components/{label}/mean", sum(numbers) / len(numbers))
            if log_extra is not None:
                log_extra(label, values)
        return scores.totals

    def score(self, completions: Sequence[Completion], **columns: Any) -> Scores:
        """Returns totals and each component's values, which `reward-check` shows."""
        values = {label: reward(completions, **columns) for label, reward in self.components.items()}
        totals = [
            self._total({label: column[row] for label, column in values.items()}) for row in range(len(completions))
        ]
        return Scores(totals, values)

    def _total(self, values: dict[str, float | None]) -> float | None:
        parts = [(self.components[label], value) for label, value in values.items() if value is not None]
        parts = [(reward, value) for reward, value in parts if reward.weight]
        if not parts:
            return None
        total = sum(reward.contribution(value) for reward, value in parts)
        if not self.normalize:
            return total
        low = sum(reward.bounds[0] for reward, _ in parts)  # type: ignore[index]
        high = sum(reward.bounds[1] for reward, _ in parts)  # type: ignore[index]
        return min(max((total - low) / (high - low), 0.0), 1.0)  # the sums differ in their last bit


def compose(
    rewards: Sequence[RewardSettings | str | dict[str, Any] | Reward | Callable[..., Any]] | dict[str, Any],
    *,
    normalize: bool = True,
    allow_code: bool = False,
    folder: str | Path = ".",
) -> ComposedReward:
    """Makes one reward of several: `GRPOTrainer(reward_funcs=compose(["json_valid", "length | 0.5"]), ...)`.

    Args:
        rewards: settings, names, mappings, `Reward` objects, or functions (weight 1, range unknown); or one mapping
            of names to weights.
        normalize: map the weighted sum to [0, 1].
        allow_code: load functions from Python files, which runs these files.
        folder: where the paths of Python files start.

    Raises:
        SettingsError: all problems of the entries at once.
        UserError: there is nothing to compose.
    """
    rewards = as_list(rewards)
    named = [entry for entry in rewards if isinstance(entry, (RewardSettings, str, dict))]
    loaded = iter(load_rewards(named, allow_code, folder))
    components = []
    for entry in rewards:
        if isinstance(entry, (RewardSettings, str, dict)):
            components.append(next(loaded))
        else:
            components.append(entry if isinstance(entry, Reward) else Reward(entry))
    return ComposedReward(components, normalize)

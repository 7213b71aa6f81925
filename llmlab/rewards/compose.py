"""Several rewards as one number: the weighted sum, mapped to [0, 1] by its smallest and largest possible value. Each
component adds weight x smallest and weight x largest value to these bounds. With the guide's eight rewards and weights
they are the guide's: 1 + 1 + 1 + 1 + 0.5 + 2 = 6.5, and -0.1 x 20 extra steps - 0.5 = -2.5."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmlab.rewards.completions import Completion
from llmlab.rewards.function import Reward
from llmlab.rewards.loading import load_rewards
from llmlab.settings.errors import SettingsError, UserError
from llmlab.settings.rewards import RewardSettings, as_list


class Scores(NamedTuple):
    """Scores of a batch: one total a completion, and each component's values by its name."""

    totals: list[float | None]
    components: dict[str, list[float | None]]


class ComposedReward:
    """The weighted sum of rewards, which TRL's trainers take as one reward function.

    A component that does not apply to a row (None) is left out of the row's sum and of its bounds, so that rows of
    different kinds stay comparable; a row to which none applies has no reward.

    Args:
        rewards: the components.
        normalize: map the sum to [0, 1].

    Source: seed, RL guide, section 3, "Normalize to [0, 1]".
    """

    __name__ = "reward"

    def __init__(self, rewards: Sequence[Reward], normalize: bool = True):
        self.normalize = normalize
        self.components: dict[str, Reward] = {}
        for index, reward in enumerate(rewards):
            count = sum(reward.name == other.name for other in rewards[: index + 1])
            self.components[reward.name if count == 1 else f"{reward.name}_{count}"] = reward
        if not rewards:
            raise UserError("rewards: expected at least one")
        unknown = [name for name, reward in self.components.items() if reward.bounds is None]
        if normalize and unknown:
            advice = "give it min and max (or cap), or set normalize_rewards = false"
            raise SettingsError(f"reward '{name}': its range is not known; {advice}" for name in unknown)
        if normalize and self.bounds[0] == self.bounds[1]:  # type: ignore[index]
            raise UserError("rewards: the sum is always the same, since every weight is 0")

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The smallest and largest weighted sum before it is normalized; None where one of them is unknown."""
        return _sum_bounds(self.components.values())

    def __call__(
        self, completions: Sequence[Completion], log_metric: Any = None, log_extra: Any = None, **columns: Any
    ) -> list[float | None]:
        """Returns one number a completion, or None where no component applies; logs components as TRL does."""
        scores = self.score(completions, log_metric=log_metric, log_extra=log_extra, **columns)
        for name, values in scores.components.items():
            numbers = [value for value in values if value is not None]
            if log_metric is not None and numbers:
                log_metric(f"reward_components/{name}/mean", sum(numbers) / len(numbers))
            if log_extra is not None:
                log_extra(name, values)
        return scores.totals

    def score(self, completions: Sequence[Completion], **columns: Any) -> Scores:
        """Returns totals and each component's values, which `reward-check` shows."""
        values = {name: reward(completions, **columns) for name, reward in self.components.items()}
        return Scores([self._total(row) for row in zip(*values.values(), strict=True)], values)

    def _total(self, values: Sequence[float | None]) -> float | None:
        pairs = zip(self.components.values(), values, strict=True)
        parts = [(reward, value) for reward, value in pairs if value is not None and reward.weight]
        total = sum(reward.contribution(value) for reward, value in parts)
        if not parts or not self.normalize:
            return total if parts else None
        low, high = _sum_bounds([reward for reward, _ in parts])
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
    """
    return ComposedReward(load_rewards(as_list(rewards), allow_code, folder), normalize)


def _sum_bounds(rewards: Collection[Reward]) -> tuple[float, float] | None:
    bounds = [reward.bounds for reward in rewards if reward.bounds is not None]
    return (sum(low for low, _ in bounds), sum(high for _, high in bounds)) if len(bounds) == len(rewards) else None


def environment_reward(*, normalize: bool) -> Reward:
    """Returns the environments' own reward, mapped to [0, 1] by the episode's `reward_range` if `normalize`."""

    def score(completions: list[Any], environments: list[Any], log_metric: Any = None, **columns: Any) -> list[float]:
        names = dict.fromkeys(name for each in environments for name in getattr(each, "rewards", {}))
        for name in names if log_metric is not None else ():
            parts = [getattr(each, "rewards", {}).get(name, 0.0) for each in environments]
            log_metric(f"reward_components/{name}/mean", sum(parts) / len(parts))
        rewards = [float(each.get_reward()) for each in environments]
        for k, each in enumerate(environments if normalize else ()):
            if (bounds := getattr(each, "reward_range", None)) is None:
                name = type(each).__name__
                raise UserError(f"environment {name}: its reward has no reward_range; set normalize_rewards=false")
            low, high = bounds
            rewards[k] = (rewards[k] - low) / (high - low) if high > low else 0.0
        return rewards

    return Reward(score, name="environment", low=0.0 if normalize else None, high=1.0 if normalize else None)

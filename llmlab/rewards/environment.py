"""The reward that an environment gives its episode, beside what rewards of completions say."""

from typing import Any

from llmlab.rewards.function import Reward
from llmlab.settings.errors import UserError


def environment_reward(*, normalize: bool) -> Reward:
    """Returns the environments' own reward, mapped to [0, 1] by the episode's `reward_range` if `normalize`."""

    def score(completions: list[Any], environments: list[Any], log_metric: Any = None, **columns: Any) -> list[float]:
        names = dict.fromkeys(name for each in environments for name in getattr(each, "rewards", {}))
        for name in names if log_metric is not None else ():
            parts = [getattr(each, "rewards", {}).get(name, 0.0) for each in environments]
            log_metric(f"reward_components/{name}/mean", sum(parts) / len(parts))
        return [_scaled(each) if normalize else float(each.get_reward()) for each in environments]

    return Reward(score, name="environment", low=0.0 if normalize else None, high=1.0 if normalize else None)


def _scaled(environment: Any) -> float:
    if (bounds := getattr(environment, "reward_range", None)) is None:
        name = type(environment).__name__
        raise UserError(f"environment {name}: its reward has no reward_range; set normalize_rewards=false")
    low, high = bounds
    return (float(environment.get_reward()) - low) / (high - low) if high > low else 0.0

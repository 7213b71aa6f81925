"""Settings of stages that learn from episodes with tools: which environment, how long, what the simulator rewards.
Source: seed, RL guide, section 4, "PPO Configuration" and "Reward Function (Simulator)"."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any

from annotated_types import Gt

from llmlab.settings.base import Alias, Resume, Settings, When, settings_of_table

IN_EPISODES = When("environment")
SIMULATOR = "simulator"


REWARD_CONFIG = "What the simulator rewards: per episode, and per call of a tool. Source: seed, RL guide, section 4."
RewardConfig = settings_of_table("RewardConfig", __name__, REWARD_CONFIG, "points", float, panel="Simulator")


class EnvironmentSettings(Settings, panel="Episodes"):
    """Where a policy acts."""

    environment: str | dict[str, str] | None = None
    """Play episodes with tools in it: simulator, gymnasium:ID, openenv:URL, path/to/file.py:Class, or a mapping of
    names to these for data with a column `environment`; none samples one completion a prompt."""
    max_episode_length: Annotated[int, Gt(0), Alias("max_tool_calling_iterations"), IN_EPISODES] = 20
    """Tool calls after which an episode ends."""
    tool_timeout: Annotated[float, Gt(0), Resume.FREE, IN_EPISODES] = 30.0
    """Seconds after which a tool call is abandoned, and the policy reads an error."""
    reward_config: RewardConfig = RewardConfig()

    @property
    def environments(self) -> dict[str | None, str]:
        """The environments by the name in a row's column `environment`; the one of all rows has the name None."""
        return {None: self.environment} if isinstance(self.environment, str) else dict(self.environment or {})

    @classmethod
    def translate(cls, values: dict[str, Any], warn: Callable[[str], None]) -> None:
        """Reads the guide's `kl_weight` among the simulator's rewards as the KL coefficient."""
        points = values.get("reward_config")
        if isinstance(points, dict) and "kl_weight" in points:
            values["reward_config"] = {name: value for name, value in points.items() if name != "kl_weight"}
            values.setdefault("kl_weight", points["kl_weight"])
        super().translate(values, warn)

    def contradictions(self) -> Iterator[str]:
        if self.environment == {}:
            yield "environment: expected at least one"
        if self.reward_config != RewardConfig() and SIMULATOR not in self.environments.values():
            yield "reward_config applies only when environment is simulator"

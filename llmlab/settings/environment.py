"""Settings of stages that learn from episodes with tools: which environment, how long, what the simulator rewards.

Source: seed, RL guide, section 4, "PPO Configuration" and "Reward Function (Simulator)".
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Gt
from pydantic import model_validator

from llmlab.settings.base import Alias, Resume, Settings


class RewardConfig(Settings):
    """What the simulator rewards: per episode, and per call of a tool. Source: seed, RL guide, section 4."""

    panel: ClassVar[str] = "Simulator"

    task_complete: float = 10.0
    """Reward of an episode that reaches its task's goal."""
    task_failed: float = -5.0
    """Reward of an episode that does not."""
    correct_tool: float = 5.0
    """Reward of a call that the task expects."""
    wrong_tool: float = -3.0
    """Reward of a call that it does not expect, or of a tool that does not exist."""
    schema_pass: float = 2.0
    """Reward of a call whose arguments fit the tool's schema."""
    schema_fail: float = -5.0
    """Reward of a call whose arguments do not, or that is no JSON."""
    style_pass: float = 1.0
    """Reward of writing code that parses and keeps the style rules."""
    guardrail_violation: float = -10.0
    """Reward of a call that breaks a guardrail, which ends the episode."""
    step_penalty: float = -0.5
    """Reward of every call."""
    redundant_action: float = -2.0
    """Reward of a call that repeats the one before."""


class EnvironmentSettings(Settings):
    """Where a policy acts."""

    panel: ClassVar[str] = "Episodes"

    environment: str | dict[str, str] | None = None
    """Play episodes with tools in it: simulator, gymnasium:ID, openenv:URL, path/to/file.py:Class, or a mapping of names
    to these for data with a column `environment`; none samples one completion a prompt."""
    max_episode_length: Annotated[int, Gt(0), Alias("max_tool_calling_iterations")] = 20
    """Tool calls after which an episode ends."""
    tool_timeout: Annotated[float, Gt(0), Resume.FREE] = 30.0
    """Seconds after which a tool call is abandoned, and the policy reads an error."""
    curriculum: Literal["none", "episodes", "success"] = "none"
    """Difficulty of the simulator's tasks: as in the data, or rising with the episodes seen or with the success rate."""
    reward_config: RewardConfig = RewardConfig()

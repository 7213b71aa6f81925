"""What the stages share that sample completions of prompts and score them: GRPO, PPO, RS-SFT and AWR."""

from typing import Annotated, ClassVar

from annotated_types import Gt
from pydantic import BeforeValidator, Field, model_validator

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Resume
from llmlab.settings.paths import PathName, Reads
from llmlab.settings.rewards import SPELLINGS, RewardSettings, RewardsSettings, as_list

SEED_REWARD_MODEL = "OpenAssistant/reward-model-deberta-v3-large-v2"


class CompletionSettings(RewardsSettings):
    """Prompts, and the rewards of their completions."""

    panel: ClassVar[str] = "Training"

    max_new_tokens: v.MaxNewTokens = 256
    max_prompt_length: Annotated[int | None, Gt(0)] = 1024
    """Longest prompt in tokens; rows with longer ones are dropped, counted and reported."""
    max_seq_len: Annotated[int | None, Gt(1), Alias("max_seq_length", "max_length")] = None
    """Longest prompt and completion together, in tokens: limits prompts to what max_new_tokens leaves."""

    rewards: Annotated[list[RewardSettings] | None, BeforeValidator(as_list), SPELLINGS] = None  # type: ignore[assignment]
    """Rewards, one an entry: name | weight (optional), or a mapping {name: weight}. None uses the reward model
    alone."""
    reward_model: Annotated[PathName | None, Reads("model"), Alias("reward_model_name", "reward_model_path")] = None
    """Reward model, in addition to the other rewards: a run folder of llmlab reward, or a hub id. None without other
    rewards is OpenAssistant/reward-model-deberta-v3-large-v2."""
    allow_code: Annotated[bool, Resume.FREE, Field(exclude=True)] = False
    """Run reward functions from Python files (path/to/file.py:function); never set in a file."""

    @model_validator(mode="after")
    def check_completions(self) -> "CompletionSettings":
        if self.max_seq_len is not None and self.max_seq_len <= self.max_new_tokens:
            raise ValueError(
                f"max_new_tokens = {self.max_new_tokens} leaves no room for a prompt in max_seq_len = "
                f"{self.max_seq_len}"
            )
        if self.rewards == [] and self.reward_model is None:
            raise ValueError("rewards: expected at least one")
        return self

    @property
    def prompt_limit(self) -> int | None:
        """The longest prompt in tokens, by either of the limits; None where there is none."""
        room = self.max_seq_len and self.max_seq_len - self.max_new_tokens
        return min((limit for limit in (self.max_prompt_length, room) if limit is not None), default=None)

    def all_rewards(self) -> list[RewardSettings]:
        """Returns the rewards with the reward model among them; an environment has one of its own."""
        rewards = list(self.rewards or [])
        alone = not (rewards or getattr(self, "environment", None))
        model = self.reward_model or (SEED_REWARD_MODEL if alone else None)
        if model is not None:
            rewards.append(RewardSettings(name="reward_model", parameters={"model": model}))
        return rewards

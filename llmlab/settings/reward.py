"""Settings of `llmlab reward`."""

from typing import ClassVar

from pydantic import model_validator

from llmlab.settings import vocabulary as v
from llmlab.settings.preference import PreferenceSettings


class RewardModelSettings(PreferenceSettings):
    """A reward model trained on pairs with the Bradley-Terry loss (arXiv:2009.01325)."""

    panel: ClassVar[str] = "Reward model"

    output_dir: v.OutputDir = "reward_checkpoints"
    max_steps: v.MaxSteps = 3000

    @model_validator(mode="after")
    def refuse_gates(self) -> "RewardModelSettings":
        if self.gates:
            raise ValueError("gates are not supported here: a reward model scores answers and writes none")
        return self

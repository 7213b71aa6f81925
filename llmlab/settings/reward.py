"""Settings of `llmlab reward`."""

from typing import ClassVar

from llmlab.settings import vocabulary as v
from llmlab.settings.preference import PreferenceSettings


class RewardModelSettings(PreferenceSettings):
    """A reward model trained on pairs with the Bradley-Terry loss (arXiv:2009.01325)."""

    panel: ClassVar[str] = "Reward model"
    writes_answers: ClassVar[bool] = False

    output_dir: v.OutputDir = "reward_checkpoints"
    max_steps: v.MaxSteps = 3000

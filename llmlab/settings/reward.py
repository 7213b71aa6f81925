"""Settings of `llmlab reward`: a model that scores answers, learned from pairs (arXiv:2009.01325)."""

from typing import ClassVar

from llmlab.settings import vocabulary as v
from llmlab.settings.preference import PreferenceSettings


class RewardModelSettings(PreferenceSettings):
    """Train a model that scores the better of two answers higher."""

    panel: ClassVar[str] = "Reward model"

    output_dir: v.OutputDir = "reward_checkpoints"
    max_steps: v.MaxSteps = 3000

"""Settings of `llmlab orpo`. Source: seed, RL guide, section 2; Hong et al. 2024 (arXiv:2403.07691)."""

from typing import Annotated, ClassVar

from annotated_types import Gt
from pydantic import Field

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Trl
from llmlab.settings.preference import PreferenceSettings


class ORPOSettings(PreferenceSettings):
    """Fine-tune on the better of two answers and away from the worse at once, without a reference model."""

    panel: ClassVar[str] = "ORPO"

    output_dir: v.OutputDir = "orpo_checkpoints"
    beta: Annotated[float, Gt(0), Trl("beta"), Alias("clip_range")] = Field(
        0.1, description="Weight of the odds ratio beside the likelihood of the better answer (0.05 to 0.2)."
    )
    batch_size: v.EffectiveBatchSize = 16
    mini_batch_size: v.MiniBatchSize = 1
    epochs: v.Epochs = 3
    learning_rate: v.LearningRate = 5e-6
    weight_decay: v.WeightDecay = 0.01
    save_every: v.SaveEvery = 100
    eval_every: Annotated[v.EvalEvery, Alias("eval_interval", "eval_steps")] = 50
    save_total_limit: v.SaveTotalLimit = 3

"""Settings of `llmlab orpo`."""

from typing import Annotated, ClassVar

from annotated_types import Gt

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Trl
from llmlab.settings.preference import PreferenceSettings


class ORPOSettings(PreferenceSettings):
    """Odds-ratio preference optimization. Source: seed, RL guide, section 2; arXiv:2403.07691."""

    panel: ClassVar[str] = "ORPO"

    output_dir: v.OutputDir = "orpo_checkpoints"
    beta: Annotated[float, Gt(0), Trl("beta"), Alias("clip_range")] = 0.1
    """Weight of the odds-ratio loss beside the chosen completion's cross-entropy (0.05 to 0.2)."""
    batch_size: v.EffectiveBatchSize = 16
    mini_batch_size: v.BatchSize = 1
    epochs: v.Epochs = 3
    learning_rate: v.LearningRate = 5e-6
    weight_decay: v.WeightDecay = 0.01
    save_every: v.SaveEvery = 100
    eval_every: v.EvalEvery = 50
    save_total_limit: v.SaveTotalLimit = 3

"""Settings of stages that learn from preference pairs: DPO, ORPO and reward models. Source: seed, LLM-Lab document,
"Common RLHF Parameters", "LoRA for RLHF" and "DPO"; RL guide, section 2."""

from collections.abc import Iterator
from typing import Annotated

from annotated_types import Ge, Gt, Lt

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Resume, Trl
from llmlab.settings.data import Datasets, DataSource
from llmlab.settings.errors import UserError
from llmlab.settings.training import BATCH, FineTuningSettings


class PreferenceSettings(FineTuningSettings):
    """Learning from pairs of a chosen and a rejected completion of one prompt."""

    inapplicable = {"streaming": "every pair is checked before the first step"}
    alternatives = (*FineTuningSettings.alternatives, BATCH)
    sibling_classes = v.RLHF
    rows_per_pass = "mini_batch_size"

    datasets: Datasets = [DataSource.model_construct(name="Anthropic/hh-rlhf")]
    batch_size: v.EffectiveBatchSize = 128
    """Pairs of one optimizer step, over all devices."""
    mini_batch_size: v.BatchSize = 32
    """Pairs of one forward pass, per device."""
    gradient_accumulation_steps: Annotated[int | None, Gt(0), Resume.SPLIT] = None
    """Forward passes of one optimizer step; none follows from batch_size and mini_batch_size."""
    max_length: v.MaxLength = 4096
    """Longest prompt and completion together, in tokens; completions are truncated at the end, counted and
    reported."""
    max_prompt_length: Annotated[int | None, Gt(0)] = 2048
    """Longest prompt in tokens; longer ones are truncated at the beginning, counted and reported."""
    allow_truncated: v.AllowTruncated = 0.05
    eval_batches: v.EvalBatches = 50

    def contradictions(self) -> Iterator[str]:
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            no_room = f"leaves no room for an answer in max_length = {self.max_length}"
            yield f"max_prompt_length = {self.max_prompt_length} {no_room}"
        if self.gradient_accumulation_steps is None:
            self.accumulation(1)

    def accumulation(self, processes: int) -> int:
        """Returns the forward passes of one optimizer step on each of so many processes."""
        rows, passes = self.mini_batch_size * processes, self.gradient_accumulation_steps
        where = f" on {processes} processes" if processes > 1 else ""
        if passes is None and self.batch_size % rows:
            raise UserError(
                f"batch_size = {self.batch_size} is not a multiple of mini_batch_size = {self.mini_batch_size}{where}"
                f"; the nearest is {max(round(self.batch_size / rows), 1) * rows}"
            )
        # the RL guide sets the parts alone, and the effective batch follows from them
        if passes is not None and "batch_size" in self.model_fields_set and self.batch_size != rows * passes:
            raise UserError(
                f"batch_size = {self.batch_size}, but mini_batch_size = {self.mini_batch_size} times "
                f"gradient_accumulation_steps = {passes}{where} is {rows * passes}; leave one of them out"
            )
        return self.batch_size // rows if passes is None else passes


class DPOSettings(PreferenceSettings, panel="DPO"):
    """Direct preference optimization. Source: seed, LLM-Lab document, "DPO"; arXiv:2305.18290."""

    output_dir: v.OutputDir = "dpo_checkpoints"
    beta: Annotated[float, Gt(0), Trl("beta"), Alias("clip_range")] = 0.2
    """Strength of the KL constraint: the implicit reward is beta times the log-ratio to the reference model."""
    reference_checkpoint: v.ReferenceCheckpoint = None
    label_smoothing: Annotated[float, Ge(0), Lt(0.5), Trl("label_smoothing")] = 0.0
    """Assumed probability that a pair's labels are swapped (conservative DPO); try 0.1 when overfitting."""


class ORPOSettings(PreferenceSettings, panel="ORPO"):
    """Odds-ratio preference optimization. Source: seed, RL guide, section 2; arXiv:2403.07691."""

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


class RewardModelSettings(PreferenceSettings, panel="Reward model", writes_answers=False):
    """A reward model trained on pairs with the Bradley-Terry loss (arXiv:2009.01325)."""

    output_dir: v.OutputDir = "reward_checkpoints"
    max_steps: v.MaxSteps = 3000

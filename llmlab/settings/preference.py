"""What the stages that learn from preference pairs share: DPO, ORPO and reward models.

Source: seed, LLM-Lab document, "Common RLHF Parameters", "LoRA for RLHF" and "DPO"; RL guide, section 2.
"""

from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias
from llmlab.settings.data import Datasets, DataSettings, DataSource
from llmlab.settings.errors import UserError
from llmlab.settings.hardware import HardwareSettings
from llmlab.settings.lora import LoraSettings
from llmlab.settings.optimizer import OptimizerSettings
from llmlab.settings.rhythm import RhythmSettings


class PreferenceSettings(RhythmSettings, HardwareSettings, LoraSettings, OptimizerSettings, DataSettings):
    """Learn from pairs of a better and a worse answer to one prompt."""

    panel: ClassVar[str] = "Training"
    inapplicable: ClassVar[dict[str, str]] = {
        **v.LOWEST_LOSS,
        "streaming": "every pair is proven before the first step, so rows are made before it",
    }
    implied: ClassVar[dict[str, tuple[Any, ...]]] = v.IMPLIED_BEST
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("max_steps", "epochs"),
        ("batch_size", "gradient_accumulation_steps"),
    )
    relatives: ClassVar[tuple[str, ...]] = v.RLHF

    policy_checkpoint: v.PolicyCheckpoint = "sft_checkpoints"
    datasets: Datasets = [DataSource(name="Anthropic/hh-rlhf")]
    batch_size: v.EffectiveBatchSize = 128
    mini_batch_size: v.MiniBatchSize = 32
    gradient_accumulation_steps: v.Accumulation = None
    max_steps: v.MaxSteps = 10000
    epochs: v.Epochs = None
    learning_rate: v.LearningRate = 1.4e-5
    weight_decay: v.WeightDecay = 0.0
    max_grad_norm: v.MaxGradNorm = 1.0
    warmup_steps: v.WarmupSteps = 0.1
    max_length: v.MaxLength = 4096
    max_prompt_length: v.MaxPromptLength = 2048
    max_samples: v.MaxSamples = None
    chat_template: v.ChatTemplate = None
    allow_truncated: v.AllowTruncated = 0.05
    log_every: v.LogEvery = 10
    save_every: v.SaveEvery = 500
    eval_every: Annotated[v.EvalEvery, Alias("eval_interval", "eval_steps")] = 500
    eval_batches: v.EvalBatches = 50
    save_best_only: v.SaveBestOnly = False
    save_total_limit: v.SaveTotalLimit = 2
    seed: v.Seed = 42
    trainer_args: v.TrainerArgs = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def steps_beat_default_epochs(cls, values: Any) -> Any:
        """Takes max_steps alone as the wish for it, where a stage counts in epochs by default."""
        if isinstance(values, dict) and "max_steps" in values and "epochs" not in values:
            return {**values, "epochs": None}
        return values

    @model_validator(mode="after")
    def check_lengths(self) -> "PreferenceSettings":
        if self.epochs is not None and "max_steps" in self.model_fields_set:
            raise v.conflict("epochs and max_steps both say how long to train; keep one", "epochs", "max_steps")
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            raise v.conflict(
                f"max_prompt_length = {self.max_prompt_length} leaves no room for an answer in max_length = "
                f"{self.max_length}",
                "max_length",
                "max_prompt_length",
            )
        if self.gradient_accumulation_steps is None:
            try:
                self.accumulation(1)
            except UserError as error:
                raise v.conflict(str(error), "mini_batch_size", "batch_size") from None
        return self

    def accumulation(self, processes: int) -> int:
        """Returns the forward passes of an update on each of so many processes.

        Raises:
            UserError: they would not make `batch_size` rows.
        """
        rows, given = self.mini_batch_size * processes, self.gradient_accumulation_steps
        where = f" on {processes} processes" if processes > 1 else ""
        if given is None and self.batch_size % rows:
            raise UserError(
                f"batch_size = {self.batch_size} is no multiple of mini_batch_size = {self.mini_batch_size}{where}; "
                f"the nearest is {max(round(self.batch_size / rows), 1) * rows}"
            )
        # the RL guide gives the parts alone, and the rows of an update follow from them
        if given is not None and "batch_size" in self.model_fields_set and self.batch_size != rows * given:
            raise UserError(
                f"batch_size = {self.batch_size}, but mini_batch_size = {self.mini_batch_size} times "
                f"gradient_accumulation_steps = {given}{where} is {rows * given}; leave one of them out"
            )
        return self.batch_size // rows if given is None else given

    def recorded(self) -> dict[str, Any]:
        """Leaves out what follows from other settings, and would contradict them when the run is resumed."""
        decided = {"max_steps"} if self.epochs is not None else set()
        decided |= {"batch_size"} if self.gradient_accumulation_steps is not None else set()
        return {name: value for name, value in super().recorded().items() if name not in decided}

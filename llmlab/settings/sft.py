"""Settings of `llmlab sft`. Source: seed, LLM-Lab document, "Supervised Fine-Tuning (SFT)" and "LoRA for SFT"."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Trl
from llmlab.settings.data import Datasets, DataSettings, DataSource
from llmlab.settings.hardware import HardwareSettings
from llmlab.settings.lora import LoraSettings
from llmlab.settings.optimizer import OptimizerSettings
from llmlab.settings.rhythm import RhythmSettings


class SFTSettings(RhythmSettings, HardwareSettings, LoraSettings, OptimizerSettings, DataSettings):
    """Teach a base model to follow instructions and to hold a conversation."""

    panel: ClassVar[str] = "Training"
    inapplicable: ClassVar[dict[str, str]] = {
        **v.LOWEST_LOSS,
        "streaming": "every row is proven before the first step; large sources are read only as far as the run needs",
    }
    implied: ClassVar[dict[str, tuple[Any, ...]]] = v.IMPLIED_BEST
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("max_steps", "epochs"),)

    policy_checkpoint: v.PolicyCheckpoint = "runs/pretrain"
    datasets: Datasets = [DataSource(name="HuggingFaceTB/smoltalk2", subset="SFT")]
    validation_fraction: v.ValidationFraction = 0.05
    output_dir: v.OutputDir = "sft_checkpoints"
    batch_size: v.BatchSize = 4
    gradient_accumulation_steps: v.GradientAccumulationSteps = 16
    max_steps: v.MaxSteps = 5000
    epochs: v.Epochs = None
    learning_rate: v.LearningRate = 5e-6
    weight_decay: v.WeightDecay = 0.01
    max_grad_norm: v.MaxGradNorm = 1.0
    warmup_steps: v.WarmupSteps = 100
    max_seq_len: v.MaxSeqLen = 1024
    max_samples: v.MaxSamples = None
    packing: Annotated[bool, Trl("packing")] = Field(
        False, description="Put several conversations into one row; they never see each other."
    )
    loss_on: Literal["assistant", "completion", "all"] = Field(
        "assistant", description="Tokens that are trained: the assistant's turns, only the last one, or everything."
    )
    only_label: bool | None = Field(
        None, description="Of unpaired preferences (KTO), the `label` of the completions to train on."
    )
    chat_template: v.ChatTemplate = None
    allow_truncated: v.AllowTruncated = 0.05
    log_every: v.LogEvery = 10
    save_every: v.SaveEvery = 500
    eval_every: v.EvalEvery = 500
    eval_steps: v.EvalSteps = 50
    save_best_only: v.SaveBestOnly = True
    save_total_limit: v.SaveTotalLimit = 2
    seed: v.Seed = 42
    trainer_args: v.TrainerArgs = Field(default_factory=dict)

    def recorded(self) -> dict[str, Any]:
        """Leaves out max_steps beside epochs, which it would contradict when the run is resumed."""
        return {k: value for k, value in super().recorded().items() if k != "max_steps" or self.epochs is None}

    @model_validator(mode="after")
    def check_length(self) -> "SFTSettings":
        if self.epochs is not None and "max_steps" in self.model_fields_set:
            raise v.conflict("epochs and max_steps both say how long to train; keep one", "epochs", "max_steps")
        return self

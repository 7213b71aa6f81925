"""Settings of `llmlab sft`. Source: seed, LLM-Lab document, "Supervised Fine-Tuning (SFT)" and "LoRA for SFT"."""

from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt
from pydantic import Field, model_validator

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, Trl
from llmlab.settings.data import Datasets, DataSettings, DataSource
from llmlab.settings.hardware import HardwareSettings
from llmlab.settings.lora import LoraSettings
from llmlab.settings.optimizer import OptimizerSettings


class SFTSettings(HardwareSettings, LoraSettings, OptimizerSettings, DataSettings):
    """Teach a base model to follow instructions and to hold a conversation."""

    panel: ClassVar[str] = "Training"

    policy_checkpoint: Annotated[str, Alias("model_name_or_path", "base_model", "init_from")] = Field(
        "runs/pretrain", description="What to fine-tune: a run folder, a hub id, or a folder of LoRA adapters."
    )
    datasets: Datasets = [DataSource(name="HuggingFaceTB/smoltalk2")]
    output_dir: v.OutputDir = "sft_checkpoints"
    batch_size: v.BatchSize = 4
    gradient_accumulation_steps: v.GradientAccumulationSteps = 16
    max_steps: v.MaxSteps = 5000
    epochs: Annotated[float | None, Gt(0), Trl("num_train_epochs"), Alias("num_epochs")] = Field(
        None, description="Passes over the data, instead of max_steps."
    )
    learning_rate: v.LearningRate = 5e-6
    weight_decay: v.WeightDecay = 0.01
    max_grad_norm: v.MaxGradNorm = 1.0
    warmup_steps: v.WarmupSteps = 100
    max_seq_len: Annotated[int, Gt(1), Trl("max_length"), Alias("max_seq_length")] = Field(
        1024, description="Longest row in tokens; longer ones are cut, counted and reported."
    )
    packing: Annotated[bool, Trl("packing")] = Field(
        False, description="Put several conversations into one row; they never see each other."
    )
    loss_on: Literal["assistant", "completion", "all"] = Field(
        "assistant", description="Tokens that are trained: the assistant's turns, only the last one, or everything."
    )
    log_every: v.LogEvery = 10
    save_every: Annotated[int, Gt(0), Alias("save_steps", "save_interval")] = Field(
        500, description="Steps between two checkpoints, where save_best_only is off."
    )
    eval_every: v.EvalEvery = 500
    eval_steps: v.EvalSteps = 50
    save_best_only: v.SaveBestOnly = True
    save_total_limit: v.SaveTotalLimit = 2
    allow_truncated: Annotated[float, Ge(0)] = Field(
        0.05,
        description="Share of rows that may lose all trained tokens to max_seq_len before the run refuses to start.",
    )
    seed: v.Seed = 42
    trainer_args: v.TrainerArgs = Field(default_factory=dict)

    @model_validator(mode="after")
    def check_adapters(self) -> "SFTSettings":
        if self.lora_preset == "custom" and not self.lora_target_modules:
            raise v.conflict("lora_preset = custom needs lora_target_modules", "lora_preset", "lora_target_modules")
        return self

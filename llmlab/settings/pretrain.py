"""Settings of `llmlab pretrain`. Source: seed, LLM-Lab document, "Base Training (Pretraining)"."""

from typing import Annotated, Any, ClassVar

from pydantic import Field

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, fields_of
from llmlab.settings.data import TextDataSettings
from llmlab.settings.hardware import HardwareSettings
from llmlab.settings.lora import LoraSettings
from llmlab.settings.model import ModelSettings
from llmlab.settings.optimizer import OptimizerSettings
from llmlab.settings.paths import PathName, Reads
from llmlab.settings.rhythm import RhythmSettings

LORA_KEYS = ("task_type", *(name for setting in fields_of(LoraSettings) for name in setting.spellings))


class PretrainSettings(RhythmSettings, HardwareSettings, OptimizerSettings, TextDataSettings):
    """Train a decoder from nothing, or further, on plain text."""

    panel: ClassVar[str] = "Training"
    inapplicable: ClassVar[dict[str, str]] = {
        **dict.fromkeys(LORA_KEYS, "a base model is trained whole; adapters are for the stages after it"),
        **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs"), "pretraining counts in steps: max_steps"),
        **dict.fromkeys(("save_every", "save_steps"), "checkpoints are saved at evaluations: eval_every"),
        **v.LOWEST_LOSS,
        "max_samples": "pretraining reads as much text as max_steps takes",
    }
    implied: ClassVar[dict[str, tuple[Any, ...]]] = v.IMPLIED_BEST

    model: ModelSettings = ModelSettings()
    init_from: Annotated[PathName | None, Reads("model"), Alias("policy_checkpoint", "model_name_or_path")] = Field(
        None,
        description="Model to pretrain further, with its shape and tokenizer: a run folder or hub id "
        "(llmlab, Llama, Mistral, Qwen2).",
    )
    output_dir: v.OutputDir = "runs/pretrain"
    max_steps: v.MaxSteps = 10000
    lr: v.LearningRate = 3e-4
    weight_decay: v.WeightDecay = 0.1
    warmup_steps: v.WarmupSteps = 1000
    batch_size: v.BatchSize = 1
    gradient_accumulation_steps: v.GradientAccumulationSteps = 64
    grad_clip: v.MaxGradNorm = 1.0
    log_every: v.LogEvery = 10
    eval_every: v.EvalEvery = 500
    eval_steps: v.EvalSteps = 100
    save_best_only: v.SaveBestOnly = True
    save_total_limit: v.SaveTotalLimit = 2
    seed: v.Seed = 42
    trainer_args: v.TrainerArgs = Field(default_factory=dict)

    def recorded(self) -> dict[str, Any]:
        """Leaves out the shape beside init_from, whose model has its own."""
        shape = {"model": {"max_seq_len": self.model.max_seq_len}} if self.init_from else {}
        return super().recorded() | shape

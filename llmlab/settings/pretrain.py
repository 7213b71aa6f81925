"""Settings of `llmlab pretrain`."""

from collections.abc import Iterator
from typing import Annotated, Any

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Alias, fields_of
from llmlab.settings.data import TextDataSettings
from llmlab.settings.lora import LoraSettings
from llmlab.settings.model import ModelSettings
from llmlab.settings.paths import PathName, Reads
from llmlab.settings.training import TrainingSettings

LORA_KEYS = ("task_type", *(name for setting in fields_of(LoraSettings) for name in setting.spellings))


class PretrainSettings(TrainingSettings, TextDataSettings):
    """Pretraining on plain text. Source: seed, LLM-Lab document, "Base Training (Pretraining)"."""

    inapplicable = {
        **dict.fromkeys(LORA_KEYS, "pretraining updates all weights; adapters are for the stages after it"),
        **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs"), "pretraining counts in steps: max_steps"),
        **dict.fromkeys(("save_every", "save_steps"), "checkpoints are saved at evaluations: eval_every"),
        "max_samples": "pretraining reads as much text as max_steps takes",
    }

    model: ModelSettings = ModelSettings()
    init_from: Annotated[PathName | None, Reads("model"), Alias("policy_checkpoint", "model_name_or_path")] = None
    """Model to continue pretraining from, with its shape and tokenizer: a run folder or hub id (llmlab, Llama,
    Mistral, Qwen2, Qwen3)."""
    output_dir: v.OutputDir = "runs/pretrain"
    lr: v.LearningRate = 3e-4
    """Peak learning rate, after warmup."""
    weight_decay: v.WeightDecay = 0.1
    warmup_steps: v.WarmupSteps = 1000
    batch_size: v.BatchSize = 1
    """Sequences of one forward pass, per device."""
    gradient_accumulation_steps: v.Accumulation = 64
    """Forward passes of one optimizer step: the effective batch is batch_size times this, per device."""
    grad_clip: v.MaxGradNorm = 1.0
    """Clip the global gradient norm to this; 0 turns clipping off."""
    eval_steps: v.EvalBatches = 100

    def contradictions(self) -> Iterator[str]:
        if self.head_lr is not None and self.model.tie_word_embeddings and self.init_from is None:
            yield (
                f"head_lr = {self.head_lr:g} beside tie_word_embeddings: the head is the embedding, whose rate is "
                "embedding_lr; set tie_word_embeddings = false, or leave head_lr out"
            )

    def recorded(self) -> dict[str, Any]:
        """Leaves out the shape beside init_from, whose model has its own."""
        shape = {"model": {"max_seq_len": self.model.max_seq_len}} if self.init_from else {}
        return super().recorded() | shape

"""Settings of `llmlab sft`."""

from typing import Annotated, Literal

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Trl
from llmlab.settings.data import Datasets, DataSource
from llmlab.settings.training import FineTuningSettings


class SFTSettings(FineTuningSettings):
    """Supervised fine-tuning. Source: seed, LLM-Lab document, "Supervised Fine-Tuning (SFT)" and "LoRA for SFT"."""

    inapplicable = {
        "streaming": "every row is checked before the first step; large sources are read as far as the run needs"
    }

    policy_checkpoint: v.PolicyCheckpoint = "runs/pretrain"
    datasets: Datasets = [DataSource.model_construct(name="HuggingFaceTB/smoltalk2", subset="SFT")]
    validation_fraction: v.ValidationFraction = 0.05
    output_dir: v.OutputDir = "sft_checkpoints"
    batch_size: v.BatchSize = 4
    """Sequences of one forward pass, per device."""
    gradient_accumulation_steps: v.Accumulation = 16
    """Forward passes of one optimizer step: the effective batch is batch_size times this, per device."""
    max_steps: v.MaxSteps = 5000
    learning_rate: v.LearningRate = 5e-6
    weight_decay: v.WeightDecay = 0.01
    warmup_steps: v.WarmupSteps = 100
    max_seq_len: v.MaxLength = 1024
    """Longest row in tokens; longer ones are truncated at the end, counted and reported."""
    packing: Annotated[bool, Trl("packing")] = False
    """Pack several conversations into one row; attention does not cross their borders."""
    loss_on: Literal["assistant", "completion", "all"] = "assistant"
    """Tokens in the loss: all assistant turns, only the last one (completion), or all tokens."""
    only_label: bool | None = None
    """For unpaired preferences (KTO): train only on completions with this `label`."""
    allow_truncated: v.AllowTruncated = 0.05
    eval_steps: v.EvalBatches = 50
    save_best_only: v.SaveBestOnly = True

"""What RS-SFT and AWR share: samples of the policy are drawn and scored once, and trained on as rows.

Source: seed, RL guide, section 3, "AWR / RS-SFT".
"""

from typing import Annotated, ClassVar

from annotated_types import Ge, Gt
from pydantic import model_validator

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Resume
from llmlab.settings.completions import CompletionSettings
from llmlab.settings.data import Datasets, DataSource
from llmlab.settings.environment import EnvironmentSettings
from llmlab.settings.generation import SamplingSettings
from llmlab.settings.paths import PathName, Reads
from llmlab.settings.training import FineTuningSettings


class OfflineSettings(EnvironmentSettings, CompletionSettings, SamplingSettings, FineTuningSettings):
    """Learning from scored samples of the policy, drawn before training."""

    panel: ClassVar[str] = "Samples"
    inapplicable: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("max_possible", "min_possible"), "the bounds of the rewards follow from their weights"),
        "kl_weight": "samples are drawn once, and their rewards have no KL penalty",
        "streaming": "prompts are tokenized and measured before the first sample",
    }

    datasets: Datasets = [DataSource(name="Anthropic/hh-rlhf")]
    max_prompts: Annotated[int | None, Gt(0)] = None
    """Prompts to sample for at most, drawn as max_samples is elsewhere; none is all."""
    num_samples_per_prompt: Annotated[int, Gt(0)] = 4
    """Completions or episodes of each prompt."""
    temperature: Annotated[float, Ge(0)] = 0.8
    samples: Annotated[PathName | None, Reads("path")] = None
    """samples.jsonl of an earlier run to train on, instead of drawing samples."""
    rescore: bool = False
    """Score the samples again with these rewards; an environment's own reward stays as recorded."""
    sampling_batch_size: Annotated[int, Gt(0)] = 32
    """Completions or episodes that are sampled at the same time."""
    use_vllm: Annotated[bool, Resume.FREE] = False
    """Sample with vLLM, which must be installed."""
    max_samples: Annotated[int | None, Gt(0)] = None
    """Samples to train on at most, drawn at random by the seed; none is all."""

    batch_size: v.BatchSize = 2
    """Samples of one forward pass, per device."""
    gradient_accumulation_steps: v.Accumulation = 8
    """Forward passes of one optimizer step: the effective batch is batch_size times this, per device."""
    epochs: v.Epochs = 2.0
    learning_rate: v.LearningRate = 3e-6
    weight_decay: v.WeightDecay = 0.01
    warmup_steps: v.WarmupSteps = 0.05
    eval_every: v.EvalEvery = 100
    eval_batches: v.EvalBatches = 50
    save_every: v.SaveEvery = 200

    @model_validator(mode="after")
    def check_samples(self) -> "OfflineSettings":
        if self.temperature == 0 and self.num_samples_per_prompt > 1:
            raise ValueError("temperature = 0: all samples of a prompt are the same; expected more than 0")
        if self.rescore and self.samples is None:
            raise ValueError("rescore: it scores earlier samples again, which `samples` names")
        if self.curriculum != "none":
            raise ValueError("curriculum: not supported here, since all samples are drawn before training")
        return self

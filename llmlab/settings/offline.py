"""Settings of `llmlab rs-sft` and `llmlab awr`: samples of the policy are drawn and scored once, and trained on.
Source: seed, RL guide, section 3, "AWR / RS-SFT"."""

from collections.abc import Iterator
from typing import Annotated

from annotated_types import Ge, Gt

from llmlab.settings import vocabulary as v
from llmlab.settings.base import Resume
from llmlab.settings.data import Datasets, DataSource
from llmlab.settings.generation import SamplingSettings
from llmlab.settings.paths import PathName, Reads
from llmlab.settings.rewards import CompletionSettings
from llmlab.settings.training import FineTuningSettings


class OfflineSettings(CompletionSettings, SamplingSettings, FineTuningSettings, panel="Samples"):
    """Learning from scored samples of the policy, drawn before training."""

    inapplicable = {
        **dict.fromkeys(("max_possible", "min_possible"), "the bounds of the rewards follow from their weights"),
        "kl_weight": "samples are drawn once, and their rewards have no KL penalty",
        "streaming": "prompts are tokenized and measured before the first sample",
    }

    datasets: Datasets = [DataSource.model_construct(name="Anthropic/hh-rlhf")]
    max_prompts: Annotated[int | None, Gt(0)] = None
    """Prompts to sample for at most, drawn at random; none is all."""
    num_samples_per_prompt: Annotated[int, Gt(0)] = 4
    """Completions or episodes of each prompt."""
    temperature: Annotated[float, Ge(0)] = 0.8
    samples: Annotated[PathName | None, Reads("path")] = None
    """samples.jsonl of an earlier run to train on, instead of drawing samples."""
    rescore: bool = False
    """Score these samples again with this run's rewards; an environment's own reward stays as recorded."""
    sampling_batch_size: Annotated[int, Gt(0)] = 32
    """Completions or episodes that are sampled at the same time, per device."""
    use_vllm: Annotated[bool, Resume.FREE] = False
    """Sample with vLLM, which must be installed."""
    max_samples: Annotated[int | None, Gt(0)] = None
    """Samples to train on at most, drawn at random; none is all."""

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

    def contradictions(self) -> Iterator[str]:
        if self.temperature == 0 and self.num_samples_per_prompt > 1:
            yield "temperature = 0: all samples of a prompt are the same; expected more than 0"
        if self.rescore and self.samples is None:
            yield "rescore: it scores earlier samples again, which `samples` names"


class RSSFTSettings(OfflineSettings, panel="RS-SFT"):
    """Rejection-sampled fine-tuning. Source: seed, RL guide, section 3; arXiv:2308.01825."""

    output_dir: v.OutputDir = "rs_sft_checkpoints"
    top_p: v.TopP = 0.9
    reward_threshold: float = 0.6
    """Train on the best sample of each prompt, where its reward is above this and it ended by itself."""
    max_samples: Annotated[int | None, Gt(0)] = 20000


class AWRSettings(OfflineSettings, panel="AWR"):
    """Advantage-weighted regression. Source: seed, RL guide, section 3; Peng et al. 2019 (arXiv:1910.00177)."""

    output_dir: v.OutputDir = "awr_checkpoints"
    num_samples_per_prompt: Annotated[int, Gt(0)] = 8
    top_p: v.TopP = 1.0
    advantage_beta: Annotated[float, Ge(0)] = 5.0
    """Weights are exp(advantage_beta x advantage): 1 to 3 weak, 3 to 5 moderate, 5 to 10 strong; 0 is SFT."""
    normalize_advantage: bool = True
    """Divide the advantages by their standard deviation over all samples."""
    clip_advantage: Annotated[float, Gt(0)] = 10.0
    """Largest weight of a sample, before the weights of an optimizer step are scaled to mean 1."""

    def contradictions(self) -> Iterator[str]:
        if self.num_samples_per_prompt == 1 and self.samples is None:
            why = "a sample is compared with others of its prompt"
            yield f"num_samples_per_prompt = 1: {why}; expected 2 or more"

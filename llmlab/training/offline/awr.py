"""Advantage-weighted regression: fine-tuning on all samples, the better ones with the larger weights.

The loop is that of `llmlab sft`, and so is the loss but for the weights, which are known before training.

Source: Peng et al. 2019 (arXiv:1910.00177), with temperature 1/advantage_beta; seed, RL guide, section 3.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Value
from torch import Tensor
from transformers import TrainerState

from llmlab.data.samples import Sample, group_samples
from llmlab.rewards.loading import locate_rewards
from llmlab.runs.callbacks import StageMetrics
from llmlab.runs.progress import ProgressLine
from llmlab.runs.record import RunResult
from llmlab.runs.run import training_stage
from llmlab.settings.awr import AWRSettings
from llmlab.settings.errors import UserError
from llmlab.training.offline.run import Chosen, OfflineRun, RewardFunction, SampleRows, mean_reward
from llmlab.training.sft import LLMLabSFTTrainer

FEW = 0.1  # share of a step's samples whose weights count, below which a few carry the whole step
ADVICE = (
    "few samples carry all the weight (effective_sample_size below 0.1): lower advantage_beta or clip_advantage, or "
    "raise the effective batch"
)


def weigh(rewards: Sequence[Sequence[float]], beta: float, clip: float, normalize: bool) -> list[np.ndarray]:
    """Returns AWR's weights of the samples of each prompt: min(exp(beta x A), clip).

    Args:
        rewards: of the samples of each prompt.
        beta: inverse temperature of the advantages.
        clip: largest weight.
        normalize: divide the advantages, rewards less their mean over the prompt, by the standard deviation of all.

    Source: Peng et al. 2019 (arXiv:1910.00177), equation 13; seed: RL guide, section 3.
    """
    advantages = [np.subtract(group, np.mean(group)) for group in rewards]
    deviation = float(np.sqrt(np.mean(np.square(np.concatenate(advantages))))) if advantages else 0.0
    if normalize and deviation > 0:
        advantages = [group / deviation for group in advantages]
    return [np.exp(np.minimum(beta * group, math.log(clip))) for group in advantages]


def choose_all(samples: list[Sample], settings: AWRSettings) -> Chosen:
    """Returns all samples that have a reward, with their weights."""
    groups = [[each for each in group if each.reward is not None] for group in group_samples(samples)]
    groups = [group for group in groups if group]
    rewards = [[each.reward for each in group] for group in groups]
    if groups and all(max(group) - min(group) == 0 for group in rewards) and not samples[0].validation:
        raise UserError(
            f"the samples of each of the {len(groups):,} prompts have equal rewards, so none has an advantage: draw "
            "more a prompt (num_samples_per_prompt), at a higher temperature, or score them with other rewards"
        )
    weights = weigh(rewards, settings.advantage_beta, settings.clip_advantage, settings.normalize_advantage)
    flat = [each for group in groups for each in group]
    scaled = np.concatenate(weights) / np.mean(np.concatenate(weights)) if flat else np.empty(0)  # for validation
    rows = list(zip(flat, scaled.tolist(), strict=True))
    left_out = Counter({"without a reward": len(samples) - len(flat)})
    return Chosen(rows, +left_out, {"sample_reward": mean_reward(flat)} if flat else {})


class LLMLabAWRTrainer(LLMLabSFTTrainer):
    """The SFT trainer with a weight for each row, scaled to mean 1 over the rows of an optimizer step.

    `shares` are the effective sample sizes of the steps since the last log, as shares of their rows.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.data_collator = partial(collate_weighted, self.data_collator)
        self.shares: list[float] = []
        self.mean_weight: Tensor | float = 1.0

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches, items = super().get_batch_samples(*args, **kwargs)
        if batches:
            # rows that fill up an epoch's last batch have no label
            weights = torch.cat([each["weight"][(each["labels"] != -100).any(1)] for each in batches]).double()
            sums = torch.stack([torch.ones_like(weights).sum(), weights.sum(), weights.square().sum()])
            rows, total, squares = self.accelerator.reduce(sums.float().to(self.args.device), reduction="sum")
            self.mean_weight = total / rows
            self.shares.append((total**2 / squares / rows).item())
        return batches, items

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        weights = inputs["weight"] / (self.mean_weight if model.training else 1.0)  # (rows,)

        def weighted(**options: Any) -> Any:
            output = model(**options)
            output.log_probs = output.log_probs * weights.unsqueeze(1)  # (rows, time - 1)
            return output

        return super().compute_loss(weighted, without_weight(inputs), *args, **kwargs)

    def estimated_from(self, batch: Any) -> dict[str, Tensor]:
        return without_weight(super().estimated_from(batch))


def without_weight(batch: dict[str, Any]) -> dict[str, Any]:
    """Returns the model's inputs of a batch."""
    return {name: value for name, value in batch.items() if name != "weight"}


def collate_weighted(collator: Any, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Collates rows as a batch with their weights, (rows,)."""
    return {**collator(examples), "weight": torch.tensor([example["weight"] for example in examples])}


@dataclass(eq=False)
class WeightMetrics(StageMetrics):
    """Logs `effective_sample_size`, (sum w)^2 / sum w^2 as a share of a step's rows, and warns once where it stays
    small for `patience` lines."""

    progress: ProgressLine
    shares: list[float]
    patience: int = 20
    few: int = 0

    def add_metrics(self, logs: dict[str, Any], prefix: str, state: TrainerState) -> None:
        super().add_metrics(logs, prefix, state)
        if prefix or not self.shares or "loss" not in logs:
            return
        logs["effective_sample_size"] = share = sum(self.shares) / len(self.shares)
        self.shares.clear()
        self.few = self.few + 1 if share < FEW else 0
        if self.few == self.patience:
            self.progress.say(f"[yellow]warning[/yellow] {ADVICE}")


@training_stage(OfflineRun, prepare=locate_rewards)
def awr(run: OfflineRun[AWRSettings], *, rewards: Sequence[RewardFunction] = ()) -> RunResult:
    """Samples completions or episodes, fine-tunes on all of them weighted by advantage, and writes the run folder.

    Args:
        settings: `AWRSettings`: which model, what prompts, what is rewarded, how samples are weighted.
        rewards: custom reward functions in addition to the settings', as in `llmlab.grpo`.

    Returns:
        The run folder and its last metrics: `sample_reward`, the mean over the samples, `effective_sample_size` as a
        share of an optimizer step's samples, the weighted `loss` in nats per trained token, `eval_loss`, ...

    Source: seed, RL guide, section 3; Peng et al. 2019 (arXiv:1910.00177).
    """
    maker = SampleRows(run.load_policy(), partial(choose_all, settings=run.settings), rewards, weight=Value("float32"))
    trainer = run.make_sample_trainer(LLMLabAWRTrainer, maker)
    return run.train_samples(trainer, callbacks=[WeightMetrics(run.progress, trainer.shares)])

"""Advantage-weighted regression: fine-tuning on all samples, the better ones with the larger weights. The loop is that
of `llmlab sft`, and so is the loss but for the weights, which are known before training. Source: Peng et al. 2019
(arXiv:1910.00177), with temperature 1/advantage_beta; seed, RL guide, section 3."""

import math
from collections import Counter
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
from llmlab.settings.offline import AWRSettings
from llmlab.training.offline.run import OfflineRun, Weighted
from llmlab.training.sft import LLMLabSFTTrainer

LEAST = -20.0  # exponent of a weight, so that a step of failures alone still has a sum
FEW, PATIENCE = 0.1, 20  # share of a step's samples that carries it, logged lines


def weigh(samples: list[Sample], settings: AWRSettings) -> tuple[Weighted, Counter[str]]:
    """Returns the samples that have a reward with their weights, min(exp(beta x A), clip), scaled to mean 1.

    A is the reward less the mean of its prompt, divided by the standard deviation of all where normalize_advantage.

    Source: Peng et al. 2019 (arXiv:1910.00177), equation 13; seed: RL guide, section 3.
    """
    rated = [each for each in samples if each.reward is not None]
    sampled = [each for each in rated if any(label != -100 for label in each.labels)]
    counts = {"without a reward": len(samples) - len(rated), "without a sampled token": len(rated) - len(sampled)}
    left_out = +Counter(counts)
    groups = group_samples(sampled)
    rated = [each for group in groups for each in group]
    rewards = [[each.reward for each in group] for group in groups]
    advantages = np.concatenate([[], *(np.subtract(group, np.mean(group)) for group in rewards)])
    largest = max([1.0, *(abs(each.reward) for each in rated)])
    advantages[np.abs(advantages) < 1e-9 * largest] = 0  # rounding
    if not advantages.any():
        return [], left_out + Counter({"with the reward of all samples of its prompt": len(rated)})
    scale = settings.advantage_beta / (advantages.std() if settings.normalize_advantage else 1.0)
    exponents = np.minimum(scale * advantages, math.log(settings.clip_advantage))
    weights = np.exp(np.maximum(exponents, LEAST))
    return list(zip(rated, (weights / weights.mean()).tolist(), strict=True)), left_out


class LLMLabAWRTrainer(LLMLabSFTTrainer):
    """The SFT trainer with a weight for each row, scaled to mean 1 over the rows of an optimizer step. `shares` are
    the effective sample sizes of the steps since the last log, as shares of their rows."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.data_collator = partial(collate_weighted, self.data_collator)
        self.shares: list[float] = []

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches, items = super().get_batch_samples(*args, **kwargs)
        if batches:  # rows that fill up an epoch's last batch have no label
            weights = torch.cat([each["weight"][(each["labels"] != -100).any(1)] for each in batches]).double()
            sums = torch.stack([torch.ones_like(weights).sum(), weights.sum(), weights.square().sum()])
            rows, total, squares = self.accelerator.reduce(sums.to(self.args.device), reduction="sum")
            self.mean_weight = (total / rows).float()
            self.shares.append((total**2 / squares / rows).item())
        return batches, items

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = {**inputs}
        weights = inputs.pop("weight") / (self.mean_weight if model.training else 1.0)  # (rows,)
        self.equal_weights = bool((weights == weights[0]).all())

        def weighted(**options: Any) -> Any:
            output = model(**options)
            output.log_probs = output.log_probs * weights.unsqueeze(1)  # (rows, time - 1)
            return output

        return super().compute_loss(weighted, inputs, *args, **kwargs)

    def estimated_from(self, batch: Any) -> dict[str, Tensor]:
        inputs = super().estimated_from(batch)
        return {name: value for name, value in inputs.items() if name != "weight"}


def collate_weighted(collator: Any, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Collates rows as a batch with their weights, (rows,)."""
    return {**collator(examples), "weight": torch.tensor([example["weight"] for example in examples])}


@dataclass(eq=False)
class WeightMetrics(StageMetrics):
    """Logs `effective_sample_size`, (sum w)^2 / sum w^2 as a share of the rows; warns once where it stays small."""

    trainer: LLMLabAWRTrainer
    progress: ProgressLine
    few: int = 0

    def add_metrics(self, logs: dict[str, Any], prefix: str, state: TrainerState) -> None:
        super().add_metrics(logs, prefix, state)
        if shares := [] if prefix else self.trainer.shares:
            logs["effective_sample_size"] = share = sum(shares) / len(shares)
            self.trainer.shares = []
            self.few = self.few + 1 if share < FEW else 0
            if self.few == PATIENCE:
                advice = "lower advantage_beta or clip_advantage, or raise the effective batch"
                self.progress.say(f"[yellow]warning[/yellow] few samples carry all the weight ({share:.0%}): {advice}")


@training_stage(OfflineRun, prepare=locate_rewards)
def awr(run: OfflineRun[AWRSettings]) -> RunResult:
    """Samples completions or episodes, fine-tunes on all of them weighted by advantage, and writes the run folder.

    Args:
        settings: `AWRSettings`: which model, what prompts, what is rewarded, how samples are weighted.

    Returns:
        The run folder and its last metrics: `kept_reward`, the mean over the samples, `effective_sample_size` as a
        share of an optimizer step's samples, the weighted `loss` in nats per trained token, `eval_loss`, ...

    Source: seed, RL guide, section 3; Peng et al. 2019 (arXiv:1910.00177).
    """
    choose = partial(weigh, settings=run.settings)
    return run.train_samples(LLMLabAWRTrainer, choose, WeightMetrics, weight=Value("float32"))

"""Reward models: a policy with a scalar head, pairs, trainer. The loop and the loss (Bradley-Terry) are TRL's
RewardTrainer; scoring with the result is `llmlab.rewards`."""

from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import RewardConfig, RewardTrainer

from llmlab.runs.record import RunResult
from llmlab.runs.run import training_stage
from llmlab.runs.trainer import StageTrainer
from llmlab.settings.preference import RewardModelSettings
from llmlab.training.preference.run import PreferenceRun, StepMeanLoss


class LLMLabRewardTrainer(StageTrainer, StepMeanLoss, RewardTrainer):
    """TRL's RewardTrainer with llmlab's optimizers."""

    rows_per_example = 2

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name, parameter in self.model.named_parameters():
            if "modules_to_save" in name:  # TRL casts a 4-bit model's head to bf16; hidden states are fp32
                parameter.data = parameter.data.float()

    @staticmethod
    def predict(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Returns the scores of both answers, (pairs, 2): Bradley and Terry's model is their softmax."""
        scores = model(**batch, use_cache=False).logits.squeeze(-1)  # (2 * pairs,): chosen first, then rejected
        return torch.stack(scores.chunk(2), dim=1)


@training_stage(PreferenceRun)
def reward(run: PreferenceRun[RewardModelSettings]) -> RunResult:
    """Trains a reward model on preference pairs (Bradley-Terry loss) and writes its run folder.

    Args:
        settings: `RewardModelSettings`: which model to start from, what pairs, for how long.

    Returns:
        The run folder, an ordinary sequence-classification one, and its last metrics: `loss`, `win_rate` (share of
        pairs ranked correctly), `margin`, `mean_reward`, ...

    Source: Stiennon et al. 2020 (arXiv:2009.01325); seed, LLM-Lab document, "PPO-Specific Parameters".
    """
    policy = run.load_policy(task="SEQ_CLS")
    data = run.read_pairs(policy)
    answers = replace(data, train=join_prompts(data.train), validation=join_prompts(data.validation))
    return run.train_pairs(LLMLabRewardTrainer, RewardConfig, policy, answers)


def join_prompts(pairs: Dataset | None) -> Dataset | None:
    """Returns each pair as two full rows, prompt + completion."""
    return pairs and pairs.map(
        lambda row: {name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")},
        remove_columns="prompt_ids",
    )

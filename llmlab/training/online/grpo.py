"""Group relative policy optimization (GRPO).

Sampling, the loop, advantages of groups and the clipped loss are TRL's GRPOTrainer; here are the global baseline, the
absolute KL penalty and group metrics. To understand GRPO from end to end, read `run.py` (from settings to a trainer),
this file, `_trl.py` (the steps of a rollout) and `callbacks.py` (what is logged, and when a run stops).

Source: Shao et al. 2024 (arXiv:2402.03300); seed, LLM-Lab document, "GRPO"; RL guide, section 4.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig

from llmlab.rewards.loading import locate_rewards
from llmlab.runs.record import RunResult
from llmlab.runs.run import training_stage
from llmlab.settings.rl import GRPOSettings
from llmlab.training.online.passes import attributes, dropout_rates, policy_mask
from llmlab.training.online.rollouts import Rollouts
from llmlab.training.online.run import OnlineRun, RewardFunction


class LLMLabGRPOTrainer(Rollouts):
    """TRL's GRPOTrainer with llmlab's optimizers, a choice of baselines and penalties, and metrics of groups."""

    penalty = staticmethod(torch.abs)
    """Of log-ratios, with `kl_penalty: abs`."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        # with dropout two passes differ, and vLLM's log-probabilities are its own
        self.scores_later = not (self.use_vllm or any(dropout_rates(self.model)))

    def finish_rollout(self, rollout: dict[str, Any]) -> dict[str, Any]:
        if not self.model.training:
            return rollout  # validation prompts have one completion each
        for name, value in group_metrics(self.scores.view(-1, self.num_generations)).items():
            self.note(name, value)
        if self.settings.baseline_mode == "global_mean":
            advantages = global_advantages(self.scores, scale=self.scale_rewards != "none")
            self._logs["advantages"].extend(advantages.tolist())  # of TRL's table, in place of its own
            rollout["advantages"] = self.own_rows(advantages, len(rollout["advantages"]))
        return rollout

    def total_loss(self, loss: Callable[[], Tensor], batch: dict[str, Any]) -> Tensor:
        """Returns TRL's loss; with `kl_penalty: abs` its KL term is the mean of absolute log-ratios instead."""
        if self.settings.kl_penalty == "kl" or self.beta == 0:
            return loss()
        with attributes(self, beta=0.0):
            policy_loss = loss()
        log_ratio = self.log_probs - batch["ref_per_token_logps"]  # (rows, time)
        weight = torch.ones_like(log_ratio)
        if self.args.use_bias_correction_kl:  # importance-weighted like TRL's KL term
            weight = (self.log_probs - batch.get("old_per_token_logps", self.log_probs.detach())).exp()
        kl = ((torch.exp(-log_ratio) + log_ratio - 1) * weight).detach()  # the estimate that TRL logs
        self.note("kl", self.mean(kl, policy_mask(batch)) * self.token_share)
        return policy_loss + self.beta * self.token_mean(self.penalty(log_ratio) * weight, batch)


def group_metrics(rewards: Tensor) -> dict[str, float]:
    """Returns the group metrics of rewards, (groups, completions), NaN where none applies: the mean of the groups'
    best, of their variances, and the share of groups whose completions all have the same reward."""
    known = rewards.isfinite()
    deviations = torch.where(known, rewards - rewards.nanmean(1, keepdim=True), 0.0)
    variance = deviations.square().sum(1) / (known.sum(1) - 1).clamp(min=1)  # (groups,)
    best = rewards.nan_to_num(nan=-torch.inf).max(1).values
    best = best[best.isfinite()]
    return {
        "best_of_group": best.mean().item() if len(best) else torch.nan,
        "group_variance": variance.mean().item(),
        "zero_variance_share": (variance < 1e-12).float().mean().item(),
    }


def global_advantages(rewards: Tensor, *, scale: bool) -> Tensor:
    """Returns rewards minus the global mean, (completions,), divided by the standard deviation if `scale`; 0 where
    there is no reward (NaN)."""
    known = rewards[rewards.isfinite()]
    advantages = rewards - known.mean()
    if scale and len(known) > 1:
        advantages = advantages / (known.std() + 1e-4)
    return advantages.nan_to_num(nan=0.0)


@training_stage(OnlineRun, prepare=locate_rewards)
def grpo(run: OnlineRun[GRPOSettings], *, rewards: Sequence[RewardFunction] = ()) -> RunResult:
    """Trains a policy with GRPO on rewards of its own completions and writes the run folder.

    Args:
        settings: `GRPOSettings`: which model, what prompts, what is rewarded, for how long.
        rewards: custom reward functions in addition to the settings', as TRL calls them: with `completions` and the
            columns of the data, for one number each. `Reward(function, weight=..., low=..., high=...)` gives one a
            weight and the range that `normalize_rewards` needs.

    Returns:
        The run folder and its last metrics: `reward`, `reward/NAME` of each component, `best_of_group`,
        `group_variance`, `zero_variance_share`, `clipped_share`, `completion_length`, `kl`, `kl_coef`, `entropy`,
        `loss`, ...; of the validation prompts, with one completion each, those that apply with `eval_` before them.

    Source: seed, LLM-Lab document, "GRPO" and "LoRA for RLHF"; arXiv:2402.03300.
    """
    run.load(rewards)
    trainer = run.make_online_trainer(LLMLabGRPOTrainer, GRPOConfig, arguments={})
    return run.train_online(trainer, temperature=run.settings.grpo_temperature)

"""Group relative policy optimization: policy and reference, prompts, rewards, trainer, train, save.

Sampling, the loop and the loss are TRL's GRPOTrainer; here are the global baseline, the absolute KL penalty, the KL
controller and what is logged of groups.

Source: Shao et al. 2024 (arXiv:2402.03300); seed, LLM-Lab document, "GRPO"; RL guide, section 4.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from llmlab.rewards.loading import locate_rewards
from llmlab.runs._trl import RolloutSteps, WholeRollouts, written
from llmlab.runs.optimizers import OurOptimizers
from llmlab.runs.record import RunResult
from llmlab.runs.start import begin
from llmlab.settings.grpo import GRPOSettings
from llmlab.settings.sources import Resolved
from llmlab.settings.trust import takes_trust
from llmlab.training.online.run import OnlineRun, RewardFunction


class GroupTrainer(WholeRollouts, OurOptimizers, RolloutSteps, GRPOTrainer):
    """TRL's GRPOTrainer with llmlab's optimizers, a choice of baselines and penalties, and numbers about groups."""

    _logps: Tensor

    @contextmanager
    def scoring(self, model: Any) -> Iterator[Callable[[Tensor], None]]:
        def keep(logps: Tensor) -> None:
            if logps.requires_grad:
                self._logps = logps

        yield keep

    def finish_rollout(self, rollout: dict[str, Any]) -> dict[str, Any]:
        if not self.model.training:
            return rollout  # validation prompts have one completion each
        rewards = total_rewards(self.all_rewards, self.reward_weights)
        for name, value in group_numbers(rewards.view(-1, self.num_generations)).items():
            self.note(name, value)
        if self.settings.baseline_mode == "global_mean":
            advantages = global_advantages(rewards, scale=self.scale_rewards != "none")
            self.set_logged_advantages(advantages)
            rows = len(rollout["advantages"])
            first = self.accelerator.process_index * rows
            rollout["advantages"] = advantages[first : first + rows]
        return rollout

    def total_loss(self, loss: Callable[[], Tensor], batch: dict[str, Any]) -> Tensor:
        if self.settings.kl_penalty == "kl" or self.beta == 0:
            return loss()
        beta, self.beta = self.beta, 0.0
        try:
            policy_loss = loss()
        finally:
            self.beta = beta
        log_ratio = self._logps - batch["ref_per_token_logps"]  # (rows, time)
        mask = written(batch)
        weight = self.sampled_weight(batch, mask)
        estimate = (torch.exp(-log_ratio) + log_ratio - 1) * weight  # what TRL logs and, with "kl", charges
        kl, tokens = self.accelerator.reduce(
            torch.stack([(estimate.detach() * mask).sum(), mask.sum()]), reduction="sum"
        )
        self.note("kl", (kl / tokens.clamp(min=1)).item())
        return policy_loss + beta * self.mean_over_tokens(log_ratio.abs() * weight, mask, batch)

    def sampled_weight(self, batch: dict[str, Any], mask: Tensor) -> Tensor:
        """Returns what TRL multiplies a penalty with, since tokens were sampled from the policy as it was then."""
        if not self.args.use_bias_correction_kl:
            return torch.ones_like(mask)
        change = self._logps - batch.get("old_per_token_logps", self._logps.detach())
        if self.importance_sampling_level == "sequence":
            change = ((change * mask).sum(1) / mask.sum(1).clamp(min=1)).unsqueeze(1)
        return change.exp()

    def mean_over_tokens(self, values: Tensor, mask: Tensor, batch: dict[str, Any]) -> Tensor:
        """Returns the mean of (rows, time) values as TRL's loss of this `loss_type` takes it."""
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
        values = values * mask
        if self.loss_type in ("grpo", "sapo"):
            return (values.sum(1) / mask.sum(1).clamp(min=1)).mean() / accumulation
        if self.loss_type == "bnpo":
            return values.sum() / mask.sum().clamp(min=1) / accumulation
        if self.loss_type == "dr_grpo":
            return values.sum() / (len(values) * self.max_completion_length) / accumulation
        if self.loss_type == "luspo":
            return values.sum(1).mean() / accumulation
        tokens = batch["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if self.model.training:
            tokens = tokens * accumulation / self.args.steps_per_generation
        return values.sum() / tokens


def total_rewards(by_function: Tensor, weights: Tensor) -> Tensor:
    """Returns the weighted sum of rewards (completions, functions), NaN where none applies."""
    total = (by_function * weights.to(by_function.device)).nansum(1)
    return total.masked_fill(by_function.isnan().all(1), torch.nan)


def group_numbers(rewards: Tensor) -> dict[str, float]:
    """Returns what is logged of rewards (groups, completions), NaN where no reward applies.

    `best_of_group` is the mean of the groups' best, `group_variance` the mean of their variances, and
    `zero_variance_share` the share of groups whose completions all have the same reward.
    """
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
    """Returns advantages over the mean of all rewards (completions,), divided by their deviation where `scale`.

    A completion without a reward (NaN) has none: 0.
    """
    known = rewards[rewards.isfinite()]
    advantages = rewards - known.mean()
    if scale and len(known) > 1:
        advantages = advantages / (known.std() + 1e-4)
    return advantages.nan_to_num(nan=0.0)


@takes_trust
def grpo(
    settings: GRPOSettings | Resolved[GRPOSettings],
    *,
    resume: str | Path | None = None,
    load_optimizer: bool = True,
    allow_changed_data: bool = False,
    console: Console | None = None,
    rewards: Sequence[RewardFunction] = (),
) -> RunResult:
    """Makes the better of a policy's own completions likelier, and writes its run folder.

    Args:
        settings: which model, what prompts, what is rewarded, for how long.
        resume: a run folder of this stage to continue from its last checkpoint, or a checkpoint in it.
        load_optimizer: with `resume`, whether to restore the optimizer's state; without, only weights and step count.
        allow_changed_data: with `resume`, go on although data files changed since the run began.
        console: where to print; None is the terminal.
        rewards: functions of one's own beside those of the settings, as TRL calls them: with `completions` and the
            columns of the data, for one number each. `Reward(function, weight=..., low=..., high=...)` gives one a
            weight and the range that `normalize_rewards` needs.

    Returns:
        The run folder and its last metrics: `reward`, `reward/NAME` of each component, `best_of_group`,
        `group_variance`, `zero_variance_share`, `clipped_share`, `completion_length`, `kl`, `kl_coef`, `entropy`,
        `loss`, ...; of the validation prompts, with one completion each, those that apply with `eval_` before them.

    Raises:
        UserError: anything that the settings, the models, the prompts, the rewards, the machine or the disk make
            impossible, and a run that has nothing to learn from.
        KeyboardInterrupt: after an interrupted run was saved.

    Source: seed, LLM-Lab document, "GRPO" and "LoRA for RLHF"; arXiv:2402.03300.
    """
    with begin(
        locate_rewards(settings),
        resume=resume,
        load_optimizer=load_optimizer,
        allow_changed_data=allow_changed_data,
        console=console,
    ) as start:
        run = OnlineRun("grpo", start, load_optimizer=load_optimizer, rewards=rewards)
        trainer = run.make_trainer(GroupTrainer, GRPOConfig)
        return run.learn(trainer, temperature=run.settings.grpo_temperature)

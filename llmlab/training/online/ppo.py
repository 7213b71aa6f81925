"""Proximal policy optimization (PPO): a learned critic in place of GRPO's baselines, on the same rollouts.

Sampling, the loop, clipped loss and entropy bonus are those of TRL's GRPOTrainer; the rest is here. To understand PPO
end to end, read `run.py` (from settings to a trainer), this file, `advantages.py` (its formulas), `critic.py`,
`_trl.py` (the steps of a rollout) and `callbacks.py` (what is logged, and when a run stops).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOConfig

from llmlab.optim.sophia import next_token_logits
from llmlab.rewards.loading import locate_rewards
from llmlab.runs.progress import human, quiet_libraries
from llmlab.runs.record import RunResult
from llmlab.runs.run import training_stage
from llmlab.settings.errors import UserError, reading
from llmlab.settings.rl import PPOSettings
from llmlab.training.online import advantages as formulas
from llmlab.training.online.critic import Critic
from llmlab.training.online.passes import attributes, dropout_rates, policy_mask
from llmlab.training.online.rollouts import Rollouts
from llmlab.training.online.run import OnlineRun, RewardFunction
from llmlab.training.online.scorer import load_scorer

STOP_KL_FACTOR = 1.5
"""Times target_kl: the KL to the sampling policy at which the epochs over a rollout stop."""


@dataclass
class PPOConfig(GRPOConfig):
    """TRL's GRPOConfig with the fields that PPO adds; `PPOSettings` has their help.

    `beta` is the coefficient of the KL penalty, `num_iterations` the epochs over a rollout, which stop early when the
    KL to the sampling policy exceeds `stop_kl`. One completion of each prompt is the default; a rollout has at least
    two. Dropout is off: else the policy that is updated would not be the one that sampled.
    """

    num_generations: int = 1
    num_generations_eval: int = 1
    disable_dropout: bool = True
    value_model: Literal["separate", "shared"] = "separate"
    vf_coef: float = 0.1
    cliprange_value: float | None = 0.2
    gamma: float = 1.0
    gae_lambda: float = 0.95
    whiten_advantages: bool = True
    kl_penalty: Literal["kl", "abs"] = "kl"
    stop_kl: float | None = None

    def __post_init__(self) -> None:
        generations = self.num_generations
        if generations == 1:  # TRL's class wants groups; any divisor of the rollout passes its checks
            parts = (self.generation_batch_size, self.steps_per_generation, self.gradient_accumulation_steps)
            whole = next((part for part in parts if part is not None), 1)
            self.num_generations = self.per_device_train_batch_size if self.per_device_train_batch_size > 1 else whole
        super().__post_init__()
        self.num_generations = generations


class PPOTrainer(Rollouts):
    """Proximal policy optimization with a learned value function (`PPOConfig` says how).

    A token's reward is minus `beta` times its KL penalty; the last one also gets the completion's score. Advantages
    are GAE's, per token, and per turn where tools are called, whose tokens are skipped. The loss is TRL's clipped
    one, plus `vf_coef` times the clipped value loss, minus `entropy_coef` times the entropy. Where the policy's KL
    from the one that sampled exceeds `stop_kl`, the passes over the rollout end with that update.

    A separate critic starts from `scorer`, a classifier with one label and the policy's vocabulary, or the policy.

    Source: arXiv:1707.06347; arXiv:1506.02438; arXiv:1909.08593.
    """

    def __init__(self, *, args: PPOConfig, scorer: PreTrainedModel | PeftModel | None = None, **kwargs: Any):
        super().__init__(args=args, **kwargs)
        separate = args.value_model == "separate"
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise UserError("ppo: not supported under DeepSpeed ZeRO-3, which splits the critic; use FSDP2 or ZeRO-2")
        # FSDP2 refuses a tensor that two of its groups would shard
        self.critic = Critic(self.model, separate=separate, scorer=scorer, shares_frozen=not self.is_fsdp_enabled)
        if separate and args.gradient_checkpointing:
            self.critic.backbone.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        if args.disable_dropout:
            for module, name in dropout_rates(self.model):  # TRL leaves dropout in attention on
                setattr(module, name, 0.0)
        self.divergences: list[float] = []  # KL from the sampling policy, one a forward pass of this update

    @torch.no_grad()
    def finish_rollout(self, rollout: dict[str, Any]) -> dict[str, Any]:
        """Replaces per-completion advantages by per-token ones, and adds old values and returns."""
        mask = policy_mask(rollout)  # (batch, time)
        if "old_per_token_logps" not in rollout:  # TRL skips them where it expects a single update
            rollout["old_per_token_logps"] = self.score_tokens(rollout)
        old, values = rollout["old_per_token_logps"], self.values
        penalties = torch.zeros_like(old)
        if "ref_per_token_logps" in rollout:
            reference = rollout["ref_per_token_logps"]
            penalties = self.beta * formulas.kl_penalty(old, reference, self.args.kl_penalty)
            self.note("kl", self.mean(formulas.k3(old, reference), mask))
            self.note("kl_coef", self.beta)
            self.note("kl_penalty", self.mean(penalties, mask))
        scores = self.own_rows(self.scores, len(old))
        mask = mask * ~scores.isnan()[:, None]  # where no reward applies, nothing is learned
        rewards = formulas.token_rewards(scores.where(~scores.isnan(), 0), penalties, mask)
        gamma, lam = self.args.gamma, self.args.gae_lambda
        if "tool_mask" in rollout:
            gamma, lam = formulas.per_turn(mask, gamma), formulas.per_turn(mask, lam)
        advantages, returns = formulas.gae(rewards, values, mask, gamma, lam)
        self.note("explained_variance", formulas.explained_variance(values, returns, mask, self.sum_over_processes))
        self.note("return", self.mean(returns, mask))
        self.note("value", self.mean(values, mask))
        if self.args.whiten_advantages:
            advantages = formulas.whiten(advantages, mask, self.sum_over_processes)
        returns = torch.where(mask.bool(), returns, values)
        return {**rollout, "advantages": advantages, "old_values": values, "returns": returns}

    def total_loss(self, policy_loss: Callable[[], Tensor], inputs: dict[str, Any]) -> Tensor:
        """Returns TRL's loss without its KL term, which is in the rewards here, plus the value loss."""
        with attributes(self, beta=0.0):
            loss = policy_loss()
        mask = policy_mask(inputs)
        clip = self.args.cliprange_value
        losses, clipped = formulas.value_loss(self.values, inputs["old_values"], inputs["returns"], clip)
        divergences = formulas.k3(inputs["old_per_token_logps"], self.log_probs.detach())
        parts = {"value_loss": losses.detach(), "value_clip_ratio": clipped, "policy_kl": divergences}
        for name, part in parts.items():
            self.note(name, mean := self.mean(part, mask) * self.token_share)
        if self.model.training:
            self.divergences.append(mean)
        return loss + self.args.vf_coef * self.token_mean(losses, inputs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self.divergences:  # none of an update that is passed over
            far = self.args.stop_kl is not None and sum(self.divergences) / len(self.divergences) > self.args.stop_kl
            if self.args.stop_kl is not None:
                self.note("early_stop", float(far))
            if far:
                # the next forward pass samples a new rollout
                self._step += -self._step % (self.args.steps_per_generation * self.num_iterations)
            self.divergences = []
        return loss

    def _generate(self, prompts: list[Any]) -> Any:
        with self.critic.detached() if self.use_vllm else nullcontext():  # vLLM is sent every weight that it sees
            return super()._generate(prompts)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if _internal_call:  # a checkpoint; the critic is no part of an export
            self.critic.save(Path(output_dir) if self.args.should_save else None)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint:
            with reading(checkpoint, "a checkpoint's critic"):
                self.critic.load(Path(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)

    def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with self.critic.collect_values() as values:
            logits = next_token_logits(model, batch)
        return logits + 0 * values[0].sum()  # DDP requires every parameter in the graph


@training_stage(OnlineRun, prepare=locate_rewards)
def ppo(run: OnlineRun[PPOSettings], *, rewards: Sequence[RewardFunction] = ()) -> RunResult:
    """Trains a policy with PPO (clipped objective, learned critic, GAE) and writes the run folder.

    Args:
        settings: `PPOSettings`: which model, what prompts, what is rewarded, for how long.
        rewards: custom reward functions in addition to the settings', as in `grpo`.

    Returns:
        The run folder and its last metrics: `reward`, `reward/NAME` of each component, `kl` (from the reference),
        `kl_coef`, `policy_kl` (to the sampling policy), `value_loss`, `explained_variance`, `entropy`, `loss`,
        ...; of the validation prompts those that apply with `eval_` before them.

    Source: seed, LLM-Lab document, "PPO" and "LoRA for RLHF"; RL guide, section 4; arXiv:1707.06347.
    """
    settings = run.settings
    run.load(rewards)
    with quiet_libraries():
        scorer = load_scorer(run)
    arguments = {
        "kl_penalty": settings.kl_penalty,
        "cliprange_value": settings.cliprange_value,
        "stop_kl": STOP_KL_FACTOR * settings.target_kl if settings.early_stop else None,
    }
    trainer = run.make_online_trainer(PPOTrainer, PPOConfig, arguments=arguments, scorer=scorer)
    trained = human(sum(tensor.numel() for tensor in trainer.critic.trained().values()))
    critic = f"its own, from {settings.value_checkpoint or 'the policy'}: {trained} trained parameters"
    if settings.value_model == "shared":
        critic = f"a head on the policy: {trained} parameters"
    parents = [settings.value_checkpoint] if settings.value_checkpoint else []
    return run.train_online(trainer, temperature=settings.temperature, plan=[("critic", critic)], parents=parents)

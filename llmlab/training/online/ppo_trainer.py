"""PPO for language models: TRL's GRPOTrainer with a value function in place of comparisons within groups.

Sampling, vLLM, tools, environments, reward functions, the clipped policy loss and the entropy bonus are TRL's; the
critic is in `critic.py`, the arithmetic in `advantages.py`.  Settings, data and run folders are `ppo.py`'s.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from llmlab.runs._trl import RolloutSteps, keep_out_of_exports, written
from llmlab.training.online.advantages import (
    at_turn_ends,
    explained_variance,
    gae,
    k3,
    kl_charge,
    token_rewards,
    value_loss,
    whiten,
)
from llmlab.training.online.critic import Critic


@dataclass
class PPOConfig(GRPOConfig):
    """TRL's GRPOConfig with what PPO adds; `beta` is the weight of the KL charge, `num_iterations` the passes.

    Unlike there, one completion of each prompt is enough, and the default; dropout is off, or the policy that is
    updated would not be the one that sampled.  A rollout has at least two completions.
    """

    num_generations: int = field(default=1, metadata={"help": "Completions of each prompt in a rollout."})
    num_generations_eval: int = field(default=1, metadata={"help": "Completions of each validation prompt."})
    disable_dropout: bool = field(default=True, metadata={"help": "Score with the policy that sampled, exactly."})
    value_model: Literal["separate", "shared"] = field(
        default="separate", metadata={"help": "A critic with a trunk of its own, or a head on the policy's."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float | None = field(
        default=0.2, metadata={"help": "How far a value may move in the passes over a rollout; None does not clip."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount of later rewards: a token, or a turn with tools."})
    gae_lambda: float = field(default=0.95, metadata={"help": "0 trusts the values, 1 the rewards alone."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Scale advantages to mean 0 and variance 1."})
    kl_penalty: Literal["kl", "abs"] = field(default="kl", metadata={"help": "Charge the log ratio, or its size."})
    stop_kl: float | None = field(
        default=None, metadata={"help": "Divergence from the sampling policy that ends the passes over a rollout."}
    )

    def __post_init__(self) -> None:
        wanted = self.num_generations
        if wanted == 1:  # blocked by the parent, which needs groups; any divisor of the rollout passes its checks
            parts = (self.generation_batch_size, self.steps_per_generation, self.gradient_accumulation_steps)
            whole = next((part for part in parts if part is not None), 1)
            self.num_generations = self.per_device_train_batch_size if self.per_device_train_batch_size > 1 else whole
        super().__post_init__()
        self.num_generations = wanted


class PPOTrainer(RolloutSteps, GRPOTrainer):
    """Proximal policy optimization with a learned value function (`PPOConfig` says how).

    Each token that the policy wrote is rewarded with minus `beta` times its KL charge, and the last one with the
    completion's score besides, the weighted sum of the reward functions.  GAE turns this and the critic's values into
    advantages; `gamma` and `gae_lambda` count tokens, and with tools turns, so that a long episode keeps its reward.
    What tools wrote is stepped over and gets no gradient.  The loss is TRL's clipped one, a mean over tokens, plus
    `vf_coef` times the clipped value loss and minus `entropy_coef` times the entropy.

    `beta` may change between rollouts.  Where the policy moves further than `stop_kl` from the one that sampled, the
    passes over the rollout end with that update, and the same prompts are sampled anew: each prompt is still seen for
    as many updates.  A run resumed amid a rollout begins with a new one.

    Args:
        args: the configuration.
        scorer: a sequence classifier with one label, of the policy's vocabulary, that a separate critic starts from;
            None starts it from the policy.
        kwargs: of GRPOTrainer.

    Source: arXiv:1707.06347; arXiv:1506.02438; arXiv:1909.08593.
    """

    def __init__(self, *, args: PPOConfig, scorer: PreTrainedModel | PeftModel | None = None, **kwargs: Any):
        super().__init__(args=args, **kwargs)
        separate = args.value_model == "separate"
        self.critic = Critic(self.model, separate=separate, scorer=scorer)
        if separate and args.gradient_checkpointing:
            self.critic.trunk.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        if args.disable_dropout:
            _turn_dropout_off(self.model)  # TRL leaves dropout in attention on
        if not isinstance(self.model, PeftModel):  # whose saving the critic steps aside for
            keep_out_of_exports(self.model, (f"critic.{name}" for name, _ in self.critic.named_parameters()))
        self.log_probs = self.values = None  # of the last scored batch, (batch, time)
        self.moved: list[float] = []  # divergence from the sampling policy, one a forward pass of this update

    def sampling(self) -> AbstractContextManager[None]:
        return self.critic.hidden() if self.use_vllm else nullcontext()  # vLLM is sent every weight that it sees

    @contextmanager
    def scoring(self, model: nn.Module) -> Iterator[Callable[[Tensor], None]]:
        """Keeps the log-probabilities and values of the policy's forward passes."""
        if model is self.ref_model or not _adapters_are_on(self.accelerator.unwrap_model(self.model)):
            yield lambda log_probs: None
            return
        with self.critic.listening() as heard:

            def keep(log_probs: Tensor) -> None:
                self.log_probs = log_probs.detach()
                # the value of a state is that of the token before the one chosen in it
                self.values = torch.cat(heard)[:, -log_probs.shape[1] - 1 : -1]  # (batch, time)

            yield keep

    @torch.no_grad()
    def finish_rollout(self, rollout: dict[str, Any]) -> dict[str, Any]:
        """Puts advantages a token where TRL has one a completion, and adds old values and returns."""
        mask = written(rollout)  # (batch, time)
        if "old_per_token_logps" not in rollout:  # TRL skips them where it expects a single update
            rollout["old_per_token_logps"] = self.score_tokens(rollout, self._batch_size)
        old, values = rollout["old_per_token_logps"], self.values
        charges = torch.zeros_like(old)
        if "ref_per_token_logps" in rollout:
            reference = rollout["ref_per_token_logps"]
            charges = self.beta * kl_charge(old, reference, self.args.kl_penalty)
            self.note("kl", self._mean(k3(old, reference), mask))
            self.note("kl_coef", self.beta)
            self.note("kl_charge", self._mean(charges, mask))
        scores, scored = self._scores(len(old))
        mask = mask * scored[:, None]  # where no reward applies, nothing is learned
        rewards = token_rewards(scores, charges, mask)
        gamma, lam = self.args.gamma, self.args.gae_lambda
        if "tool_mask" in rollout:
            gamma, lam = at_turn_ends(mask, gamma), at_turn_ends(mask, lam)
        advantages, returns = gae(rewards, values, mask, gamma, lam)
        self.note("explained_variance", explained_variance(values, returns, mask, self._add_up))
        self.note("return", self._mean(returns, mask))
        self.note("value", self._mean(values, mask))
        if self.args.whiten_advantages:
            advantages = whiten(advantages, mask, self._add_up)
        returns = torch.where(mask.bool(), returns, values)
        return {**rollout, "advantages": advantages, "old_values": values, "returns": returns}

    def _scores(self, rows: int) -> tuple[Tensor, Tensor]:
        """Returns the weighted sums of this process's rewards, (rows,), and where any reward applies."""
        mine = self.all_rewards[self.accelerator.process_index * rows :][:rows]  # (rows, rewards), NaN is "no reward"
        return (mine * self.reward_weights.to(mine.device)).nansum(dim=1), ~mine.isnan().all(dim=1)

    def total_loss(self, policy_loss: Callable[[], Tensor], inputs: dict[str, Any]) -> Tensor:
        """Returns TRL's loss without its KL term, which is in the rewards here, plus the value loss."""
        beta, self.beta = self.beta, 0.0
        try:
            loss = policy_loss()
        finally:
            self.beta = beta
        mask = written(inputs)
        losses, clipped = value_loss(self.values, inputs["old_values"], inputs["returns"], self.args.cliprange_value)
        # a mean over the tokens of an update, as TRL's: a rollout's tokens, shared among its forward passes
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if self.model.training:
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        self.note("value_loss", self._mean(losses.detach(), mask))
        self.note("value_clip_ratio", self._mean(clipped, mask))
        moved = self._mean(k3(inputs["old_per_token_logps"], self.log_probs), mask)
        self.note("policy_kl", moved)
        if self.model.training:
            self.moved.append(moved * self.token_share)
        return loss + self.args.vf_coef * (losses * mask).sum() / tokens

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            far = self.args.stop_kl is not None and sum(self.moved) / len(self.moved) > self.args.stop_kl
            if self.args.stop_kl is not None:
                self.note("early_stop", float(far))
            if far:
                self.end_passes()
            self.moved = []
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save:  # a checkpoint; the critic is no part of an export
            self.critic.save(Path(output_dir))

    def load_beside(self, checkpoint: Path) -> None:
        self.critic.load(checkpoint)

    @property
    def _batch_size(self) -> int:
        args = self.args
        return args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size

    def _add_up(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")

    def _mean(self, x: Tensor, mask: Tensor) -> float:
        """Returns the mean over the masked tokens of all processes."""
        total, count = self._add_up(torch.stack([(x * mask).sum(), mask.sum().to(x.dtype)])).tolist()
        return total / max(count, 1)


def _adapters_are_on(model: nn.Module) -> bool:
    """Whether a forward pass now is the policy's: under adapters the reference is the same model without them."""
    if not isinstance(model, PeftModel):
        return True
    layer = next(module for module in model.get_base_model().modules() if isinstance(module, BaseTunerLayer))
    return not layer.disable_adapters and layer.active_adapters == ["default"]


def _turn_dropout_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):  # Transformers' name in every architecture
            module.attention_dropout = 0.0

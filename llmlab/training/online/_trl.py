"""The steps of a rollout that GRPO and PPO change in TRL's GRPOTrainer, in their order: completions are sampled,
scored by rewards, reference and policy, and split into micro-batches, each of which has its loss. Most are private
methods of TRL's. How log-probabilities are computed is `passes.py`, which one need not read."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer import grpo_trainer

from llmlab.decoding import decode
from llmlab.training.online.layout import sort_updates
from llmlab.training.online.passes import ForwardPasses

PRIVATE_NAMES = {  # of this folder, contract-tested; where it is: its parameters
    # PPO has per-token values, KL and advantages where GRPOTrainer has one advantage per completion
    "trl.GRPOTrainer._generate_and_score_completions": ("self", "inputs"),
    "trl.GRPOTrainer._calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "trl.GRPOTrainer._get_per_token_logps_and_entropies": (
        *("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "..."),
    ),
    "trl.GRPOTrainer._compute_loss": ("self", "model", "inputs"),
    # returns the micro-batch of a rollout, sampling a new rollout at its first one
    "trl.GRPOTrainer._prepare_inputs": ("self", "generation_batch"),
    # plans follow the last token of a rollout instead of sampling it
    "trl.GRPOTrainer._generate_single_turn": ("self", "prompt_ids", "..."),
    # vLLM must not see the critic's weights
    "trl.GRPOTrainer._generate": ("self", "prompts"),
    # a dataset's tools differ from prompt to prompt
    "trl.GRPOTrainer._tokenize_prompts": ("self", "prompts"),
    # the critic is loaded from its own file
    "transformers.Trainer._load_optimizer_and_scheduler": ("self", "checkpoint"),
}


class RolloutSteps(ForwardPasses):
    """A GRPOTrainer in which `finish_rollout` and `total_loss` can be overridden, and whose reference may be a model.
    Of the last rollout there are `rows` of data and `scores`, the weighted sums of rewards of all processes'
    completions, (completions,), NaN where no reward applies."""

    def __init__(self, *, reference: PreTrainedModel | None = None, **kwargs: Any):
        original = grpo_trainer.create_model_from_path
        if reference is not None:
            grpo_trainer.create_model_from_path = lambda *_, **__: reference  # TRL knows references by path alone
        try:
            super().__init__(**kwargs)
        finally:
            grpo_trainer.create_model_from_path = original
        self.policy, self.reference = self.model, self.ref_model and self.accelerator.unwrap_model(self.ref_model)

    def finish_rollout(self, rollout: dict[str, Any]) -> dict[str, Any]:
        """Post-processes this process's rollout."""
        return rollout

    def total_loss(self, loss: Callable[[], Tensor], batch: dict[str, Any]) -> Tensor:
        """Returns the loss of a micro-batch; `loss()` computes TRL's."""
        return loss()

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self.rows = inputs
        return self.finish_rollout(super()._generate_and_score_completions(inputs))

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Samples in llmlab's loop, in evaluation mode; vLLM and sharded weights in TRL's ways."""
        elsewhere = self.use_vllm or self.use_transformers_continuous_batching
        if elsewhere or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        # in bf16 they are off those of a whole pass by more than rounding
        exact = self.scores_later and not self.args.bf16 and self.policy.dtype == torch.float32
        with self.accelerator.autocast():  # once around all tokens, it casts weights once
            decoded = decode(self.policy, prompt_ids, self.generation_config, log_probs=exact)
        return decoded.tokens, decoded.log_probs

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)  # (completions of all processes, functions)
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        self.scores = total.masked_fill(rewards.isnan().all(1), torch.nan)
        return rewards

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """Returns the next micro-batch; those of a new rollout get rows of similar length, and the log-probabilities
        of the policy that sampled where an earlier update will have changed it."""
        before = self._buffered_inputs
        part = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before or not self.model.training:
            return part
        passes, parts = self.current_gradient_accumulation_steps, self._buffered_inputs
        if self.compacts and self.loss_type == "dapo" and self.top_entropy_quantile == 1:
            parts = sort_updates(parts, passes)
        if self.scores_later and (passes < len(parts) or self.num_iterations > 1):
            with torch.no_grad():
                for part in parts[passes:]:
                    sampled = part.get("sampling_per_token_logps")
                    part["old_per_token_logps"] = self.score_tokens(part) if sampled is None else sampled
        self._buffered_inputs = parts
        return parts[self._step % len(parts)]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = self.total_loss(partial(super()._compute_loss, model, inputs), inputs)
        if self.scores_later and self.model.training:
            inputs.setdefault("old_per_token_logps", self.log_probs.detach())
        return loss

    def note(self, name: str, value: float) -> None:
        """Adds a value to the metric of that name, which is logged as a mean."""
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def mean(self, x: Tensor, mask: Tensor) -> float:
        """Returns the mean over the masked tokens of all processes."""
        total, count = self.sum_over_processes(torch.stack([(x * mask).sum(), mask.sum().to(x.dtype)])).tolist()
        return total / max(count, 1)

    def sum_over_processes(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")

    def own_rows(self, everywhere: Tensor, rows: int) -> Tensor:
        """Returns this process's rows of those of all processes."""
        return everywhere[self.accelerator.process_index * rows :][:rows]

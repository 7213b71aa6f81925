"""Private names of TRL's GRPOTrainer that GRPO and PPO need; a contract test checks each.

The comment beside each says why no public name serves.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import split_tensor_dict

from llmlab.decoding import decode
from llmlab.runs._trl import chunked_head
from llmlab.training.online.layout import order_rows, pad_right, share_prompts

PRIVATE_NAMES = {  # where it is: its parameters
    # PPO has per-token values, KL and advantages where GRPOTrainer has one advantage per completion
    "trl.GRPOTrainer._generate": ("self", "prompts"),
    # a dataset's tools differ from prompt to prompt
    "trl.GRPOTrainer._tokenize_prompts": ("self", "prompts"),
    # plans follow the last token of a rollout instead of sampling it
    "trl.GRPOTrainer._generate_single_turn": ("self", "prompt_ids", "..."),
    "trl.GRPOTrainer._calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "trl.GRPOTrainer._generate_and_score_completions": ("self", "inputs"),
    "trl.GRPOTrainer._compute_loss": ("self", "model", "inputs"),
    "trl.GRPOTrainer._get_per_token_logps_and_entropies": ("self", "model", "..."),
    # returns the micro-batch of a rollout, sampling a new rollout at its first one; see `ResumableRollouts`
    "trl.GRPOTrainer._prepare_inputs": ("self", "generation_batch"),
}
# how torch refuses to sample from probabilities that are not finite, on a CPU and on CUDA
NO_DISTRIBUTION = ("probability tensor contains either", "device-side assert triggered")
TOKEN_MEANS = {  # metrics of a forward pass that are means over its tokens: TRL's, and those of PPO
    *("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
    *("policy_kl", "value_loss", "value_clip_ratio"),
}


def policy_mask(batch: dict[str, Any]) -> Tensor:
    """Returns 1 for tokens that the policy wrote and 0 for padding and tool results, (batch, time)."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


def sort_rows(update: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Splits the rows of an update into as many parts as it has, of rows that cost less together."""
    whole = {
        name: torch.cat([part[name] for part in update]) if isinstance(value, Tensor) and value.ndim else value
        for name, value in update[0].items()
    }
    order = order_rows(whole["prompt_ids"], whole["prompt_mask"], whole["completion_mask"].sum(1))
    whole = {
        name: value[order] if isinstance(value, Tensor) and value.ndim else value for name, value in whole.items()
    }
    return split_tensor_dict(whole, len(update))


class RolloutSteps:
    """Mixin for a GRPOTrainer: overridable public methods for the steps of a rollout, and per-prompt `tools`.

    `all_rewards` (completions of all processes, reward functions) are those of the last rollout, `log_probs` (batch,
    time) those of the last forward pass, `values` those of the policy's last one, of a subclass that has them,
    `token_share` its tokens over the mean of its update's forward passes.
    """

    all_rewards: Tensor
    log_probs: Tensor
    values: Tensor | None = None
    token_share: float
    compacts = True
    """Whether forward passes leave out padding and repeated prompts, for which they look at rows."""
    scores_later = False
    """Whether the log-probabilities of the policy that sampled are those of the first pass in its first update, and
    are computed for the other updates alone."""

    def finish_rollout(self, rollout: dict[str, Any]) -> dict[str, Any]:
        """Post-processes this process's rollout."""
        return rollout

    def total_loss(self, loss: Callable[[], Tensor], batch: dict[str, Any]) -> Tensor:
        """Returns the loss of a micro-batch; `loss()` computes TRL's."""
        return loss()

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """Renders each prompt with its own tools, where TRL knows only tools that all prompts share."""
        if not any(self._prompt_tools):
            return super()._tokenize_prompts(prompts)  # type: ignore[misc]
        encode = partial(
            self.processing_class.apply_chat_template,  # type: ignore[attr-defined]
            add_generation_prompt=True,
            return_dict=True,
            **self.chat_template_kwargs,  # type: ignore[attr-defined]
        )
        pairs = zip(prompts, self._prompt_tools, strict=True)
        return [encode(prompt, tools=tools or None)["input_ids"] for prompt, tools in pairs], None, {}

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self.all_rewards = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        return self.all_rewards

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> Any:
        """Returns what TRL's does, from passes over rows of similar length, where there are several; nothing of the
        policy that sampled, where `scores_later`."""
        unwrapped = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        is_policy = model is not self.ref_model and adapters_are_on(unwrapped)  # type: ignore[attr-defined]
        if is_policy and self.scores_later and not (compute_entropy or torch.is_grad_enabled()):
            return None, None, None
        if any(value is not None for value in images.values()):
            options = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss, **images}
            args = (model, input_ids, attention_mask, logits_to_keep, batch_size)
            return super()._get_per_token_logps_and_entropies(*args, **options)  # type: ignore[misc]
        rows, size = len(input_ids), batch_size or len(input_ids)
        order = torch.arange(rows, device=input_ids.device)
        if rows > size and self.compacts:
            prompts = (part[:, :-logits_to_keep] for part in (input_ids, attention_mask))
            order = order_rows(*prompts, attention_mask[:, -logits_to_keep:].sum(1))
        passes = [
            self.score_rows(model, input_ids[part], attention_mask[part], logits_to_keep, compute_aux_loss)
            for part in order.split(size)
        ]
        back = order.argsort()
        columns = (None if parts[0] is None else torch.cat(parts)[back] for parts in zip(*passes, strict=True))
        self.log_probs, entropies, values = columns
        self.values = values if is_policy else self.values
        return self.log_probs, entropies, self.aux_loss

    def score_rows(
        self, model: Any, ids: Tensor, mask: Tensor, time: int, with_aux_loss: bool = False
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the log-probabilities, entropies and values of the last tokens, (batch, time); ids and mask are
        (batch, prompt and completion)."""
        config = self.accelerator.unwrap_model(model).config  # type: ignore[attr-defined]
        shared = share_prompts(ids, mask, time, config) if self.compacts and not with_aux_loss else None
        length = int(mask.sum(1).max()) if self.compacts else ids.shape[1]
        inputs, *self.places = shared or pad_right(ids, mask, time, length)
        if with_aux_loss:
            real = torch.arange(inputs["input_ids"].shape[1], device=mask.device) < mask.sum(1, keepdim=True)
            inputs |= {"attention_mask": real.long(), "output_router_logits": True}
        bonus = torch.is_grad_enabled() and bool(self.entropy_coef or self.use_adaptive_entropy)  # type: ignore[attr-defined]
        with self.accelerator.autocast(), chunked_head(equal=False, entropy_bonus=bonus):  # type: ignore[attr-defined]
            output = model(**inputs, fused_lm_head=True)
        self.aux_loss = output.aux_loss
        scores = (output.log_probs, output.entropy)
        return *(x if x is None else x[tuple(self.places)] * mask[:, -time:] for x in scores), None

    def score_tokens(self, rollout: dict[str, Any]) -> Tensor:
        """Returns the policy's log-probabilities of the completions of a rollout or of a part of it, (batch, time)."""
        args = self.args  # type: ignore[attr-defined]
        training = self.model.training  # type: ignore[attr-defined]
        return self._get_per_token_logps_and_entropies(
            self.model,  # type: ignore[attr-defined]
            torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1),
            torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1),
            rollout["completion_ids"].shape[1],
            batch_size=args.per_device_train_batch_size if training else args.per_device_eval_batch_size,
            compute_entropy=True,
        )[0]

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs  # type: ignore[has-type]
        part = super()._prepare_inputs(generation_batch)  # type: ignore[misc]
        if self._buffered_inputs is before or not self.model.training:  # type: ignore[has-type, attr-defined]
            return part
        passes = self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        parts = self._buffered_inputs
        if self.compacts and self.loss_type == "dapo" and self.top_entropy_quantile == 1:  # type: ignore[attr-defined]
            updates = [parts[first : first + passes] for first in range(0, len(parts), passes)]
            parts = [part for update in updates for part in sort_rows(update)]
        if self.scores_later and (passes < len(parts) or self.num_iterations > 1):  # type: ignore[attr-defined]
            with torch.no_grad():
                for part in parts[passes:]:
                    sampled = part.get("sampling_per_token_logps")
                    part["old_per_token_logps"] = self.score_tokens(part) if sampled is None else sampled
        self._buffered_inputs = parts
        return parts[self._step % len(parts)]  # type: ignore[has-type]

    def _generate_single_turn(self, prompt_ids: list[list[int]], images: Any, *args: Any, **kwargs: Any) -> Any:
        """Samples in llmlab's loop, in evaluation mode; vLLM and sharded weights in TRL's ways."""
        elsewhere = self.use_vllm or self.use_transformers_continuous_batching  # type: ignore[attr-defined]
        if elsewhere or images or self.is_fsdp_enabled or self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)  # type: ignore[misc]
        model = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        # in bf16 they are off those of a whole pass by more than rounding
        exact = self.scores_later and not self.args.bf16 and model.dtype == torch.float32  # type: ignore[attr-defined]
        with self.accelerator.autocast():  # type: ignore[attr-defined]  # once around all tokens, it casts weights once
            decoded = decode(model, prompt_ids, self.generation_config, log_probs=exact)  # type: ignore[attr-defined]
        return decoded.tokens, decoded.log_probs

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._prompt_tools = [row.get("tools") for row in inputs]
        return self.finish_rollout(super()._generate_and_score_completions(inputs))  # type: ignore[misc]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Weights the entropy bonus and token-mean metrics by token count; TRL averages them over forward passes."""
        loss = partial(super()._compute_loss, model, inputs)  # type: ignore[misc]
        if not self.model.training:  # type: ignore[attr-defined]
            return self.total_loss(loss, inputs)
        here, self.token_share = self._token_shares(inputs)
        metrics, bonus = self._metrics["train"], self.entropy_coef  # type: ignore[attr-defined, has-type]
        before = {name: len(metrics[name]) for name in TOKEN_MEANS & metrics.keys()}
        if not self.use_adaptive_entropy:  # type: ignore[attr-defined]
            self.entropy_coef = bonus * here
        try:
            total = self.total_loss(loss, inputs)
        finally:
            if not self.use_adaptive_entropy:  # type: ignore[attr-defined]
                self.entropy_coef = bonus
        if self.scores_later:
            inputs.setdefault("old_per_token_logps", self.log_probs.detach())
        for name in TOKEN_MEANS & metrics.keys():
            if len(metrics[name]) > before.get(name, 0):
                metrics[name][-1] *= self.token_share
        if metrics.get("entropy_coef") and not self.use_adaptive_entropy:  # type: ignore[attr-defined]
            metrics["entropy_coef"][-1] = bonus  # not that of this forward pass
        return total

    def _token_shares(self, inputs: dict[str, Any]) -> tuple[float, float]:
        """Returns the token counts of this forward pass (this process, mean of all processes) divided by the step's
        mean."""
        passes = self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        update = [inputs]
        if passes > 1:
            parts = self._buffered_inputs  # type: ignore[attr-defined]
            first = self._step - self._step % passes  # type: ignore[has-type]
            update = [parts[step % len(parts)] for step in range(first, first + passes)]
        counts = torch.stack([policy_mask(inputs).sum(), sum(policy_mask(part).sum() for part in update) / passes])
        everywhere, mean = self.accelerator.reduce(counts, reduction="mean").tolist()  # type: ignore[attr-defined]
        return counts[0].item() / max(mean, 1), everywhere / max(mean, 1)

    @contextmanager
    def without_kl_term(self) -> Iterator[None]:
        """Leaves the KL term out of TRL's loss."""
        beta, self.beta = self.beta, 0.0  # type: ignore[has-type]
        try:
            yield
        finally:
            self.beta = beta

    def token_mean(self, values: Tensor, batch: dict[str, Any]) -> Tensor:
        """Returns this micro-batch's contribution to a mean over the tokens of an optimizer step (TRL's `dapo`
        normalization)."""
        tokens = batch["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes  # type: ignore[attr-defined]
        if self.model.training:  # type: ignore[attr-defined]
            passes = self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
            tokens = tokens * passes / self.args.steps_per_generation  # type: ignore[attr-defined]
        return (values * policy_mask(batch)).sum() / tokens

    def note(self, name: str, value: float) -> None:
        """Adds a value to the metric of that name, which is logged as a mean."""
        self._metrics["train" if self.model.training else "eval"][name].append(value)  # type: ignore[attr-defined]


def adapters_are_on(model: nn.Module) -> bool:
    """Whether the adapters are enabled; disabled, the same model is the reference."""
    if not isinstance(model, PeftModel):
        return True
    layer = next(module for module in model.get_base_model().modules() if isinstance(module, BaseTunerLayer))
    return not layer.disable_adapters and layer.active_adapters == ["default"]


def has_dropout(model: nn.Module) -> bool:
    """Whether two forward passes in training mode differ."""
    rates = (m.p if isinstance(m, nn.Dropout) else getattr(m, "attention_dropout", 0) for m in model.modules())
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


@contextmanager
def reference_is(model: PreTrainedModel | None) -> Iterator[None]:
    """While active, GRPOTrainer uses this model as its reference instead of loading one."""
    from trl.trainer import grpo_trainer  # seconds, for those who use it

    original = grpo_trainer.create_model_from_path
    if model is not None:
        grpo_trainer.create_model_from_path = lambda *args, **kwargs: model
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = original


class ResumableRollouts:
    """Mixin for a GRPOTrainer: takes a whole model's frozen reference as a model, and resumes in the middle of a
    rollout."""

    judges_loss = False  # its size says nothing

    def __init__(self, *, reference: PreTrainedModel | None = None, **kwargs: Any):
        self.prepared: dict[str, Any] | None = None
        with reference_is(reference):
            super().__init__(**kwargs)

    def rollout_state(self, step: int) -> dict[str, Any]:
        """Returns the current rollout, its position and unlogged metrics, for a checkpoint."""
        waiting = {name: list(values) for name, values in self._metrics["train"].items()}  # type: ignore[attr-defined]
        return {"step": self._step, "rollout": self._buffered_inputs, "metrics": waiting, "split": self._split}

    def load_rollout_state(self, state: dict[str, Any]) -> None:
        """Restores `rollout_state`; where the batch is split otherwise now, a new rollout goes on at that step."""
        split = state.get("split", self._split)
        if split != self._split:
            self._step = state["step"] // split[1] * self._split[1]
            return
        self._step, self._buffered_inputs = state["step"], state["rollout"]
        for name, values in state["metrics"].items():
            self._metrics["train"][name].extend(values)  # type: ignore[attr-defined]

    def parts_of(self, batch: Any) -> list[Any]:
        """Returns the same prompts for each part: its rows are the next ones of the rollout."""
        # the loop sets it anew at each step
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps  # type: ignore[attr-defined]
        return [batch] * self.parts  # type: ignore[attr-defined]

    def divide(self, factor: int) -> None:
        super().divide(factor)  # type: ignore[misc]
        self._step *= factor
        self.args.steps_per_generation *= factor  # type: ignore[attr-defined]
        self.args.per_device_train_batch_size //= factor  # type: ignore[attr-defined]  # in scoring
        rollout = self._buffered_inputs
        self._buffered_inputs = rollout and [part for whole in rollout for part in split_tensor_dict(whole, factor)]

    def newest_completions(self, count: int) -> list[dict[str, Any]]:
        """Returns the first ones of TRL's logged table, with the rewards by function."""
        logs = self._logs  # type: ignore[attr-defined]
        rows = islice(zip(logs["prompt"], logs["completion"], strict=True), count)
        scores = {name: list(values) for name, values in logs["rewards"].items()}
        return [
            {"prompt": prompt, "completion": completion, "rewards": {name: scores[name][row] for name in scores}}
            for row, (prompt, completion) in enumerate(rows)
        ]

    @property
    def _split(self) -> tuple[int, int]:
        return self.args.world_size, self.args.gradient_accumulation_steps * self.parts  # type: ignore[attr-defined]

    def set_logged_advantages(self, advantages: Tensor) -> None:
        """Sets the advantages in TRL's logged table of completions."""
        self._logs["advantages"].extend(advantages.tolist())  # type: ignore[attr-defined]

    def estimated_from(self, batch: Any) -> dict[str, Tensor]:
        """Returns the model inputs of Sophia's Hessian estimate: the next micro-batch, labelled at the policy's
        tokens."""
        self.model.train()  # type: ignore[attr-defined]  # as the step will: in evaluation it samples otherwise
        part = self._prepare_inputs(batch)
        self.prepared = part  # the training step reuses these inputs instead of sampling again
        ids = torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1)
        scored = torch.cat([torch.zeros_like(part["prompt_mask"]), policy_mask(part)], dim=1)
        return {
            "input_ids": ids,
            "attention_mask": torch.cat([part["prompt_mask"], part["completion_mask"]], dim=1),
            "labels": ids.masked_fill(scored == 0, -100),
        }

    def _generate(self, prompts: list[Any]) -> Any:
        try:
            return super()._generate(prompts)  # type: ignore[misc]
        except RuntimeError as error:
            if not any(words in str(error) for words in NO_DISTRIBUTION):
                raise
            raise self.diverged("sum of a next token's probabilities", math.nan) from error  # type: ignore[attr-defined]

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if self.prepared is not None:
            part, self.prepared = self.prepared, None
            return part
        return super()._prepare_inputs(generation_batch)  # type: ignore[misc]

"""Forward passes over completions, whose rows have no padding (`layout.py`), and metrics weighted by tokens, which do
not depend on the number of forward passes of an update."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from trl import GRPOTrainer

from llmlab.runs._trl import chunked_head
from llmlab.training.online.layout import lay_out, order_rows

# metrics of TRL's that are means over the tokens of a forward pass
TOKEN_MEANS = ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


def policy_mask(batch: dict[str, Any]) -> Tensor:
    """Returns 1 for tokens that the policy wrote and 0 for padding and tool results, (batch, time)."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


class ForwardPasses(GRPOTrainer):
    """A GRPOTrainer with forward passes of its own: `log_probs`, (batch, time), are those of the last one, `values`
    those of the policy's last one with a critic, `token_share` its tokens divided by the mean of its update's."""

    critic: Any = None  # PPO's
    values: Tensor | None = None
    token_share = 1.0
    compacts = True
    """Whether forward passes leave out padding and repeated prompts, for which they look at rows."""
    scores_later = False
    """Whether the first update takes the log-probabilities of its own forward pass as those of the policy that
    sampled, so that they are computed beforehand for later updates alone."""

    def score_tokens(self, rollout: dict[str, Any]) -> Tensor:
        """Returns the policy's log-probabilities of the completions of a rollout or of a part of it, (batch, time)."""
        args, new = self.args, rollout["completion_ids"].shape[1]
        ids, mask = (torch.cat([rollout[f"prompt_{x}"], rollout[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        score = self._get_per_token_logps_and_entropies
        return score(self.model, ids, mask, new, batch_size=size, compute_entropy=True)[0]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,  # none: a tokenizer encodes text alone
    ) -> Any:
        """Returns what TRL's does, from passes over rows of similar length, where there are several; nothing of the
        policy that sampled, where `scores_later`."""
        is_policy = model is not self.ref_model and adapters_are_on(self.policy)
        if is_policy and self.scores_later and not (compute_entropy or torch.is_grad_enabled()):
            return None, None, None
        rows, size = len(input_ids), batch_size or len(input_ids)
        order = torch.arange(rows, device=input_ids.device)
        if rows > size and self.compacts:
            prompts = (part[:, :-logits_to_keep] for part in (input_ids, attention_mask))
            order = order_rows(*prompts, attention_mask[:, -logits_to_keep:].sum(1))
        score = partial(self.score_rows, model, new=logits_to_keep, is_policy=is_policy, experts=compute_aux_loss)
        passes = [score(input_ids[part], attention_mask[part]) for part in order.split(size)]
        columns = [torch.cat(parts)[order.argsort()] for parts in zip(*passes, strict=True)]
        self.log_probs, entropies, values, *_ = (*columns, None, None)  # a reference has no entropies
        self.values = self.values if values is None else values
        return self.log_probs, entropies, self.aux_loss

    def score_rows(
        self, model: Any, ids: Tensor, mask: Tensor, *, new: int, is_policy: bool, experts: bool
    ) -> list[Tensor]:
        """Returns the log-probabilities, entropies and values of the new tokens, (batch, new); ids and mask are
        (batch, prompt and new)."""
        config = (self.reference if model is self.ref_model else self.policy).config
        inputs, *places = lay_out(ids, mask, new, config, compact=self.compacts, experts=experts)
        bonus = torch.is_grad_enabled() and bool(self.entropy_coef or self.use_adaptive_entropy)
        collector = self.critic.collect_values() if self.critic and is_policy else nullcontext(())
        with self.accelerator.autocast(), chunked_head(equal=False, entropy_bonus=bonus), collector as values:
            output = model(**inputs, fused_lm_head=True)
        self.aux_loss = output.aux_loss
        scores = (output.log_probs, output.entropy, *values)  # a state's value is that of the token before the action
        return [x[tuple(places)] * mask[:, -new:] for x in scores if x is not None]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Weights the entropy bonus and token-mean metrics by token count; TRL averages them over forward passes."""
        if not self.model.training:
            self.token_share = 1.0
            return super()._compute_loss(model, inputs)
        here, self.token_share = self._token_shares(inputs)
        metrics, bonus = self._metrics["train"], self.entropy_coef
        before = {name: len(metrics.get(name, ())) for name in TOKEN_MEANS}
        with attributes(self, **({} if self.use_adaptive_entropy else {"entropy_coef": bonus * here})):
            loss = super()._compute_loss(model, inputs)
        for name, count in before.items():
            if len(metrics.get(name, ())) > count:
                metrics[name][-1] *= self.token_share
        if metrics.get("entropy_coef") and not self.use_adaptive_entropy:
            metrics["entropy_coef"][-1] = bonus  # not that of this forward pass
        return loss

    def _token_shares(self, inputs: dict[str, Any]) -> tuple[float, float]:
        """Returns the token counts of this forward pass (this process, mean of all processes) divided by the step's
        mean."""
        passes, update = self.current_gradient_accumulation_steps, [inputs]
        if passes > 1:
            parts, first = self._buffered_inputs, self._step - self._step % passes
            update = [parts[step % len(parts)] for step in range(first, first + passes)]
        counts = torch.stack([policy_mask(inputs).sum(), sum(policy_mask(part).sum() for part in update) / passes])
        everywhere, mean = self.accelerator.reduce(counts, reduction="mean").tolist()
        return counts[0].item() / max(mean, 1), everywhere / max(mean, 1)

    def token_mean(self, values: Tensor, batch: dict[str, Any]) -> Tensor:
        """Returns this micro-batch's contribution to a mean over the tokens of an optimizer step (TRL's `dapo`
        normalization)."""
        tokens = batch["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if self.model.training:
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return (values * policy_mask(batch)).sum() / tokens


@contextmanager
def attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Sets attributes within."""
    before = {name: getattr(owner, name) for name in values}
    vars(owner).update(values)
    try:
        yield
    finally:
        vars(owner).update(before)


def adapters_are_on(model: nn.Module) -> bool:
    """Whether the adapters are enabled; disabled, the same model is the reference."""
    if not isinstance(model, PeftModel):
        return True
    layer = next(module for module in model.get_base_model().modules() if isinstance(module, BaseTunerLayer))
    return not layer.disable_adapters and layer.active_adapters == ["default"]


def dropout_rates(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yields modules with dropout and the name of its rate; `attention_dropout` is Transformers' everywhere."""
    for module in model.modules():
        name = "p" if isinstance(module, nn.Dropout) else "attention_dropout"
        rate = getattr(module, name, None)
        if isinstance(rate, float) and rate > 0:
            yield module, name

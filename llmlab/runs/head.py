"""Log-probabilities of given tokens, computed chunk by chunk with the output head's product, for TRL's losses on CPUs.

The operator is that of pretraining, `llmlab.model.loss`; here each token's log-probability has a gradient of its own.
"""

from typing import Any

import torch
from torch import Tensor

from llmlab.model.loss import _operator as linear_cross_entropy


class TokenLogProbs(torch.autograd.Function):
    """Log-probabilities of targets, (tokens,), and their statistics without gradient, (tokens, 4).

    Where the head is frozen, or `equal` says that all tokens will have the same gradient, gradients are computed with
    the logits; else the backward pass computes the logits again, knowing each token's.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, equal: bool, statistics: bool
    ) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad[:2]
        ctx.dtype, ctx.at_once = dtype, equal or not needs[1]
        flags = needs if ctx.at_once else (False, False)
        _, grad_hidden, grad_weight, values = linear_cross_entropy(
            hidden, weight, targets, dtype, *flags, None, statistics
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(values)
        ctx.save_for_backward(hidden, weight, targets, grad_hidden, grad_weight)
        return -values[:, 0], values

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, targets, grad_hidden, grad_weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if grad is None or not any(needs):
            return (None,) * 6
        if ctx.at_once and (not needs[1] or bool((grad == grad[:1]).all())):
            grad_hidden = grad_hidden * -grad[:, None].to(grad_hidden.dtype)
            grad_weight = grad_weight.mul_(-grad[:1].sum()) if needs[1] else None  # in place: it is large
        else:
            _, grad_hidden, grad_weight, _ = linear_cross_entropy(
                hidden, weight, targets, ctx.dtype, *needs, -grad, False
            )
        return grad_hidden if needs[0] else None, grad_weight if needs[1] else None, None, None, None, None

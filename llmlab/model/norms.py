"""RMSNorm for training on CPUs: what autograd makes of its formula takes several times as long as its backward pass.

This file is saved beside the weights and needs torch and Transformers alone.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class RMSNorm(LlamaRMSNorm):
    """Llama's RMSNorm, with a backward pass of its own on CPUs."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (..., hidden) in and out
        eager = hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()
        if eager and torch.is_grad_enabled():
            return _Normalize.apply(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


class _Normalize(torch.autograd.Function):
    """Llama's formula; its gradient is layer norm's at a mean of 0, plus mean(grad * weight) * scale, which that takes
    off. Not for torch.func, double backward and forward-mode differentiation."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        size, grad, wide_weight = weight.numel(), grad.float(), weight.float()
        needs = [*ctx.needs_input_grad[:2], False]
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x.float(), [size], torch.zeros_like(scale), scale, wide_weight, None, needs
        )
        if needs[0]:
            grad_x = grad_x.add_((grad @ wide_weight)[..., None] * scale / size).to(x.dtype)
        return grad_x, grad_weight.to(weight.dtype) if needs[1] else None, None


def use_fast_norms(model: nn.Module) -> None:
    """Replaces those norms of a Transformers model on a CPU whose code is Llama's under another class."""
    for parent in [*model.modules()]:
        for name, norm in parent.named_children():
            if type(norm).__name__.endswith("RMSNorm") and _runs_llamas_code(type(norm)) and norm.weight.is_cpu:
                fast = RMSNorm(norm.weight.numel(), norm.variance_epsilon)
                fast.weight = norm.weight
                setattr(parent, name, fast.train(norm.training))


def _runs_llamas_code(kind: type[nn.Module]) -> bool:
    """Whether a class computes what LlamaRMSNorm does: others add 1 to their weights, or have a gate."""
    code, llamas = (each.forward.__code__ for each in (kind, LlamaRMSNorm))
    return all(getattr(code, part) == getattr(llamas, part) for part in ("co_code", "co_names", "co_consts"))

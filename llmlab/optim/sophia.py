"""Sophia with the Gauss-Newton-Bartlett estimate of the Hessian's diagonal (Liu et al. 2023, arXiv:2305.14342).

The estimate needs first derivatives only, of a loss that is a log-likelihood: of the next token, or of a preference.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


class Sophia(Optimizer):
    """Momentum preconditioned by a moving average of the Hessian's diagonal, with element-wise clipping.

    With gradient g, momentum m and Hessian diagonal h, `m <- beta1 m + (1 - beta1) g` at every step,
    `h <- beta2 h + (1 - beta2) estimate` at every `update_every`-th, and after decoupled weight decay
    `parameter <- parameter - lr * clip(m / max(rho h, eps), -1, 1)`: the paper's algorithm 3, where rho is its gamma.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        update_every: int = 10,
    ):
        # steps are counted in the groups, so that a resumed run estimates at the same steps
        schedule = {"update_every": update_every, "steps": 0, "next_estimate": 0}
        rates = {"lr": lr, "betas": betas, "rho": rho, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, rates | schedule)

    @torch.no_grad()
    def update_hessian(self) -> None:
        """Updates the moving average of the Hessian's diagonal by the squares of the current gradients."""
        for group in self.param_groups:
            decay = group["betas"][1]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    hessian = self._state_of(parameter)["hessian"]
                    hessian.mul_(decay).addcmul_(parameter.grad, parameter.grad, value=1 - decay)
            group["next_estimate"] = group["steps"] + group["update_every"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, decay = group["lr"], group["betas"][0]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self._state_of(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - decay)
                curvature = (state["hessian"] * group["rho"]).clamp_(min=group["eps"])
                update = torch.div(momentum, curvature, out=curvature).clamp_(-1, 1)
                parameter.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr)
            group["steps"] += 1
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
            state["hessian"] = torch.zeros_like(parameter)
        return state


def next_token_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Returns the logits, (B, vocabulary), of the batch's tokens, those with label -100 (else mask 0) left out."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    logits = model(**inputs, use_cache=False).logits[:, :-1]  # (batch, time - 1, vocabulary)
    if "labels" in batch:
        return logits[batch["labels"][:, 1:] != -100]
    return logits[batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[:, 1:] != 0]


def estimate_hessian(
    model: nn.Module,
    batch: dict[str, Tensor],
    optimizer: Sophia,
    generator: torch.Generator | None = None,
    predict: Callable[[nn.Module, dict[str, Tensor]], Tensor] = next_token_logits,
) -> None:
    """Updates Sophia's Hessian diagonal from one batch, by a forward and a backward pass of its own.

    Labels are sampled from the model's own prediction for each of the batch's B examples; with g the gradient of the
    mean loss over them, `B * g^2` is an unbiased estimate of the Gauss-Newton diagonal.  It is computed as the square
    of the gradient of the *summed* loss over sqrt(B), with B counted over all processes.  `predict` returns logits,
    (B, classes); the generator is on the model's device, and another one in each process.
    """
    if isinstance(model, DistributedDataParallel) and not model.require_backward_grad_sync:
        raise RuntimeError("estimate_hessian must run outside no_sync()")
    if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
        raise RuntimeError("estimate_hessian must run between zero_grad() and the next backward()")
    logits = predict(model, batch).float()  # (B, classes)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(-1)  # (B,)

    examples, processes = torch.tensor(len(labels), device=labels.device), 1
    if dist.is_initialized():
        processes = dist.get_world_size()
        dist.all_reduce(examples)
    # data parallelism averages gradients over the processes; the factor turns that back into their sum
    loss = cross_entropy(logits, labels, reduction="sum") * processes / examples.sqrt()
    loss.backward()
    optimizer.update_hessian()
    optimizer.zero_grad()


def estimate_is_due(optimizer: Optimizer | None) -> bool:
    """Whether the optimizer, possibly wrapped by Accelerate, is a Sophia that needs an estimate before it steps."""
    sophia = getattr(optimizer, "optimizer", optimizer)
    return isinstance(sophia, Sophia) and sophia.param_groups[0]["steps"] >= sophia.param_groups[0]["next_estimate"]


def estimate_hessian_if_due(
    model: nn.Module,
    batch: dict[str, Tensor],
    optimizer: Optimizer,
    seed: int,
    predict: Callable[[nn.Module, dict[str, Tensor]], Tensor] = next_token_logits,
) -> None:
    """Runs `estimate_hessian` where it is due; labels depend on seed, step and process alone."""
    if not estimate_is_due(optimizer):
        return
    sophia: Sophia = getattr(optimizer, "optimizer", optimizer)
    process, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    generator = torch.Generator(batch["input_ids"].device)
    generator.manual_seed(seed + sophia.param_groups[0]["steps"] * processes + process)
    estimate_hessian(model, batch, sophia, generator, predict)

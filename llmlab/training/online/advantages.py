"""The formulas of PPO on tokens: rewards with a KL penalty, generalized advantage estimation, whitening, value loss.

Pure functions of tensors, (batch, time) where nothing else is said; the clipped policy loss is TRL's. A mask is 1 for
tokens that the policy wrote, and 0 for padding and for what tools wrote, which every function here skips.

Source: arXiv:1707.06347 (PPO), arXiv:1506.02438 (GAE), arXiv:1909.08593 (KL in the reward, whitening).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Sum = Callable[[Tensor], Tensor]
"""Returns sums over processes."""


def kl_penalty(log_probs: Tensor, reference: Tensor, kind: Literal["kl", "abs"] = "kl") -> Tensor:
    """Returns the KL penalty of each token before its coefficient, from log-probabilities of the policy that sampled
    and the reference: with `kl` their difference, an unbiased estimate of the divergence, with `abs` its size.

    Source: arXiv:1909.08593, equation 2.
    """
    ratio = log_probs - reference
    return ratio.abs() if kind == "abs" else ratio


def k3(log_probs: Tensor, other: Tensor) -> Tensor:
    """Returns the k3 estimate of KL(sampled || other) at each token, unbiased and never negative: exp(r) - 1 - r with
    the log-ratio r = other - sampled, from log-probabilities under the distribution that sampled and the other one."""
    ratio = other - log_probs
    return (torch.expm1(ratio) - ratio).clamp(min=0)  # clamp rounding errors


def token_rewards(scores: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """Returns the reward of each token: minus its KL penalty (times its coefficient), and at the last token that the
    policy wrote plus the score of the completion, (batch,)."""
    after = mask.flip(1).cumsum(1).flip(1)  # policy tokens from here to the end
    return mask * (after == 1) * scores[:, None] - penalties * mask


def per_turn(mask: Tensor, factor: float) -> Tensor:
    """Returns a discount that applies once per turn: the factor at each turn's last token, 1 elsewhere. A turn is an
    unbroken run of tokens that the policy wrote. As `gamma` and `lam` of `gae` this makes a turn one step of a
    tool-using episode: per-token discounting would vanish over hundreds of tokens."""
    ends = mask * (1 - torch.nn.functional.pad(mask[:, 1:], (0, 1)))
    return torch.where(ends.bool(), factor, 1.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float | Tensor, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Returns advantages and returns of the policy's tokens, 0 elsewhere: tool tokens are no time step.

    With t' the next token that the policy wrote (and a value of 0 after the last one),
    `A_t = r_t + gamma V_t' - V_t + gamma lam A_t'`, and the return is `A_t + V_t`.

    Args:
        rewards: of each token.
        values: of the state in which each token was chosen.
        mask: of the policy's tokens.
        gamma: discount from a token to the next, one number or one each.
        lam: 0 is one-step TD (biased by the critic), 1 is Monte Carlo returns; one number or one each.

    Source: arXiv:1506.02438, equation 16.
    """
    is_policy = mask.bool()
    gammas, lams = torch.ones_like(values) * gamma, torch.ones_like(values) * lam
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (batch,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gammas[:, t] * next_value - values[:, t]
        advantage = delta + gammas[:, t] * lams[:, t] * next_advantage
        advantages[:, t] = torch.where(is_policy[:, t], advantage, 0.0)
        next_value = torch.where(is_policy[:, t], values[:, t], next_value)
        next_advantage = torch.where(is_policy[:, t], advantage, next_advantage)
    return advantages, torch.where(is_policy, advantages + values, 0.0)


def center(x: Tensor, mask: Tensor, sum_over_processes: Sum = lambda sums: sums) -> tuple[Tensor, Tensor]:
    """Returns x minus its mean over the masked tokens of all processes, and its variance."""
    count, total = sum_over_processes(torch.stack([mask.sum(), (x * mask).sum()]).to(x.dtype))
    centered = (x - total / count.clamp(min=1)) * mask
    return centered, sum_over_processes(centered.square().sum()) / count.clamp(min=1)


def whiten(x: Tensor, mask: Tensor, sum_over_processes: Sum = lambda sums: sums) -> Tensor:
    """Returns x shifted and scaled to mean 0 and variance 1 over the masked tokens of all processes, 0 elsewhere."""
    centered, variance = center(x, mask, sum_over_processes)
    return centered * torch.rsqrt(variance + 1e-8)


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, sum_over_processes: Sum = lambda sums: sums
) -> float:
    """Returns the share of the returns' variance that the values predict: 1 is all, 0 no better than their mean."""
    residual, total = (center(x, mask, sum_over_processes)[1] for x in (returns - values, returns))
    return 1 - (residual / total.clamp(min=1e-8)).item()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Returns the loss of each value, and a mask of where it was clipped.

    Half the squared error; with `clip` the larger one of that and of the clipped value's error, which stays within
    `clip` of the old value, that at sampling: a value that already moved that far towards its return gets no gradient.

    Source: arXiv:1707.06347's reference code (OpenAI baselines, ppo2).
    """
    error = (values - returns).square()
    if clip is None:
        return 0.5 * error, torch.zeros_like(error)
    clipped_error = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    return 0.5 * torch.maximum(error, clipped_error), (clipped_error > error).to(error.dtype)

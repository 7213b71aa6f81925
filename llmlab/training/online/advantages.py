"""The formulas of PPO on tokens: rewards with a KL penalty, generalized advantage estimation, whitening, value loss.

Pure functions of tensors; the clipped policy loss is TRL's. A mask is 1 for tokens that the policy wrote, and 0 for
padding and for what tools wrote, which every function here skips.

Source: arXiv:1707.06347 (PPO), arXiv:1506.02438 (GAE), arXiv:1909.08593 (KL in the reward, whitening).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


def kl_penalty(log_probs: Tensor, reference: Tensor, kind: Literal["kl", "abs"] = "kl") -> Tensor:
    """Returns the KL penalty of each token, (batch, time), before its coefficient.

    Args:
        log_probs: of the policy that sampled, (batch, time).
        reference: log-probabilities of the same tokens under the reference, (batch, time).
        kind: `kl` is the log-ratio, an unbiased estimate of the divergence; `abs` its absolute value, never negative.

    Source: arXiv:1909.08593, equation 2.
    """
    ratio = log_probs - reference
    return ratio.abs() if kind == "abs" else ratio


def k3(log_probs: Tensor, other: Tensor) -> Tensor:
    """Returns the k3 estimate of KL(sampled || other) at each token, (batch, time): unbiased and never negative.

    With r the log-ratio other / sampled it is exp(r) - 1 - r.

    Args:
        log_probs: of the distribution that sampled, (batch, time).
        other: log-probabilities of the same tokens under the other one, (batch, time).
    """
    ratio = other - log_probs
    return (torch.expm1(ratio) - ratio).clamp(min=0)  # clamp rounding errors


def token_rewards(scores: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """Returns the reward of each token, (batch, time): minus its penalty, plus the score at the policy's last token.

    Args:
        scores: of completions, (batch,).
        penalties: KL penalties times their coefficient, (batch, time).
        mask: (batch, time).
    """
    return last_policy_token(mask) * scores[:, None] - penalties * mask


def last_policy_token(mask: Tensor) -> Tensor:
    """Returns 1 at the last token of each row that the policy wrote, (batch, time); nowhere in a row with none."""
    after = mask.flip(1).cumsum(1).flip(1)  # (batch, time): policy tokens from here to the end
    return mask * (after == 1)


def per_turn(mask: Tensor, factor: float) -> Tensor:
    """Returns a discount that applies once per turn: the factor at each turn's last token, 1 elsewhere, (batch, time).

    A turn is an unbroken run of tokens that the policy wrote. As `gamma` and `lam` of `gae` this makes a turn one step
    of a tool-using episode: per-token discounting would vanish over hundreds of tokens.
    """
    ends = mask * (1 - torch.nn.functional.pad(mask[:, 1:], (0, 1)))
    return torch.where(ends.bool(), factor, 1.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float | Tensor, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Returns advantages and returns of the policy's tokens, (batch, time), 0 elsewhere: tool tokens are no time step.

    With t' the next token that the policy wrote (and a value of 0 after the last one),
    `A_t = r_t + gamma V_t' - V_t + gamma lam A_t'`, and the return is `A_t + V_t`.

    Args:
        rewards: (batch, time).
        values: of the state in which each token was chosen, (batch, time).
        mask: (batch, time).
        gamma: discount from a token to the next, a number or (batch, time).
        lam: 0 is one-step TD (biased by the critic), 1 is Monte Carlo returns; a number or (batch, time).

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


def center(
    x: Tensor, mask: Tensor, sum_over_processes: Callable[[Tensor], Tensor] = lambda sums: sums
) -> tuple[Tensor, Tensor]:
    """Returns x minus its mean over the masked tokens of all processes, (batch, time), and its variance."""
    count, total = sum_over_processes(torch.stack([mask.sum(), (x * mask).sum()]).to(x.dtype))
    centered = (x - total / count.clamp(min=1)) * mask
    return centered, sum_over_processes(centered.square().sum()) / count.clamp(min=1)


def whiten(x: Tensor, mask: Tensor, sum_over_processes: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
    """Returns x shifted and scaled to mean 0 and variance 1 over the masked tokens, 0 elsewhere; as `center`."""
    centered, variance = center(x, mask, sum_over_processes)
    return centered * torch.rsqrt(variance + 1e-8)


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, sum_over_processes: Callable[[Tensor], Tensor] = lambda sums: sums
) -> float:
    """Returns the share of the returns' variance that the values predict: 1 is all, 0 no better than their mean."""
    residual, total = (
        center(returns - values, mask, sum_over_processes)[1],
        center(returns, mask, sum_over_processes)[1],
    )
    return 1 - (residual / total.clamp(min=1e-8)).item()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Returns the loss of each value, (batch, time), and a mask of where it was clipped.

    Half the squared error; with `clip` the larger one of that and of the clipped value's error, which stays within
    `clip` of the value at sampling: a value that already moved that far towards its return gets no gradient.

    Args:
        values: now, (batch, time).
        old_values: at sampling, (batch, time).
        returns: (batch, time).
        clip: largest change of a value; None does not clip.

    Source: arXiv:1707.06347's reference code (OpenAI baselines, ppo2).
    """
    error = (values - returns).square()
    if clip is None:
        return 0.5 * error, torch.zeros_like(error)
    clipped_error = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    return 0.5 * torch.maximum(error, clipped_error), (clipped_error > error).to(error.dtype)

"""Causal attention for training on CPUs under torch.compile, where its kernels beat sdpa's two- to threefold.

An attention implementation named `block_causal` in Transformers' interface.  It takes over only what it is right and
faster for; everything else (masks, dropout, caches, biases, other devices, no compiler) goes to sdpa.
"""

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "block_causal"

# Queries go by blocks, each against the keys up to its own end.  Smaller blocks waste less on what the causal mask
# hides; more blocks make the compiled graph longer.
BLOCK = 128
MOST_BLOCKS = 16


def block_causal_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Mixes values by causal attention, with the arguments and results of Transformers' attention functions.

    Args:
        query: (batch, heads, time, head_dim).
        key: (batch, key/value heads, time, head_dim).
        value: (batch, key/value heads, time, head_dim).

    Returns:
        The mixed values, (batch, time, heads, head_dim), and None.
    """
    causal = module.is_causal if kwargs.get("is_causal") is None else kwargs["is_causal"]
    plain = attention_mask is None and dropout == 0.0 and kwargs.get("position_bias") is None
    fresh = query.shape[2] == key.shape[2] > 1
    if not (causal and plain and fresh and query.device.type == "cpu" and torch.compiler.is_compiling()):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    mixed = BlockCausalAttention.apply(query.to(value.dtype), key.to(value.dtype), value, scaling)
    return mixed.transpose(1, 2), None


def register() -> None:
    """Makes Transformers know the implementation; may be called again."""
    AttentionInterface.register(NAME, block_causal_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


class BlockCausalAttention(torch.autograd.Function):
    """Exact causal attention; as in FlashAttention the backward pass computes the scores again.

    Source: Dao et al. 2022, arXiv 2205.14135, for what is kept and the form of the gradients.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        mixed, log_sums = [], []
        for start, end in _blocks(query.shape[2]):
            rows = _grouped(query, key, start, end)  # (batch, kv heads, group * block, head_dim)
            scores = rows @ key[:, :, :end].transpose(2, 3)  # (batch, kv heads, group * block, end)
            scores = scores.unflatten(2, (-1, end - start)).to(wide) * scaling
            scores = torch.where(_visible(start, end), scores, float("-inf"))
            largest = scores.amax(-1, keepdim=True)
            shares = (scores - largest).exp()
            total = shares.sum(-1, keepdim=True)
            product = shares.to(value.dtype).flatten(2, 3) @ value[:, :, :end]
            mixed.append((product.unflatten(2, (-1, end - start)).to(wide) / total).to(value.dtype))
            log_sums.append(largest + total.log())
        mixed = torch.cat(mixed, 3).flatten(1, 2)  # (batch, heads, time, head_dim)
        ctx.save_for_backward(query, key, value, mixed, torch.cat(log_sums, 3))
        ctx.scaling = scaling
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # grad: (batch, heads, time, dim)
        query, key, value, mixed, log_sums = ctx.saved_tensors
        wide = log_sums.dtype
        blocks = _blocks(query.shape[2])
        groups = (key.shape[1], -1)
        log_sums = log_sums[..., 0]  # (batch, kv heads, group, time)
        correction = (grad.to(wide) * mixed.to(wide)).sum(-1).unflatten(1, groups)
        grad_query, grad_keys, grad_values = [], [], []
        for start, end in blocks:
            # Scores stand transposed, (batch, kv heads, end, group, block): were they the forward pass's, the
            # compiler would keep those instead, in memory that grows with the square of the length.
            rows, grad_rows = _grouped(query, key, start, end), _grouped(grad, key, start, end)
            by_group = (-1, end - start)
            scores = (key[:, :, :end] @ rows.transpose(2, 3)).unflatten(3, by_group).to(wide) * ctx.scaling
            shares = (scores - log_sums[:, :, None, :, start:end]).exp()
            shares = torch.where(_visible(start, end).t()[:, None], shares, 0.0)
            grad_shares = (value[:, :, :end] @ grad_rows.transpose(2, 3)).unflatten(3, by_group).to(wide)
            grad_scores = shares * (grad_shares - correction[:, :, None, :, start:end]) * ctx.scaling
            grad_scores = grad_scores.to(query.dtype).flatten(3)
            grad_values.append(shares.to(query.dtype).flatten(3) @ grad_rows)  # (batch, kv heads, end, head_dim)
            grad_keys.append(grad_scores @ rows)
            grad_query.append((grad_scores.transpose(2, 3) @ key[:, :, :end]).unflatten(2, by_group))
        grad_query = torch.cat(grad_query, 3).flatten(1, 2)
        return grad_query, _summed(grad_keys, blocks, wide), _summed(grad_values, blocks, wide), None


def _blocks(length: int) -> list[tuple[int, int]]:
    block = max(BLOCK, -(-length // MOST_BLOCKS))
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _grouped(states: torch.Tensor, key: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Returns a block's rows, those of all heads that share a key head in one: (batch, kv heads, rows, head_dim)."""
    return states.unflatten(1, (key.shape[1], -1))[:, :, :, start:end].flatten(2, 3)


def _visible(start: int, end: int) -> torch.Tensor:
    """Returns which keys, (end,), each query of the block sees: (block, end)."""
    return torch.arange(end) <= torch.arange(start, end)[:, None]


def _summed(parts: list[torch.Tensor], blocks: list[tuple[int, int]], wide: torch.dtype) -> torch.Tensor:
    """Adds up what each block of queries gave to the keys before its end: (batch, kv heads, time, head_dim)."""
    columns = [
        sum(part[:, :, start:end].to(wide) for part in parts[number:]) for number, (start, end) in enumerate(blocks)
    ]
    return torch.cat(columns, 2).to(parts[0].dtype)

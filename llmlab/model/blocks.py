"""Causal attention in blocks of queries, for training in bf16 on a CPU, where torch's own product is half as fast.

Keys and values are never repeated for their query heads, no block looks at keys that lie after it, and the backward
pass computes the weights again, so that memory stays linear in the length.  Padding, windows and dropout are left to
Transformers' interface.  This file travels beside the weights and needs torch alone.
"""

import re
from typing import Any

import torch

# Each copy of this file registers operators of its own: torch drops those that were registered before under a name.
NAMESPACE = re.sub(r"\W", "_", __name__)

BLOCK = 64  # queries: their weights over all keys still fit the cache


def attend_in_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Returns what causal attention mixes of the values.

    Args:
        query: (batch, heads, time, dim).
        key: (batch, key/value heads, time, dim); each serves heads / key/value heads consecutive query heads.
        value: as the keys.
        scaling: factor of the scores.

    Returns:
        (batch, time, heads, dim).
    """
    return _forward(query, key, value, scaling)


def mix(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """The forward pass; see `attend_in_blocks`."""
    batch, heads, time, dim = query.shape
    groups = heads // key.shape[1]
    keys, values = key.reshape(-1, time, dim), value.reshape(-1, time, dim)  # (batch * key/value heads, time, dim)
    mixed = query.new_empty(batch, time, heads, dim)
    for start in range(0, time, BLOCK):
        part = _rows(query[:, :, start : start + BLOCK] * scaling, groups)
        stop = start + part.shape[1] // groups
        weights = _weights(part, keys[:, :stop], groups)
        _place(mixed[:, start:stop], torch.bmm(weights, values[:, :stop]))
    return mixed


def differentiate(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The backward pass: gradients by query, key and value, each laid out by tokens as the projections want them.

    Args:
        gradient: by the mixed values, (batch, time, heads, dim).

    Returns:
        (batch, time, heads, dim) and twice (batch, time, key/value heads, dim).
    """
    batch, heads, time, dim = query.shape
    groups = heads // key.shape[1]
    keys, values = key.reshape(-1, time, dim), value.reshape(-1, time, dim)
    gradient = gradient.transpose(1, 2)  # (batch, heads, time, dim)
    by_query = query.new_empty(batch, time, heads, dim)
    by_key, by_value = (query.new_zeros(keys.shape, dtype=torch.float32) for _ in range(2))  # summed over blocks
    for start in range(0, time, BLOCK):
        part = _rows(query[:, :, start : start + BLOCK] * scaling, groups)
        stop = start + part.shape[1] // groups
        weights = _weights(part, keys[:, :stop], groups)
        by_mixed = _rows(gradient[:, :, start:stop], groups)
        by_value[:, :stop] += torch.bmm(weights.transpose(1, 2), by_mixed)
        by_weights = torch.bmm(by_mixed, values[:, :stop].transpose(1, 2))
        by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
        _place(by_query[:, start:stop], torch.bmm(by_scores, keys[:, :stop]) * scaling)
        by_key[:, :stop] += torch.bmm(by_scores.transpose(1, 2), part)
    by_key, by_value = (x.view(key.shape).transpose(1, 2).to(key.dtype).contiguous() for x in (by_key, by_value))
    return by_query, by_key, by_value


def _rows(block: torch.Tensor, groups: int) -> torch.Tensor:
    """Puts queries that share a key/value head below each other: (batch * key/value heads, groups * block, dim)."""
    batch, heads, length, dim = block.shape
    return block.reshape(batch * heads // groups, groups * length, dim)


def _place(target: torch.Tensor, rows: torch.Tensor) -> None:
    """Writes rows as `_rows` orders them to (batch, block, heads, dim)."""
    batch, length, heads, dim = target.shape
    target.copy_(rows.view(batch, heads, length, dim).transpose(1, 2))


def _weights(part: torch.Tensor, keys: torch.Tensor, groups: int) -> torch.Tensor:
    """Returns the last queries' weights over all keys, (batch * key/value heads, groups * block, keys)."""
    scores = torch.bmm(part, keys.transpose(1, 2))
    length = part.shape[1] // groups
    later = torch.full((length, length), float("-inf"), dtype=part.dtype, device=part.device).triu_(1)
    scores.view(-1, groups, length, keys.shape[1])[..., -length:] += later
    return torch.softmax(scores, -1)


# Operators, so that torch.compile keeps each as one node instead of unrolling the blocks.
_forward = torch.library.custom_op(f"{NAMESPACE}::attend_in_blocks", mix, mutates_args=())
_backward = torch.library.custom_op(f"{NAMESPACE}::attend_in_blocks_backward", differentiate, mutates_args=())


@_forward.register_fake
def _mixed_shape(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)


@_backward.register_fake
def _gradient_shapes(gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    return tuple(torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (query, key, key))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = _backward(gradient, *ctx.saved_tensors, ctx.scaling)
    return *(x.transpose(1, 2) for x in gradients), None


_forward.register_autograd(_differentiate, setup_context=_keep)

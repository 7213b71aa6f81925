"""Exact causal attention in blocks of queries, for CPUs, where it is faster than torch's own kernel.

Keys and values are not repeated for their query heads, no block computes scores of later keys, and the backward pass
computes the weights again, so that memory is linear in the length.  Masks, windows and dropout are left to
Transformers' interface.  This file is saved beside the weights and needs torch alone.
"""

import re
from typing import Any

import torch

# each copy of this file registers operators of its own: torch drops those that were registered before under a name
NAMESPACE = re.sub(r"\W", "_", __name__)

BLOCK = 64  # queries, whose weights over all keys fit a CPU's cache


def block_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Returns the outputs of causal attention, (batch, time, heads, dim), with a factor on its scores.

    Queries are (batch, heads, time, dim), keys and values (batch, key/value heads, time, dim), each for consecutive
    query heads. Source: Dao et al. 2022, arXiv 2205.14135, for what the backward pass computes again.
    """
    return _forward_operator(query, key, value, scaling)


def _forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    batch, heads, time, dim = query.shape
    groups = heads // key.shape[1]
    keys, values = key.reshape(-1, time, dim), value.reshape(-1, time, dim)  # (batch * key/value heads, time, dim)
    outputs = query.new_empty(batch, time, heads, dim)
    for start in range(0, time, BLOCK):
        queries = _group(query[:, :, start : start + BLOCK] * scaling, groups)
        end = start + queries.shape[1] // groups
        weights = _weights(queries, keys[:, :end], groups)
        _ungroup(torch.bmm(weights, values[:, :end]), outputs[:, start:end])
    return outputs


def _backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients by query, key and value, each (batch, time, heads, dim) like those of the outputs."""
    batch, heads, time, dim = query.shape
    groups = heads // key.shape[1]
    keys, values = key.reshape(-1, time, dim), value.reshape(-1, time, dim)
    grad = grad.transpose(1, 2)  # (batch, heads, time, dim)
    grad_query = query.new_empty(batch, time, heads, dim)
    grad_key, grad_value = (query.new_zeros(keys.shape, dtype=torch.float32) for _ in range(2))  # summed over blocks
    for start in range(0, time, BLOCK):
        queries = _group(query[:, :, start : start + BLOCK] * scaling, groups)
        end = start + queries.shape[1] // groups
        weights = _weights(queries, keys[:, :end], groups)
        grad_outputs = _group(grad[:, :, start:end], groups)
        grad_value[:, :end] += torch.bmm(weights.transpose(1, 2), grad_outputs)
        grad_weights = torch.bmm(grad_outputs, values[:, :end].transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        _ungroup(torch.bmm(grad_scores, keys[:, :end]) * scaling, grad_query[:, start:end])
        grad_key[:, :end] += torch.bmm(grad_scores.transpose(1, 2), queries)
    return grad_query, *(x.view(key.shape).transpose(1, 2).to(key.dtype).contiguous() for x in (grad_key, grad_value))


def _group(block: torch.Tensor, groups: int) -> torch.Tensor:
    """Stacks (batch, heads, block, dim) by shared key/value head: (batch * key/value heads, groups * block, dim)."""
    batch, heads, length, dim = block.shape
    return block.reshape(batch * heads // groups, groups * length, dim)


def _ungroup(rows: torch.Tensor, target: torch.Tensor) -> None:
    """Writes what `_group` stacked to (batch, block, heads, dim)."""
    batch, length, heads, dim = target.shape
    target.copy_(rows.view(batch, heads, length, dim).transpose(1, 2))


def _weights(queries: torch.Tensor, keys: torch.Tensor, groups: int) -> torch.Tensor:
    """Returns the weights of the last queries over all keys, (batch * key/value heads, groups * block, keys)."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    length = queries.shape[1] // groups
    later = torch.full((length, length), float("-inf"), dtype=scores.dtype, device=scores.device).triu_(1)
    scores.view(-1, groups, length, keys.shape[1])[..., -length:] += later
    return torch.softmax(scores, -1)


def attention_cost(*args: Any) -> tuple[int, int]:
    """Returns the FLOPs of an operator with these arguments (all keys, as if not causal), and its scratch bytes."""
    *_, key, _, _ = args
    query = args[-4]
    batch, heads, time, dim = query.shape
    backward = len(args) == 5
    block = batch * heads * min(BLOCK, time) * time * query.element_size()
    scratch = 3 * block + 8 * key.numel() if backward else 2 * block
    return (10 if backward else 4) * batch * heads * time * time * dim, scratch


# operators, so that torch.compile keeps each as one node instead of unrolling the blocks
_forward_operator = torch.library.custom_op(f"{NAMESPACE}::block_attention", _forward, mutates_args=())
_backward_operator = torch.library.custom_op(f"{NAMESPACE}::block_attention_backward", _backward, mutates_args=())


@_forward_operator.register_fake
def _fake_forward(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)


@_backward_operator.register_fake
def _fake_backward(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (query, key, key))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = _backward_operator(grad, *ctx.saved_tensors, ctx.scaling)
    return *(x.transpose(1, 2) for x in gradients), None


_forward_operator.register_autograd(_differentiate, setup_context=_setup_context)

"""The loss of the next token without all logits at once, which dwarf the model where the vocabulary is large.

Tokens go through the head in pieces, and each piece's gradients are taken while its logits are still there, so that
the backward pass only scales them.  This file travels beside the weights and needs torch alone.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F

# Each copy of this file registers operators of its own: torch drops those that were registered before under a name.
NAMESPACE = re.sub(r"\W", "_", __name__)

# A piece has at least so many tokens: the head's gradient is added up once a piece, which few tokens do not earn back,
# the less so the faster the device multiplies.
CPU_PIECE_TOKENS = 512
PIECE_TOKENS = 2048
# It has more while its logits stay this small.
PIECE_BYTES = 2**26
# The softmax takes so many elements at a time, that their wide copies stay in a CPU's cache, and small elsewhere.
CPU_SOFTMAX_ELEMENTS = 2**20
SOFTMAX_ELEMENTS = 2**25


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Returns the cross entropy of the next tokens, with the head's product in it.

    Products are in autocast's type where it is on, else in the weight's; softmax and sums in fp32.  The backward pass
    scales the gradients where they lie: a graph kept by `retain_graph` cannot be gone through twice.

    Args:
        hidden: last hidden states, (batch, time, hidden).
        weight: the head's, (vocabulary, hidden).
        labels: tokens, not shifted, (batch, time): a token's states are scored on the label after it.
        bias: the head's, (vocabulary,).
        num_items_in_batch: what to divide the summed loss by; None is the number of labels scored.
        ignore_index: the label that is not scored.

    Returns:
        The loss in nats, a scalar in fp32; 0 where no label is scored.
    """
    device = hidden.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
    targets = F.pad(labels[:, 1:], (0, 1), value=ignore_index).flatten().to(device)  # (batch * time,)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, *_ = _operator(hidden.flatten(0, 1), weight, bias, targets, ignore_index, dtype, *wanted)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum().clamp(min=1)
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(device)
    return loss / num_items_in_batch


def loss_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    hidden_wanted: bool,
    weight_wanted: bool,
    bias_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the summed loss, and its gradients by hidden, weight and bias: empty where not wanted.

    Args:
        hidden: (tokens, hidden).
        weight: (vocabulary, hidden).
        bias: (vocabulary,) or None.
        targets: the labels, already shifted, (tokens,).
        dtype: of the products.
    """
    wide = torch.promote_types(dtype, torch.float32)
    kept = (targets != ignore_index).nonzero()[:, 0]  # (scored,): the head is spent on these alone
    states, head, targets = hidden[kept].to(dtype), weight.to(dtype), targets[kept]
    loss, grad_weight, grad_states = hidden.new_zeros((), dtype=wide), None, torch.empty_like(states)
    grad_bias = hidden.new_zeros(len(head) if bias_wanted else 0, dtype=wide)

    least = CPU_PIECE_TOKENS if hidden.device.type == "cpu" else PIECE_TOKENS
    longest = max(least, PIECE_BYTES // (len(head) * dtype.itemsize))
    pieces = max(1, -(-len(kept) // longest))
    room = hidden.new_empty(-(-len(kept) // pieces), len(head), dtype=dtype)  # one for all: fresh pages are slow
    for part, goals, grad_part in zip(*(x.chunk(pieces) for x in (states, targets, grad_states)), strict=True):
        logits = torch.mm(part, head.t(), out=room[: len(part)])  # (piece, vocabulary)
        if bias is not None:
            logits += bias.to(dtype)
        loss += _replace_by_gradient(logits, goals, wide)
        if hidden_wanted:
            torch.mm(logits, head, out=grad_part)
        if bias_wanted:
            grad_bias += logits.sum(0, dtype=wide)
        if weight_wanted and grad_weight is None:
            product = torch.mm(logits.t(), part)  # (vocabulary, hidden)
            grad_weight = product.to(wide)
        elif weight_wanted and dtype == wide:
            grad_weight.addmm_(logits.t(), part)
        elif weight_wanted:
            grad_weight += torch.mm(logits.t(), part, out=product)

    grad_hidden = torch.zeros_like(hidden) if hidden_wanted else hidden.new_empty(0)
    if hidden_wanted:
        grad_hidden[kept] = grad_states.to(hidden.dtype)
    grad_weight = grad_weight.to(weight.dtype) if weight_wanted else weight.new_empty(0)
    return loss, grad_hidden, grad_weight, grad_bias if bias is None else grad_bias.to(bias.dtype)


def _replace_by_gradient(logits: torch.Tensor, targets: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """Returns the summed loss of logits, (tokens, vocabulary), and leaves its gradient in their place."""
    elements = CPU_SOFTMAX_ELEMENTS if logits.device.type == "cpu" else SOFTMAX_ELEMENTS
    rows = max(1, elements // logits.shape[1])
    scores, shares = logits.new_empty(2, min(rows, len(logits)), logits.shape[1], dtype=wide)
    loss = logits.new_zeros((), dtype=wide)
    for part, goals in zip(logits.split(rows), targets.split(rows), strict=True):
        score = part if part.dtype == wide else scores[: len(part)].copy_(part)
        share = torch.softmax(score, -1, out=shares[: len(part)])
        # The largest share is 1 / sum(exp(score - largest score)), and never underflows.
        log_sum = score.amax(-1) - share.amax(-1).log()  # (rows,)
        at = goals[:, None]
        loss += (log_sum - score.gather(1, at)[:, 0]).sum()
        part.copy_(share.scatter_add_(1, at, torch.full_like(at, -1, dtype=wide)))
    return loss


# An operator, so that torch.compile keeps it as one node instead of unrolling the pieces.
_operator = torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy", loss_and_gradients, mutates_args=())


@_operator.register_fake
def _shapes(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: Any,
    ignore_index: Any,
    dtype: Any,
    *wanted: bool,
) -> tuple[torch.Tensor, ...]:
    wide = torch.promote_types(dtype, torch.float32)
    bias = weight.new_empty(0, dtype=wide) if bias is None else bias
    sources = zip((hidden, weight, bias), wanted, strict=True)
    return hidden.new_empty((), dtype=wide), *(torch.empty_like(x) if w else x.new_empty(0) for x, w in sources)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # the gradients handed out are no inputs of anything
    ctx.save_for_backward(*output[1:])
    ctx.wanted = inputs[-3:]


def _scale(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    gradients = [x.mul_(grad_loss) if w else None for x, w in zip(ctx.saved_tensors, ctx.wanted, strict=True)]
    return *gradients, *[None] * 6


_operator.register_autograd(_scale, setup_context=_keep)

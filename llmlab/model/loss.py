"""Next-token cross entropy fused with the output head, so that all logits are never held at once.

Tokens go through the head in chunks, and each chunk's gradients are computed with its logits; the backward pass only
scales them.  This file is saved beside the weights and needs torch alone.
"""

import re
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F

# each copy of this file registers an operator of its own: torch drops the one that was registered before under a name
NAMESPACE = re.sub(r"\W", "_", __name__)

IGNORE_INDEX = -100
# least tokens of a chunk: the head's gradient is accumulated once a chunk, which must be worth it
CPU_CHUNK_TOKENS, CHUNK_TOKENS = 512, 2048
CPU_CHUNK_BYTES, CHUNK_BYTES = 2**27, 2**26  # of logits, up to which a chunk has more tokens
MULTIPLE = 16  # of tokens in a chunk: products of other numbers take up to a quarter longer
ADDED_ROWS = 2048  # of the head's gradient that a CPU adds at a time: the fp32 copy it makes fits the cache
CPU_SOFTMAX_ELEMENTS, SOFTMAX_ELEMENTS = 2**20, 2**25  # of fp32 copies at a time: a CPU's have to fit its cache


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
    with_tokens: bool = False,
) -> Any:
    """Returns the cross entropy of the next tokens in nats, with the output head's product in it, a scalar in fp32,
    and `with_tokens` the loss of each, (batch, time - 1), too; 0 where labels are ignored.

    Hidden states are (batch, time, hidden), the head's weight (vocabulary, hidden), labels (batch, time), not shifted.
    Products are in autocast's dtype where it is on, else in the weight's; softmax and sums in fp32. The sum is divided
    by `num_items_in_batch`, or the number of labels that count.
    The backward pass scales the gradients in place, so it cannot be repeated with `retain_graph`.
    """
    device = hidden.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten().to(device)  # (batch * time,)
    needs_grad = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    loss, _, _, token_losses = _operator(hidden.flatten(0, 1), weight, targets, dtype, *needs_grad)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORE_INDEX).sum().clamp(min=1)
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(device)
    loss = loss / num_items_in_batch
    return (loss, token_losses.detach().view(labels.shape)[:, :-1]) if with_tokens else loss


def loss_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    dtype: torch.dtype,
    hidden_needs_grad: bool,
    weight_needs_grad: bool,
    weights: torch.Tensor | None = None,
    with_statistics: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the summed loss, its gradients, empty where not needed, and of each token the loss and with statistics
    entropy, mean logit and whether the target is the likeliest token; products are in `dtype`.

    Shapes: hidden (tokens, hidden), weight (vocabulary, hidden), targets, which are shifted, and weights of their
    gradients (tokens,); of the last result (tokens, 1) or (tokens, 4).
    """
    wide = torch.promote_types(dtype, torch.float32)
    scored = (targets != IGNORE_INDEX).nonzero()[:, 0]  # (scored,)
    states, head, targets = hidden[scored].to(dtype), weight.to(dtype), targets[scored]
    loss, grad_weight, grad_states = hidden.new_zeros((), dtype=wide), None, torch.empty_like(states)
    columns = 4 if with_statistics else 1
    own, statistics = (hidden.new_zeros(len(x), columns, dtype=wide) for x in (states, hidden))
    scales = None if weights is None else weights[scored, None].to(wide)

    length = chunk_tokens(len(scored), len(head), dtype, on_cpu=hidden.device.type == "cpu")
    buffer = hidden.new_empty(min(length, len(scored)), len(head), dtype=dtype)  # reused: fresh pages are slow
    parts = (x.split(length) for x in (states, targets, grad_states, own))
    of_chunks = repeat(None) if scales is None else scales.split(length)
    for chunk, labels, grad_chunk, own_chunk, scale in zip(*parts, of_chunks, strict=False):
        logits = torch.mm(chunk, head.t(), out=buffer[: len(chunk)])  # (chunk, vocabulary)
        loss += _replace_by_gradient(logits, labels, wide, own_chunk, scale)
        if hidden_needs_grad:
            torch.mm(logits, head, out=grad_chunk)
        if weight_needs_grad and grad_weight is None:
            product = torch.mm(logits.t(), chunk)  # (vocabulary, hidden)
            grad_weight = product.to(wide)
        elif weight_needs_grad and dtype == wide:
            grad_weight.addmm_(logits.t(), chunk)
        elif weight_needs_grad:
            torch.mm(logits.t(), chunk, out=product)
            rows = ADDED_ROWS if hidden.device.type == "cpu" else len(head)
            for total, part in zip(grad_weight.split(rows), product.split(rows), strict=True):
                total += part

    grad_hidden = torch.zeros_like(hidden) if hidden_needs_grad else hidden.new_empty(0)
    if hidden_needs_grad:
        grad_hidden[scored] = grad_states.to(hidden.dtype)
    statistics[scored] = own
    grad_weight = grad_weight.to(weight.dtype) if weight_needs_grad else weight.new_empty(0)
    return loss, grad_hidden, grad_weight, statistics


def chunk_tokens(tokens: int, vocabulary: int, dtype: torch.dtype, *, on_cpu: bool) -> int:
    """Returns how many tokens go through the head at once; the last chunk may have fewer."""
    chunks = max(1, -(-tokens // _longest_chunk(vocabulary, dtype, on_cpu)))
    return MULTIPLE * max(1, -(-tokens // (chunks * MULTIPLE)))


def _longest_chunk(vocabulary: int, dtype: torch.dtype, on_cpu: bool) -> int:
    """Returns the most tokens of a chunk, before they are made a multiple."""
    least, most = (CPU_CHUNK_TOKENS, CPU_CHUNK_BYTES) if on_cpu else (CHUNK_TOKENS, CHUNK_BYTES)
    return max(least, most // (vocabulary * dtype.itemsize))


def _replace_by_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    wide: torch.dtype,
    statistics: torch.Tensor,
    scales: torch.Tensor | None,
) -> torch.Tensor:
    """Returns the summed loss of logits, (tokens, vocabulary), and overwrites them with its gradient,
    each row times its scale, (tokens, 1) or None, and `statistics`, (tokens, 1 or 4), with each token's."""
    elements = CPU_SOFTMAX_ELEMENTS if logits.device.type == "cpu" else SOFTMAX_ELEMENTS
    rows = max(1, elements // logits.shape[1])
    scores, shares = logits.new_empty(2, min(rows, len(logits)), logits.shape[1], dtype=wide)
    for start in range(0, len(logits), rows):
        here = slice(start, start + rows)
        part = logits[here]
        score = part if part.dtype == wide else scores[: len(part)].copy_(part)
        share = torch.softmax(score, -1, out=shares[: len(part)])
        largest, index = score.amax(-1), targets[here, None]
        # the largest share is 1 / sum(exp(score - largest score)), and never underflows
        log_sum = largest - share.amax(-1).log()  # (rows,)
        target = score.gather(1, index)[:, 0]
        statistics[here, 0] = log_sum - target
        if statistics.shape[1] > 1:
            statistics[here, 1] = log_sum - torch.linalg.vecdot(share, score)
            statistics[here, 2] = score.mean(-1)
            first = (target == largest).nonzero()[:, 0]  # of equal scores the first is the likeliest
            statistics[start + first, 3] = (score[first].argmax(-1) == index[first, 0]).to(wide)
        share.scatter_add_(1, index, torch.full_like(index, -1, dtype=wide))
        part.copy_(share if scales is None else share.mul_(scales[here]))
    return statistics[:, 0].sum()


def loss_cost(
    hidden: torch.Tensor, weight: torch.Tensor, targets: Any, dtype: torch.dtype, *options: Any
) -> tuple[int, int]:
    """Returns the FLOPs of the operator with these arguments, and the bytes that it takes beside its outputs."""
    (tokens, width), vocabulary = hidden.shape, len(weight)
    on_cpu = hidden.device.type == "cpu"
    # the most of all numbers of scored tokens up to this one
    chunk = min(tokens, _longest_chunk(vocabulary, dtype, on_cpu) + MULTIPLE - 1)
    elements = max(vocabulary, min(chunk * vocabulary, CPU_SOFTMAX_ELEMENTS if on_cpu else SOFTMAX_ELEMENTS))
    wide = torch.promote_types(dtype, torch.float32)
    adds = options[1] and dtype != wide  # a product to the head's gradient, a sum in `wide`
    copies = dtype.itemsize * ((dtype != weight.dtype) + adds) + wide.itemsize * (adds and weight.dtype != wide)
    scratch = dtype.itemsize * (2 * tokens * width + chunk * vocabulary) + copies * vocabulary * width + 8 * elements
    return 2 * tokens * width * vocabulary * (1 + sum(options[:2])), scratch


# an operator, so that torch.compile keeps it as one node instead of unrolling the chunks
_operator = torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy", loss_and_gradients, mutates_args=())


@_operator.register_fake
def _fake_loss_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: Any,
    dtype: torch.dtype,
    hidden_needs_grad: bool,
    weight_needs_grad: bool,
    weights: Any = None,
    with_statistics: bool = False,
) -> tuple[torch.Tensor, ...]:
    needs = ((hidden, hidden_needs_grad), (weight, weight_needs_grad))
    gradients = (torch.empty_like(x) if needed else x.new_empty(0) for x, needed in needs)
    wide = torch.promote_types(dtype, torch.float32)
    statistics = hidden.new_empty(len(hidden), 4 if with_statistics else 1, dtype=wide)
    return hidden.new_empty((), dtype=wide), *gradients, statistics


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # nothing depends on the gradients among the outputs
    ctx.save_for_backward(*output[1:3])
    ctx.needs_grad = inputs[4:6]


def _backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    gradients = [x.mul_(grad_loss) if n else None for x, n in zip(ctx.saved_tensors, ctx.needs_grad, strict=True)]
    return *gradients, *(None,) * 6


_operator.register_autograd(_backward, setup_context=_setup_context)

"""Sinusoidal position encodings and ALiBi; rotary embeddings (rope, yarn) are Transformers' own.

Nothing here has weights or buffers.  This file is saved beside the weights.
"""

import math

import torch
from transformers.cache_utils import Cache


def positions_from_mask(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """Returns the last positions, (batch, length), padding not counted, of a mask (batch, cached + length)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def sinusoidal_encoding(position_ids: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """Returns the fixed encoding that is added to the embeddings: sines in even, cosines in odd dimensions.

    Args:
        position_ids: (batch, time).
        hidden_size: width of the embeddings.

    Returns:
        The encoding in fp32, (batch, time, hidden_size).

    Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5.
    """
    even = torch.arange(0, hidden_size, 2, device=position_ids.device, dtype=torch.float)
    frequencies = torch.exp(even * (-math.log(10000.0) / hidden_size))  # (ceil(hidden / 2),)
    angles = position_ids[..., None].float() * frequencies  # (batch, time, ceil(hidden / 2))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :hidden_size]


def alibi_slopes(heads: int, device: torch.device | None = None) -> torch.Tensor:
    """Returns ALiBi's slopes in fp32, (heads,).

    Powers of 2^(-8/n) for n heads where n is a power of 2; else those of the next lower power, filled up with every
    second one of the next higher.

    Source: Press et al. 2021, arXiv 2108.12409, section 3, and the authors' released code for other head counts.
    """
    base = 2 ** math.floor(math.log2(heads))
    exponents = torch.arange(1, base + 1, device=device, dtype=torch.float) * (-8.0 / base)
    between = (torch.arange(heads - base, device=device, dtype=torch.float) * 2 + 1) * (-4.0 / base)
    return torch.exp2(torch.cat((exponents, between)))


def alibi_bias(heads: int, length: int, cache: Cache | None, layer: int, device: torch.device) -> torch.Tensor:
    """Returns ALiBi's bias of the attention scores, minus slope times distance, in fp32: (1, heads, query, key).

    Distances are between indices in the row: within a document they equal those between positions, whatever padding
    or other documents the row holds. The layer is any with the kind of attention (full or sliding) of the bias.
    """
    offset = 0 if cache is None else cache.get_query_offset(layer)
    key_length, key_offset = (length, 0) if cache is None else cache.get_mask_sizes(length, layer)
    queries = torch.arange(length, device=device) + offset  # (query,)
    keys = torch.arange(key_length, device=device) + key_offset  # (key,)
    distance = queries[:, None] - keys  # (query, key)
    return -alibi_slopes(heads, device)[None, :, None, None] * distance

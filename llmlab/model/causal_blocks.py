"""`block_attention` as an attention implementation of Transformers, for fine-tuning any of its decoders on a CPU, and
for the prompts that they answer.

Batches padded on the right need no mask: no token attends to the padding after it.  Whatever is not plain causal
attention in bf16 (padding on the left, packed rows, windows, tokens in a cache, dropout) goes to sdpa.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmlab.model.blocks import block_attention

NAME = "causal_blocks"


def use_blocks(model: PreTrainedModel) -> None:
    """Replaces sdpa by `attend` in a model on a CPU, where its attention follows Transformers' interface."""
    biased = getattr(model.config, "positional_encoding", "") == "alibi"
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation() and not biased:
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, make_mask)
        model.set_attn_implementation(NAME)


def make_mask(*args: Any, **options: Any) -> Tensor | None:
    """Returns sdpa's mask, or None where the causal one is enough."""
    padding = options.get("attention_mask")  # (batch, time), True at tokens
    plain = options["mask_function"] is causal_mask_function and options["q_length"] == options["kv_length"]
    plain = plain and options.get("allow_is_causal_skip") and padding is not None
    if plain and bool((padding[:, 1:] <= padding[:, :-1]).all()):
        return None
    return sdpa_mask(*args, **options)


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
    """Returns the outputs of attention, (batch, time, heads, dim), of inputs (batch, heads, time, dim)."""
    if torch.is_autocast_enabled("cpu"):  # as it does for sdpa: rotation leaves queries and keys in fp32
        query, key, value = (states.to(torch.get_autocast_dtype("cpu")) for states in (query, key, value))
    plain = mask is None and not any(options.get(name) for name in ("dropout", "cache", "softcap"))
    plain = plain and options.get("is_causal", getattr(module, "is_causal", True)) is not False
    faster = query.dtype == torch.bfloat16 or torch.compiler.is_compiling()  # as measured for llmlab's own decoder
    alike = query.shape[2:] == key.shape[2:] == value.shape[2:]
    if plain and faster and alike and options.get("position_bias") is None:
        return block_attention(query, key, value, options.get("scaling") or query.shape[-1] ** -0.5), None
    return sdpa_attention_forward(module, query, key, value, mask, **options)

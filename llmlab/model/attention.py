"""Attention of llmlab's decoder: projections, cache and rotation here, the product by Transformers' interface.

Which tokens see each other is decided once a forward pass, for each kind of layer, by Transformers' mask functions;
this file only leaves masks out where none is needed, and lays ALiBi's penalties over them.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from .blocks import attend_in_blocks
from .configuration import LLMLabConfig
from .positions import alibi_bias

MASK_FUNCTIONS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}
SDPA_LIKE = ("sdpa", "block_causal")  # the second is sdpa with kernels of our own, from `fast_attention`
BIAS_IMPLEMENTATIONS = ("eager", *SDPA_LIKE, "flex_attention")


class LLMLabAttention(nn.Module):
    """Causal self-attention with as many key/value heads as the configuration says."""

    def __init__(self, config: LLMLabConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        width = config.num_attention_heads * config.head_dim
        key_value_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_output_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mixes the tokens of each row.

        Args:
            hidden_states: (batch, time, hidden).
            position_embeddings: cosines and sines of the rotation, (batch, time, head_dim) each, or None.
            attention_mask: what the attention implementation takes.
            past_key_values: keys and values of earlier tokens, to which these are added.

        Returns:
            The mixed states, (batch, time, hidden), and the weights where the implementation returns them.
        """
        shape = hidden_states.shape[:-1]
        by_head = (*shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(by_head).transpose(1, 2)  # (batch, heads, time, head_dim)
        key = self.k_proj(hidden_states).view(by_head).transpose(1, 2)  # (batch, key/value heads, time, head_dim)
        value = self.v_proj(hidden_states).view(by_head).transpose(1, 2)
        if position_embeddings is not None:
            dtype = query.dtype  # under autocast the tables are wider than the products
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            query, key = query.to(dtype), key.to(dtype)
        elif self.config.positional_encoding == "alibi" and query.shape[1] != self.config.num_attention_heads:
            raise ValueError("positional_encoding = alibi: tensor parallelism splits heads away from their slopes")
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        dropout = self.attention_dropout if self.training else 0.0
        if attention_mask is None and not dropout and self._suits_blocks(query, key):
            return self.o_proj(attend_in_blocks(query, key, value, self.scaling).flatten(2)), None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )  # (batch, time, heads, head_dim)
        return self.o_proj(mixed.reshape(*shape, -1)), weights

    def _suits_blocks(self, query: torch.Tensor, key: torch.Tensor) -> bool:
        """Whether this is training in bf16 on a CPU: there our own causal product is twice as fast as sdpa's."""
        narrow_on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
        trains = torch.is_grad_enabled() and query.requires_grad and query.shape[2] == key.shape[2] > 1
        return narrow_on_cpu and trains and self.config._attn_implementation == "sdpa"


def attention_inputs(
    config: LLMLabConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict[str, Any] | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
) -> dict[str, dict[str, Any]]:
    """Returns the mask, and for flex attention ALiBi's bias, of each kind of layer.

    Args:
        config: the decoder's.
        inputs_embeds: embeddings, (batch, time, hidden); their shape, type and device are read.
        attention_mask: None, 1 for tokens and 0 for padding (batch, seen + time), a mask ready to use
            (batch, 1, query, key), or a dictionary of such masks, by the kind of layer.
        past_key_values: keys of *earlier* tokens; leave a cache out while it is empty, or rows packed of several
            documents are not recognized.
        position_ids: positions, (batch, time), when the caller gave them: they tell packed documents apart.

    Returns:
        For each of the configuration's `layer_types`, keyword arguments of the attention layers.

    Raises:
        ValueError: ALiBi with an attention implementation that adds no bias to scores.
    """
    biased = config.positional_encoding == "alibi"
    if biased and config._attn_implementation not in BIAS_IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation = {config._attn_implementation} cannot add alibi's per-head slopes to the scores; "
            f"expected {', '.join(BIAS_IMPLEMENTATIONS)}"
        )
    plain = attention_mask is None and past_key_values is None and position_ids is None
    inputs = {}
    for kind in sorted(set(config.layer_types)):
        if plain and not biased and _is_causal_enough(config, kind, inputs_embeds.shape[1]):
            inputs[kind] = {"attention_mask": None}
            continue
        prepared = isinstance(attention_mask, dict)
        mask = attention_mask[kind] if prepared else None
        if mask is None and (biased or not prepared):
            mask = MASK_FUNCTIONS[kind](
                config=config,
                inputs_embeds=inputs_embeds[:1] if plain else inputs_embeds,
                attention_mask=None if prepared else attention_mask,
                past_key_values=past_key_values,
                position_ids=None if prepared else position_ids,
                allow_is_causal_skip=not biased,
            )
        inputs[kind] = {"attention_mask": mask}
        if biased:
            inputs[kind] = _with_alibi(config, kind, inputs_embeds, mask, past_key_values)
    return inputs


def _is_causal_enough(config: LLMLabConfig, kind: str, length: int) -> bool:
    """Whether sdpa's own causal product is right for a fresh batch without padding.

    Transformers leaves such masks out too, but not while torch compiles.
    """
    in_window = kind == "full_attention" or length <= config.sliding_window
    return config._attn_implementation in SDPA_LIKE and in_window


def _with_alibi(
    config: LLMLabConfig, kind: str, inputs_embeds: torch.Tensor, mask: Any, past_key_values: Cache | None
) -> dict[str, Any]:
    device = inputs_embeds.device
    layer = config.layer_types.index(kind)
    bias = alibi_bias(config.num_attention_heads, inputs_embeds.shape[1], past_key_values, layer, device)
    autocast = torch.is_autocast_enabled(device.type)
    bias = bias.to(torch.get_autocast_dtype(device.type) if autocast else inputs_embeds.dtype)
    if not isinstance(mask, torch.Tensor):  # flex attention's blocks
        return {"attention_mask": mask, "position_bias": bias.expand(inputs_embeds.shape[0], -1, -1, -1)}
    lowest = torch.finfo(bias.dtype).min
    if mask.dtype == torch.bool:
        return {"attention_mask": torch.where(mask, bias, lowest)}
    return {"attention_mask": (mask + bias).clamp(min=lowest)}  # an infinite row would make its values NaN

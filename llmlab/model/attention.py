"""Self-attention of llmlab's decoder, by Transformers' attention interface and, on CPUs, by `blocks`.

Masks are made once a forward pass for each kind of layer, by Transformers' mask functions; ALiBi's bias is added here.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .blocks import block_attention
from .configuration import LLMLabConfig
from .norms import RMSNorm
from .positions import alibi_bias

MASK_FUNCTIONS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
BIAS_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")


class LLMLabAttention(LlamaAttention):
    """Llama's causal self-attention with sliding windows, other position encodings and `block_attention`.

    Value embeddings, a vector of each token, are added to its values. Source: Zhou et al. 2024, arXiv 2410.17897, who
    add the first layer's values; tables of their own are KellerJordan/modded-nanogpt's.
    """

    def __init__(self, config: LLMLabConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        if config.attention_output_bias != config.attention_bias:
            width = config.num_attention_heads * config.head_dim
            self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(self.head_dim, eps=config.rms_norm_eps) for _ in range(2))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        value_embeddings: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the outputs, (batch, time, hidden), and the weights where the implementation returns them.

        Hidden states are (batch, time, hidden); the cosines and sines of rotary embeddings (batch, time, head_dim);
        value embeddings (batch, time, key/value heads * head_dim).
        """
        shape = hidden_states.shape[:-1]
        by_head = (*shape, -1, self.head_dim)
        query, key = self.q_proj(hidden_states).view(by_head), self.k_proj(hidden_states).view(by_head)
        value = self.v_proj(hidden_states).view(by_head)
        if value_embeddings is not None:
            value = value + value_embeddings.view(by_head).to(value.dtype)
        value = value.transpose(1, 2)  # (batch, key/value heads, time, head_dim)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        elif self.config.positional_encoding == "alibi" and query.shape[1] != self.config.num_attention_heads:
            raise ValueError("positional_encoding = alibi: tensor parallelism, which shards heads, is not supported")
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast norms and cos/sin are fp32
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        dropout = self.attention_dropout if self.training else 0.0
        if attention_mask is None and not dropout and self._uses_blocks(query, key):
            return self.o_proj(block_attention(query, key, value, self.scaling).flatten(2)), None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        options = {"dropout": dropout, "scaling": self.scaling, "sliding_window": self.sliding_window}
        output, weights = attend(self, query, key, value, attention_mask, **options, **kwargs)
        return self.o_proj(output.reshape(*shape, -1)), weights  # from (batch, time, heads, head_dim)

    def _uses_blocks(self, query: torch.Tensor, key: torch.Tensor) -> bool:
        """Whether this is a CPU in bf16 or compiled training, where `block_attention` is faster than sdpa."""
        compiled = torch.compiler.is_compiling() and (self.training or query.requires_grad)
        faster = query.device.type == "cpu" and (query.dtype == torch.bfloat16 or compiled)
        return faster and query.shape[2] == key.shape[2] > 1 and self.config._attn_implementation == "sdpa"


def attention_inputs(
    config: LLMLabConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict[str, Any] | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
) -> dict[str, dict[str, Any]]:
    """Returns the mask, and for flex attention ALiBi's bias, of each kind of layer, as its keyword arguments.

    The mask is None, (batch, cached + time), (batch, 1, query, key), or a dictionary of the last by kind of layer. An
    empty cache must be None: with a cache, packed documents are not recognized by their positions.
    """
    biased = config.positional_encoding == "alibi"
    if biased and config._attn_implementation not in BIAS_IMPLEMENTATIONS:
        problem = f"{config._attn_implementation} cannot add alibi's per-head slopes to the scores"
        raise ValueError(f"attn_implementation = {problem}; expected {', '.join(BIAS_IMPLEMENTATIONS)}")
    plain = attention_mask is None and past_key_values is None and position_ids is None
    inputs = {}
    for kind in sorted(set(config.layer_types)):
        in_window = kind == "full_attention" or inputs_embeds.shape[1] <= config.sliding_window
        if plain and in_window and not biased and config._attn_implementation == "sdpa":
            # sdpa's own causal mask is enough; Transformers omits masks too, but not while torch compiles
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
        alibi = _with_alibi(config, kind, inputs_embeds, mask, past_key_values) if biased else {}
        inputs[kind] = {"attention_mask": mask, **alibi}
    return inputs


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

"""llmlab's decoder: Llama's layout and weight names, with a choice of position encodings, norms and activations.

This file is saved beside the weights, with those it imports by relative paths; they need torch and Transformers alone.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .attention import LLMLabAttention, attention_inputs
from .configuration import LLMLabConfig
from .loss import linear_cross_entropy
from .norms import RMSNorm
from .positions import positions_from_mask, sinusoidal_encoding

# where the embedding is not the head too. Source: karpathy/nanochat, nanochat/gpt.py, init_weights
ZERO_OUTPUTS_EMBEDDING_STD, ZERO_OUTPUTS_HEAD_STD = 0.8, 0.001
SQUARED_INPUT_SCALE = 0.4  # of the matrix before relu2. Source: as above


class LLMLabMLP(nn.Module):
    """The feed-forward layer: gated with swiglu, plain with the other activations."""

    def __init__(self, config: LLMLabConfig):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False) if config.is_gated else None
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.act_fn = ACT2FN["silu" if config.is_gated else config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (batch, time, hidden) in and out
        inner = self.up_proj(hidden_states)  # (batch, time, intermediate)
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(inner))
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * inner)


class LLMLabDecoderLayer(GradientCheckpointingLayer):
    """Attention, then feed-forward, each on a normalized copy and added to the residual stream."""

    def __init__(self, config: LLMLabConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LLMLabAttention(config, layer_idx)
        self.mlp = LLMLabMLP(config)
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)
        self.dropout = nn.Dropout(config.dropout)
        if config.initialization == "zero_outputs":
            for name, module in self.named_modules():
                if isinstance(module, nn.Linear):
                    is_output = name.endswith(("o_proj", "down_proj"))
                    squared = config.hidden_act == "relu2" and name.endswith("up_proj")
                    factor = 0.0 if is_output else SQUARED_INPUT_SCALE if squared else 1.0
                    module.initial_bound = factor * (3 / module.in_features) ** 0.5

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # (batch, time, hidden)
        mixed, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(mixed)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


def _norm(config: LLMLabConfig) -> nn.Module:
    norm = RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return norm(config.hidden_size, eps=config.rms_norm_eps)


class LLMLabPreTrainedModel(LlamaPreTrainedModel):
    """The configuration's class; the features of Transformers that the model supports are Llama's."""

    config_class = LLMLabConfig
    config: LLMLabConfig
    _no_split_modules = ["LLMLabDecoderLayer"]
    _can_record_outputs = {"hidden_states": LLMLabDecoderLayer, "attentions": LLMLabAttention}

    def _init_weights(self, module: nn.Module) -> None:
        """Initializes a module; with `zero_outputs`, layers add nothing to the residual stream at first."""
        super()._init_weights(module)
        if hasattr(module, "initial_bound"):
            init.uniform_(module.weight, -module.initial_bound, module.initial_bound)
            return
        own_head = self.config.initialization == "zero_outputs" and not self.config.tie_word_embeddings
        if own_head and isinstance(module, (nn.Embedding, LanguageModelHead)):
            std = ZERO_OUTPUTS_EMBEDDING_STD if isinstance(module, nn.Embedding) else ZERO_OUTPUTS_HEAD_STD
            init.normal_(module.weight, std=std)

    def resize_token_embeddings(self, *args: Any, **options: Any) -> nn.Embedding:
        """Resizes the value embeddings too: those of new tokens are the mean of the others."""
        resized = super().resize_token_embeddings(*args, **options)
        for table in self.base_model.value_embeddings:
            old, rows = table.weight.data, resized.num_embeddings
            new = old.mean(0, keepdim=True).expand(max(rows - len(old), 0), -1)
            table.weight = nn.Parameter(torch.cat([old[:rows], new]), table.weight.requires_grad)
            table.num_embeddings = rows
        return resized


class LLMLabModel(LLMLabPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: LLMLabConfig):
        super().__init__(config)
        config.check()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([LLMLabDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        values = config.num_key_value_heads * config.head_dim
        tables = config.num_hidden_layers if config.value_embeddings else 0
        self.value_embeddings = nn.ModuleList([nn.Embedding(config.vocab_size, values) for _ in range(tables)])
        if config.initialization == "zero_outputs":
            for table in self.value_embeddings:
                table.initial_bound = (3 / config.hidden_size) ** 0.5  # as large as the values
        self.norm = _norm(config)
        self.rotary_emb = LlamaRotaryEmbedding(config) if config.uses_rope else None
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Computes the last hidden states, (batch, time, hidden), with the arguments of Transformers' decoders.

        Position ids, (batch, time), mark packed documents where there is no mask: a position that does not follow on
        the one before it starts a document, which does not attend to the others of its row.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        if input_ids is None and self.config.value_embeddings:
            raise ValueError("inputs_embeds: not supported with value_embeddings, which need the ids; pass input_ids")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        inputs_of = attention_inputs(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
        if past_key_values is None and use_cache and not (self.gradient_checkpointing and self.training):
            past_key_values = DynamicCache(config=self.config)

        hidden_states, position_embeddings = inputs_embeds, None
        if self.config.positional_encoding != "alibi":
            if position_ids is None:
                position_ids = self._default_positions(inputs_embeds, attention_mask, past_key_values)
            if self.rotary_emb is not None:
                position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
            else:
                # Scaled as in section 3.4 of arXiv 1706.03762: else the encoding drowns the small initial embeddings.
                encoding = sinusoidal_encoding(position_ids, self.config.hidden_size).to(inputs_embeds.dtype)
                hidden_states = inputs_embeds * self.config.hidden_size**0.5 + encoding
        hidden_states = self.dropout(hidden_states)
        kwargs |= {"position_ids": position_ids, "past_key_values": past_key_values}
        for i, (layer, kind) in enumerate(zip(self.layers, self.config.layer_types, strict=True)):
            values = self.value_embeddings[i](input_ids) if self.config.value_embeddings else None
            kwargs |= inputs_of[kind] | {"value_embeddings": values}
            hidden_states = layer(hidden_states, position_embeddings=position_embeddings, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _default_positions(self, embeds: torch.Tensor, attention_mask: Any, cache: Cache | None) -> torch.Tensor:
        length = embeds.shape[1]
        absolute = self.config.positional_encoding == "sinusoidal"  # rotary embeddings encode distances alone
        if absolute and isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            return positions_from_mask(attention_mask, length)
        seen = 0 if cache is None else cache.get_seq_length()
        return (torch.arange(length, device=embeds.device) + seen)[None]


class LanguageModelHead(nn.Linear):
    """The output head; the loss is computed by a call of it too, so that sharded weights are gathered."""

    token_losses: torch.Tensor | None = None  # of the last evaluated batch, (batch, time - 1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Returns logits, (batch, time, vocabulary), or with labels, (batch, time), the loss."""
        if labels is None:
            return super().forward(hidden_states.contiguous())  # a slice has a CPU copy a frozen head for each row
        evaluates = not self.training
        loss = linear_cross_entropy(
            hidden_states, self.weight, labels, num_items_in_batch=num_items_in_batch, with_tokens=evaluates
        )
        if evaluates:
            loss, self.token_losses = loss
        return loss


class LLMLabForCausalLM(LLMLabPreTrainedModel, GenerationMixin):
    """The decoder with a head that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LLMLabConfig):
        super().__init__(config)
        self.model = LLMLabModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool = True,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Computes logits, (batch, time, vocabulary), and with labels, (batch, time), the loss of the next tokens.

        The arguments are those of Transformers' causal language models, and `return_logits`: with labels, False
        computes the loss chunk by chunk, without ever holding all logits.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        loss = logits = None
        if labels is not None and not return_logits:
            if not isinstance(self.lm_head, LanguageModelHead) or "shift_labels" in kwargs:
                reason = "shift_labels" if "shift_labels" in kwargs else type(self.lm_head).__name__
                raise ValueError(f"return_logits = False: the chunked loss does not support {reason}; expected True")
            loss = self.lm_head(outputs.last_hidden_state, labels, num_items_in_batch)
        else:
            logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
            if labels is not None:
                loss = self.loss_function(
                    logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch, **kwargs
                )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class LLMLabForSequenceClassification(GenericForSequenceClassification, LLMLabPreTrainedModel):
    """The decoder with a score on the last token, for reward models."""

    def __init__(self, config: LLMLabConfig):
        LLMLabPreTrainedModel.__init__(self, config)  # the generic one would look the decoder up by name
        self.num_labels = config.num_labels
        self.model = LLMLabModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


if __name__ == "llmlab.model.modeling":  # a copy loaded from a run folder leaves the registry alone
    AutoConfig.register(LLMLabConfig.model_type, LLMLabConfig, exist_ok=True)
    AutoModel.register(LLMLabConfig, LLMLabModel, exist_ok=True)
    AutoModelForCausalLM.register(LLMLabConfig, LLMLabForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(LLMLabConfig, LLMLabForSequenceClassification, exist_ok=True)

__all__ = ["LLMLabConfig", "LLMLabForCausalLM", "LLMLabForSequenceClassification", "LLMLabModel"]

"""One token's forward pass of decoders that are laid out like Llama, from weights arranged for it.

Queries, keys and values are one product, as are gate and up; on CPUs bf16 weights are packed once instead of at each
product.  It reads the same weights by the same formulas as the model's own `forward`, which `decoding` uses elsewhere.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from llmlab.model.configuration import LLMLabConfig
from llmlab.model.modeling import LanguageModelHead

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "llmlab")
# of llmlab's decoder, beside Llama's; a model that uses another one keeps to its own forward pass
OPTIONS = {"attention_type", "norm_type", "positional_encoding", "sliding_window", "layer_types", "qk_norm"}
OPTIONS |= {"attention_output_bias", "dropout", "initialization"}
PARTS = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "dropout"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}


class Product:
    """A product with the stacked weights of some linear layers, which `pack` arranges for products of few rows."""

    def __init__(self, weights: list[tuple[torch.Tensor, torch.Tensor | None]], dtype: torch.dtype):
        self.weight = torch.cat([weight.to(dtype) for weight, _ in weights])  # (out, in)
        biases = [bias for _, bias in weights]
        width = [len(weight) for weight, _ in weights]
        self.bias = None
        if any(bias is not None for bias in biases):
            filled = [b if b is not None else self.weight.new_zeros(n) for b, n in zip(biases, width, strict=True)]
            self.bias = torch.cat([bias.to(dtype) for bias in filled])
        self.packed = False

    def pack(self, rows: int) -> None:
        """Arranges the weight for the CPU's bf16 instructions, once: `F.linear` does so at each call."""
        if not self.packed and self.weight.device.type == "cpu" and self.weight.dtype == torch.bfloat16:
            self.weight, self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows), True

    def __call__(self, x: torch.Tensor) -> torch.Tensor:  # (rows, in) to (rows, out)
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), self.weight, self.bias, "none", [], "")
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class DecodeStep:
    """The forward pass of one new token a row; weights are copied when it is made, so make one for each rollout."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype):
        """Copies the weights, in the precision that products are computed in; see `suits`."""
        self.decoder, self.dtype = model.model, dtype
        self.layers = [Layer(layer, model.config, dtype) for layer in self.decoder.layers]
        head = model.get_output_embeddings()
        self.head: Callable[[torch.Tensor], torch.Tensor] = (
            Product([found], dtype) if (found := _linear(head)) else head
        )
        self.products = [part for layer in self.layers for part in layer.products]
        self.products += [self.head] if isinstance(self.head, Product) else []

    def __call__(
        self, tokens: torch.Tensor, positions: torch.Tensor, cache: Any, column: int, bias: dict[Any, torch.Tensor]
    ) -> torch.Tensor:
        """Returns the next token's logits, (rows, vocabulary), and writes keys and values into the cache.

        Args:
            tokens: (rows,).
            positions: (rows,).
            cache: with `layers` whose `keys` and `values` are (rows, key/value heads, columns, dim).
            column: where keys and values go.
            bias: by window, (rows, 1, columns): 0 where attention looks, else minus infinity.
        """
        hidden = self.decoder.embed_tokens(tokens[:, None])  # (rows, 1, hidden)
        cos, sin = self.decoder.rotary_emb(hidden, positions[:, None])  # each (rows, 1, dim)
        half = sin.shape[-1] // 2
        rotary = cos, torch.cat((-sin[..., :half], sin[..., half:]), -1)
        hidden = hidden[:, 0]
        for layer, past in zip(self.layers, cache.layers, strict=True):
            hidden = layer(hidden, rotary, past, column, bias[layer.window])
        return self.head(_norm(self.decoder.norm, hidden))

    def pack_some(self, rows: int) -> None:
        """Packs the weights of one more layer, so that no token waits for all of them."""
        waiting = [product for product in self.products if not product.packed]
        for product in waiting[:4]:
            product.pack(rows)


class Layer:
    """A decoder layer's step."""

    def __init__(self, layer: nn.Module, config: Any, dtype: torch.dtype):
        self.layer, self.attention, self.mlp = layer, layer.self_attn, layer.mlp
        self.window = _window(self.attention, config)
        self.dim = self.attention.head_dim
        names = [f"{x}_proj" for x in "qkv"]
        self.qkv = Product([_linear(getattr(self.attention, name)) for name in names], dtype)
        self.out = Product([_linear(self.attention.o_proj)], dtype)
        inner = [part for name in ("gate_proj", "up_proj") if (part := getattr(self.mlp, name, None)) is not None]
        self.gated = len(inner) == 2
        self.up = Product([_linear(part) for part in inner], dtype)
        self.down = Product([_linear(self.mlp.down_proj)], dtype)
        self.products = [self.qkv, self.out, self.up, self.down]

    def __call__(
        self,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        past: Any,
        column: int,
        bias: torch.Tensor,
    ) -> torch.Tensor:  # (rows, hidden) in and out
        rows, (_, shared, columns, dim) = len(hidden), past.keys.shape
        qkv = self.qkv(_norm(self.layer.input_layernorm, hidden)).view(rows, -1, dim)  # (rows, heads, dim)
        mixed, value = qkv[:, :-shared], qkv[:, -shared:]
        if hasattr(self.attention, "q_norm"):
            query, key = (
                _norm(self.attention.q_norm, mixed[:, :-shared]),
                _norm(self.attention.k_norm, mixed[:, -shared:]),
            )
            mixed = torch.cat((query, key), 1)
        first, second = mixed.chunk(2, -1)
        mixed = mixed * rotary[0] + torch.cat((second, first), -1) * rotary[1]
        past.keys[:, :, column] = mixed[:, -shared:]
        past.values[:, :, column] = value
        query = mixed[:, :-shared].to(past.keys.dtype).reshape(rows * shared, -1, dim)  # a group of heads shares keys
        scores = torch.bmm(query, past.keys.view(-1, columns, dim).transpose(1, 2)).view(rows, -1, columns)
        weights = torch.softmax(torch.add(bias, scores, alpha=self.attention.scaling), -1)
        output = torch.bmm(weights.view(rows * shared, -1, columns), past.values.view(-1, columns, dim))
        hidden = hidden + self.out(output.view(rows, -1))
        inner = self.up(_norm(self.layer.post_attention_layernorm, hidden))
        if self.gated:
            gate, inner = inner.chunk(2, -1)
            return hidden + self.down(self.mlp.act_fn(gate) * inner)
        return hidden + self.down(self.mlp.act_fn(inner))


def suits(model: Any) -> bool:
    """Whether `DecodeStep` computes what this model's forward pass does: a layout, options and modules that it knows."""
    config = model.config
    if config.model_type not in FAMILIES or not hasattr(model, "model"):
        return False
    if isinstance(config, LLMLabConfig):
        others = LLMLabConfig.__annotations__.keys() - LlamaConfig.__annotations__.keys() - OPTIONS
        if not config.uses_rope or any(getattr(config, name) != getattr(LLMLabConfig, name) for name in others):
            return False
    return all(_suits_layer(layer) for layer in model.model.layers) and not _hooks(model.model.norm)


def _suits_layer(layer: nn.Module) -> bool:
    for name, parts in PARTS.items():
        module = layer.get_submodule(name)
        if {child for child, _ in module.named_children()} - parts or [*module.parameters(recurse=False)]:
            return False
    projections = [
        part
        for name in ("self_attn", "mlp")
        for n, part in getattr(layer, name).named_children()
        if n.endswith("_proj")
    ]
    return all(map(_linear, projections)) and not any(_hooks(part) for part in layer.modules())


def _hooks(module: nn.Module) -> bool:
    """Whether something looks at a module's forward pass, or replaces it."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


def _linear(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Returns the weight and bias that a linear layer, or one with LoRA adapters, amounts to; None for others."""
    if type(module) in (nn.Linear, LanguageModelHead):
        return module.weight, module.bias
    if not hasattr(module, "base_layer"):
        return None
    from peft.tuners.lora import Linear

    if type(module) is not Linear or module.lora_variant or type(module.base_layer) is not nn.Linear:
        return None
    weight = module.base_layer.weight
    if not (module.disable_adapters or module.merged):
        for name in set(module.active_adapters) & module.lora_A.keys():
            weight = weight.float() + module.get_delta_weight(name).float()
    return weight, module.base_layer.bias


def _norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(norm, nn.LayerNorm):
        return norm(x)
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _window(attention: nn.Module, config: Any) -> int | None:
    """Returns how many keys a layer attends to, or None for all."""
    return getattr(attention, "sliding_window", getattr(config, "sliding_window", None))

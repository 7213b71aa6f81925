"""One token's forward pass of decoders that are laid out like Llama, from copies of their weights arranged for it.

Queries, keys and values are one product, as are gate and up; on CPUs bf16 weights are packed once, not each time.
Formulas are those of the models' own `forward`, which `decoding` uses where `suits` is false.
"""

from itertools import repeat
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from llmlab.model.configuration import LLMLabConfig
from llmlab.model.modeling import LanguageModelHead

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "llmlab")
# of llmlab's decoder, beside Llama's; a model that uses another one keeps to its own forward pass
OPTIONS = {"attention_type", "norm_type", "positional_encoding", "sliding_window", "layer_types", "qk_norm"}
OPTIONS |= {"attention_output_bias", "dropout", "initialization", "value_embeddings"}
SMALL = 2**19  # products of a layer's scores up to which a CPU multiplies faster in fp32 than in bf16
PARTS = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "dropout"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}


class Product:
    """The product with the stacked weights of linear layers: (rows, in) to (rows, out)."""

    def __init__(self, *layers: nn.Module, dtype: torch.dtype):
        found = [_weight_and_bias(layer) for layer in layers]
        self.weight = torch.cat([weight.to(dtype) for weight, _ in found])
        biases = [self.weight.new_zeros(len(weight)) if bias is None else bias.to(dtype) for weight, bias in found]
        self.bias = torch.cat(biases) if any(bias is not None for _, bias in found) else None
        self.packed = self.weight.device.type != "cpu" or dtype != torch.bfloat16 or not packs_weights()

    def pack(self) -> None:
        """Arranges the weight for the CPU's bf16 instructions."""
        # the operator wants a number of rows; the arrangement is the same for 1 and 32
        self.weight, self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 8), True

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), self.weight, self.bias, "none", [], "")
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def packs_weights() -> bool:
    """Whether this CPU and build of torch have bf16 products with packed weights; those of Macs have not."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Layer:
    """A decoder layer's step."""

    def __init__(self, layer: nn.Module, config: Any, dtype: torch.dtype):
        self.attention, self.mlp = attention, mlp = layer.self_attn, layer.mlp
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
        self.gated, self.normed = getattr(mlp, "gate_proj", None) is not None, hasattr(attention, "q_norm")
        self.qkv = Product(attention.q_proj, attention.k_proj, attention.v_proj, dtype=dtype)
        self.out, self.down = (Product(part, dtype=dtype) for part in (attention.o_proj, mlp.down_proj))
        self.up = Product(*([mlp.gate_proj] if self.gated else []), mlp.up_proj, dtype=dtype)

    def __call__(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], past: Any, column: int, bias: Tensor, embedded: Any = None
    ) -> Tensor:
        """Returns the hidden states after this layer, (rows, hidden); its value embeddings are (rows, values)."""
        rows, shared, columns, dim = past.keys.shape
        heads = self.qkv(_norm(self.norms[0], hidden)).view(rows, -1, dim)  # of queries, keys and values
        mixed, values = heads[:, :-shared], heads[:, -shared:]
        past.values[:, :, column] = values if embedded is None else values + embedded.view_as(values).to(values.dtype)
        if self.normed:
            query, key = mixed[:, :-shared], mixed[:, -shared:]
            mixed = torch.cat((_norm(self.attention.q_norm, query), _norm(self.attention.k_norm, key)), 1)
        first, second = mixed.chunk(2, -1)
        mixed = mixed * rotary[0] + torch.cat((second, first), -1) * rotary[1]
        past.keys[:, :, column] = mixed[:, -shared:]
        keys, values = (x.view(-1, columns, dim) for x in (past.keys, past.values))
        query = mixed[:, :-shared].to(keys.dtype).reshape(rows * shared, -1, dim)  # those of a group share their keys
        scores = torch.bmm(query, keys.transpose(1, 2)).view(rows, -1, columns)
        weights = torch.softmax(torch.add(bias, scores, alpha=self.attention.scaling), -1).to(values.dtype)
        hidden = hidden + self.out(torch.bmm(weights.view(rows * shared, -1, columns), values).view(rows, -1))
        inner = self.up(_norm(self.norms[1], hidden))
        if not self.gated:
            return hidden + self.down(self.mlp.act_fn(inner))
        gate, inner = inner.chunk(2, -1)
        return hidden + self.down(self.mlp.act_fn(gate) * inner)


class DecodeStep:
    """The forward pass of one new token a row; it copies the weights as they are now, in the products' precision."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype):
        self.decoder, self.dtype, self.head = model.model, dtype, model.get_output_embeddings()
        self.layers = [Layer(layer, model.config, dtype) for layer in self.decoder.layers]
        products = [product for each in self.layers for product in (each.qkv, each.out, each.up, each.down)]
        if _weight_and_bias(self.head):
            self.head = Product(self.head, dtype=dtype)
            products.append(self.head)
        self.unpacked, self.packing = [product for product in products if not product.packed], Lock()

    def pack_some(self) -> None:
        """Packs the weights of two layers, so that no single token waits for those of all."""
        with self.packing:
            for product in self.unpacked[:8]:
                product.pack()
            del self.unpacked[:8]

    def convert_cache(self, cache: Any) -> None:
        """Keeps keys and values, (rows, heads, columns, dim), in fp32 where they are few: bf16 is exact in it."""
        for layer in cache.layers:
            products = layer.keys[:, 0].numel() * self.decoder.config.num_attention_heads
            few = self.dtype == torch.bfloat16 and layer.keys.device.type == "cpu" and products <= SMALL
            few = few and not torch.is_autocast_enabled("cpu")  # which would cast them back for each product
            dtype = torch.float32 if few else self.dtype
            layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)

    def rotate(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosines and signed sines, each (columns, rows, 1, dim), for tokens, (rows,), at positions, (rows,
        columns)."""
        cos, sin = self.decoder.rotary_emb(self.decoder.embed_tokens(tokens), positions)
        low, high = sin.chunk(2, -1)
        signed = torch.cat((-low, high), -1)
        return cos.transpose(0, 1)[:, :, None].contiguous(), signed.transpose(0, 1)[:, :, None].contiguous()

    def __call__(
        self, tokens: Tensor, rotary: tuple[Tensor, Tensor], cache: Any, column: int, bias: dict[Any, Tensor]
    ) -> Tensor:
        """Returns the logits after tokens, (rows,), as (rows, vocabulary), and writes keys and values, (rows, heads,
        columns, dim), into that column of the cache's layers.

        Cosines and sines are the column's of `rotate`; the bias, by window, is 0 where attention looks, (rows, 1,
        columns), else minus infinity.
        """
        hidden = self.decoder.embed_tokens(tokens)  # (rows, hidden)
        tables = getattr(self.decoder, "value_embeddings", None) or repeat(None)  # of llmlab's decoder
        for layer, past, table in zip(self.layers, cache.layers, tables, strict=False):
            values = None if table is None else table(tokens)
            hidden = layer(hidden, rotary, past, column, bias[layer.window], values)
        return self.head(_norm(self.decoder.norm, hidden))


def state_of(model: nn.Module) -> list[Any]:
    """Returns what is different once weights or active adapters are: addresses, versions, hashes, sums."""
    weights = [weight.detach() for weight in model.parameters()]
    versions = [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights]
    # an edit of `.data` is no new version: hashes see single values, sums of some values what cancels out in a hash
    hashes = torch.stack([torch.hash_tensor(w).view(torch.int64) for w in weights]).tolist()
    sums = torch.stack([w.flatten()[::61].sum(dtype=torch.float32) for w in weights]).tolist()
    adapters = [
        (part.merged, part.disable_adapters, [*part.active_adapters], {**part.scaling})
        for part in model.modules()
        if hasattr(part, "lora_A")
    ]
    return [versions, hashes, sums, adapters]


def suits(model: Any) -> bool:
    """Whether `DecodeStep` computes what a model's forward pass does: its layout, options and modules are known."""
    config = model.config
    if config.model_type not in FAMILIES:
        return False
    others = LLMLabConfig.__annotations__.keys() - LlamaConfig.__annotations__.keys() - OPTIONS
    if isinstance(config, LLMLabConfig) and (
        not config.uses_rope or any(getattr(config, name) != getattr(LLMLabConfig, name) for name in others)
    ):
        return False
    if model.model.rotary_emb.rope_type in ("dynamic", "longrope"):  # whose frequencies depend on the longest row
        return False
    return all(_suits_layer(layer) for layer in model.model.layers)


def _suits_layer(layer: nn.Module) -> bool:
    """Whether a layer has no part that is unknown, quantized or watched by a hook."""
    for module in layer.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
    for name, parts in PARTS.items():
        module = layer.get_submodule(name)
        children = dict(module.named_children())
        if children.keys() - parts or [*module.parameters(recurse=False)]:
            return False
        if not all(_weight_and_bias(child) for name, child in children.items() if name.endswith("_proj")):
            return False
    return True


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Returns those that a linear layer, or one with LoRA adapters, amounts to; None for other modules."""
    if type(module) in (nn.Linear, LanguageModelHead):
        return module.weight, module.bias
    if not hasattr(module, "lora_A"):
        return None
    from peft.tuners.lora import Linear

    base = module.base_layer
    if type(module) is not Linear or module.lora_variant or type(base) is not nn.Linear:
        return None
    active = [] if module.disable_adapters or module.merged else [*module.lora_A.keys() & set(module.active_adapters)]
    return sum((module.get_delta_weight(name).float() for name in active), base.weight.float()), base.bias


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        return norm(x)
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)

"""What a model costs: parameters, training memory, arithmetic and cache, from its configuration alone.

Parameters and optimizer states are exact counts, of any architecture; the rest is for llmlab's own decoder.
Activations are an estimate for a forward pass that is not compiled; torch's allocator, the batches themselves and
other programs come on top.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import transformers
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from llmlab.model.configuration import LLMLabConfig
from llmlab.model.loss import PIECE_TOKENS
from llmlab.model.modeling import LLMLabForCausalLM
from llmlab.settings.errors import UserError, did_you_mean
from llmlab.settings.trust import remote_code_allowed

if TYPE_CHECKING:
    from peft import PeftConfig

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PARTS = ("embeddings", "attention", "mlp", "norms", "head", "other")
WORDS = {"attn": "attention", "attention": "attention", "mlp": "mlp", "moe": "mlp", "expert": "mlp", "ffn": "mlp"}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training takes, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class ModelSize:
    """Parameters by part; a head that shares the embedding's weights counts 0, and llmlab's decoder has no others.

    `shapes` are the parameters' shapes and parts, from which optimizer states follow.
    """

    config: PreTrainedConfig
    embeddings: int
    attention: int
    mlp: int
    norms: int
    head: int
    other: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in PARTS)

    @property
    def non_embedding(self) -> int:
        """Parameters of the layers: neither the embedding nor an untied head."""
        return self.total - self.embeddings - self.head

    def optimizer_bytes(self, optimizer: str) -> int:
        """Returns the bytes of an optimizer's states, kept in fp32.

        Args:
            optimizer: as the setting names it.

        Raises:
            UserError: there is no such optimizer.
        """
        if optimizer not in STATE_VALUES:
            raise UserError(
                f"optimizer = {optimizer}: expected one of {', '.join(STATE_VALUES)}"
                + did_you_mean(optimizer, STATE_VALUES)
            )
        return 4 * sum(STATE_VALUES[optimizer](part, shape) for part, shape in self.shapes)

    def activation_bytes_per_token(self, dtype: str = "fp32") -> int:
        """Estimates what the layers keep of a token for the backward pass.

        Counted operation by operation: what each one saves, in its own type. Norms and the residual stream stay in
        fp32 under autocast.

        Args:
            dtype: arithmetic, `fp32`, `bf16` or `fp16`; the weights are in fp32.
        """
        c, narrow = self.config, BYTES[dtype]
        heads, key_values = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        # the input, its normalized copy (rmsnorm only), and the scaled copy that the projections read
        norm = c.hidden_size * ((8 if c.norm_type == "rmsnorm" else 4) + narrow)
        # query, key, value, mixed, mixed again in the layout that the output projection reads
        attention = narrow * (3 * heads + 2 * key_values) + 4 * c.num_attention_heads
        inner = {"swiglu": 4, "relu": 1}.get(c.hidden_act, 2)  # in and out of each product and activation
        layer = 2 * norm + attention + narrow * inner * c.intermediate_size
        return c.num_hidden_layers * layer + norm

    def training_memory(
        self,
        optimizer: str,
        *,
        rows: int = 1,
        sequence: int | None = None,
        dtype: str = "fp32",
        gradient_checkpointing: bool = False,
    ) -> TrainingMemory:
        """Returns the memory that training takes on one device, weights in fp32, with the loss in pieces.

        Args:
            optimizer: as the setting names it.
            rows: sequences in one forward pass.
            sequence: tokens of each; None is the longest.
            dtype: arithmetic, `fp32`, `bf16` or `fp16`; the narrow ones are autocast, which also copies the weights.
            gradient_checkpointing: keep only each layer's input, and one layer's insides at a time.
        """
        c = self.config
        tokens = rows * (sequence or c.max_position_embeddings)
        per_token = self.activation_bytes_per_token(dtype)
        if gradient_checkpointing:
            per_token = c.num_hidden_layers * 4 * c.hidden_size + per_token // c.num_hidden_layers
        copies = 0 if dtype == "fp32" else BYTES[dtype] * self.matrix_parameters
        # the head's gradient is taken with the loss, from one piece of logits after the other
        loss = c.vocab_size * (4 * c.hidden_size + BYTES[dtype] * min(tokens, PIECE_TOKENS))
        return TrainingMemory(
            weights=4 * self.total + copies,
            gradients=4 * self.total,
            optimizer=self.optimizer_bytes(optimizer),
            activations=tokens * per_token + loss,
        )

    @property
    def matrix_parameters(self) -> int:
        """Weights that each token is multiplied with; the embedding only as a shared head."""
        layers = sum(a * b for part, (a, b) in self._matrices() if part in ("attention", "mlp"))
        return layers + self.config.vocab_size * self.config.hidden_size

    def _matrices(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(part, shape) for part, shape in self.shapes if len(shape) == 2]

    def forward_flops_per_token(self, sequence: int) -> int:
        """Returns the floating-point operations of a forward pass for one token of a sequence of this length.

        Two for each weight that multiplies, and the two products of attention over every token of the sequence, or of
        the window, as if nothing were masked.

        Source: Chowdhery et al. 2022 (PaLM), arXiv 2204.02311, appendix B; layers with a window count the window.
        """
        c = self.config
        seen = sum(sequence if kind == "full_attention" else min(sequence, c.sliding_window) for kind in c.layer_types)
        return 2 * self.matrix_parameters + 4 * c.num_attention_heads * c.head_dim * seen

    def training_flops_per_token(self, sequence: int) -> int:
        """Returns the operations of a training step for one token: the backward pass costs twice the forward one."""
        return 3 * self.forward_flops_per_token(sequence)

    def kv_cache_bytes_per_token(self, dtype: str = "bf16") -> int:
        """Returns the bytes that generation keeps of each token; layers with a window keep no more than the window."""
        c = self.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * BYTES[dtype]


def measure(config: PreTrainedConfig) -> ModelSize:
    """Counts a model's parameters, without taking memory for them.

    Args:
        config: of llmlab's decoder, or of any model that Transformers knows.
    """
    model = empty_model(config)
    counts = dict.fromkeys(PARTS, 0)
    shapes = []
    for name, parameter in model.named_parameters():
        part = _part_of(model, name)
        counts[part] += parameter.numel()
        shapes.append((part, tuple(parameter.shape)))
    return ModelSize(config=config, **counts, shapes=tuple(shapes))


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Makes a model whose parameters have shapes and no values: with the head that its weights were saved with."""
    with torch.device("meta"):
        if isinstance(config, LLMLabConfig) and not config.architectures:
            model = LLMLabForCausalLM(config)
        else:
            scores = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
            writes = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in (
                getattr(config, "auto_map", None) or ()
            )
            kind = "ForSequenceClassification" if scores else "ForCausalLM" if writes else ""
            auto = getattr(transformers, f"AutoModel{kind}")
            model = auto.from_config(config, trust_remote_code=remote_code_allowed())
    model.tie_weights()
    return model


def adapter_parameters(config: PreTrainedConfig, adapter: "PeftConfig") -> int:
    """Counts the parameters that adapters add to a model of this configuration."""
    from peft import get_peft_model  # a second or two, for those who need it

    adapter.inference_mode = False
    model = get_peft_model(empty_model(config), adapter, low_cpu_mem_usage=True)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _part_of(model: PreTrainedModel, name: str) -> str:
    """Returns the part that a parameter belongs to, by its module and the names on the way there."""
    path, _, _ = name.rpartition(".")
    module = model.get_submodule(path)
    if module is model.get_output_embeddings() or path in ("score", "classifier"):
        return "head"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if "norm" in type(module).__name__.lower():
        return "norms"
    return next((part for word, part in WORDS.items() if word in path.lower()), "other")


def _in_8_bits(part: str, shape: tuple[int, ...]) -> int:
    """Returns what bitsandbytes keeps of a parameter: of a large one a byte a value and a scale a block of 256."""
    count = math.prod(shape)
    return count if part == "embeddings" or count < 4096 else count // 4 + math.ceil(count / 256)


# Values that each optimizer keeps of a parameter, by its part and shape. Muon orthogonalizes the layers' matrices and
# leaves the rest to AdamW; Adafactor keeps a matrix's row and column sums.
STATE_VALUES: dict[str, Callable[[str, tuple[int, ...]], int]] = {
    "adamw": lambda part, shape: 2 * math.prod(shape),
    "adafactor": lambda part, shape: sum(shape[-2:]) * math.prod(shape[:-2]),
    "lion": lambda part, shape: math.prod(shape),
    "sophia": lambda part, shape: 2 * math.prod(shape),
    **dict.fromkeys(("adamw_8bit", "paged_adamw_8bit"), lambda part, shape: 2 * _in_8_bits(part, shape)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), _in_8_bits),
    "paged_adamw_32bit": lambda part, shape: 2 * math.prod(shape),
    "paged_lion_32bit": lambda part, shape: math.prod(shape),
    "muon": lambda part, shape: (1 if part in ("attention", "mlp") and len(shape) == 2 else 2) * math.prod(shape),
}

"""What a model costs, from its configuration alone: parameters and optimizer states of any architecture, FLOPs and KV
cache of llmlab's decoder.  What a training step takes besides is `llmlab/runs/plan.py`'s.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch
import transformers
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

import llmlab.model.modeling  # noqa: F401  registers its classes
from llmlab.settings.optimizer import OptimizerSettings
from llmlab.settings.trust import remote_code_allowed

if TYPE_CHECKING:
    from peft import PeftConfig

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
OPTIMIZERS: tuple[str, ...] = get_args(OptimizerSettings.model_fields["optimizer"].annotation)
PARTS = ("embeddings", "attention", "mlp", "norms", "head", "other")
PART_OF_WORD = {"attn": "attention", "attention": "attention", **dict.fromkeys(("mlp", "moe", "expert", "ffn"), "mlp")}


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts by part, and each parameter's part and shape; a tied head counts 0."""

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
        """Parameters without the embedding and an untied head."""
        return self.total - self.embeddings - self.head

    @property
    def matrix_parameters(self) -> int:
        """Weights that each token is multiplied with; the embedding only as a shared head."""
        matrices = [shape for part, shape in self.shapes if part in ("attention", "mlp") and len(shape) == 2]
        return sum(map(math.prod, matrices)) + self.config.vocab_size * self.config.hidden_size

    def optimizer_bytes(self, optimizer: str) -> int:
        """Returns the bytes of an optimizer's states."""
        return 4 * sum(state_values(optimizer, part, shape) for part, shape in self.shapes)

    def forward_flops_per_token(self, sequence: int) -> int:
        """Returns the FLOPs of a forward pass for one token of a sequence; the causal mask saves none.

        Source: Chowdhery et al. 2022 (PaLM), arXiv 2204.02311, appendix B; layers with a window count the window.
        """
        c = self.config
        keys = sum(sequence if kind == "full_attention" else min(sequence, c.sliding_window) for kind in c.layer_types)
        return 2 * self.matrix_parameters + 4 * c.num_attention_heads * c.head_dim * keys

    def training_flops_per_token(self, sequence: int) -> int:
        """Returns the FLOPs of a training step for one token: the backward pass costs twice the forward pass."""
        return 3 * self.forward_flops_per_token(sequence)

    def kv_cache_bytes_per_token(self, dtype: str = "bf16") -> int:
        """Returns the bytes of a token's keys and values; layers with a window keep no more than the window."""
        c = self.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * BYTES[dtype]


def state_values(optimizer: str, part: str, shape: tuple[int, ...]) -> int:
    """Returns how many values of 4 bytes an optimizer keeps of a parameter of this part and shape."""
    count = math.prod(shape)
    if optimizer == "adafactor":
        return sum(shape[-2:]) * math.prod(shape[:-2])  # a matrix's row and column sums
    if optimizer == "muon" and part in ("attention", "mlp") and len(shape) == 2:
        return count  # the momentum; the rest is AdamW's
    if "8bit" in optimizer and part != "embeddings" and count >= 4096:  # bitsandbytes: 1 byte a value, 4 a block
        count = count // 4 + math.ceil(count / 256)
    return count if "lion" in optimizer else 2 * count


def measure(config: PreTrainedConfig) -> ModelSize:
    """Counts the parameters of llmlab's decoder or any other architecture, without allocating them."""
    model = empty_model(config)
    shapes = tuple((_part_of(model, name), tuple(parameter.shape)) for name, parameter in model.named_parameters())
    counts = {part: sum(math.prod(shape) for kind, shape in shapes if kind == part) for part in PARTS}
    return ModelSize(config=config, **counts, shapes=shapes)


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Returns a model on the meta device, with the head that its weights were saved with."""
    with torch.device("meta"):
        scores = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
        own = getattr(config, "auto_map", None) or ()
        writes = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own
        kind = "ForSequenceClassification" if scores else "ForCausalLM" if writes else ""
        auto = getattr(transformers, f"AutoModel{kind}")
        model = auto.from_config(config, trust_remote_code=remote_code_allowed())
    model.tie_weights()
    return model


def adapter_parameters(config: PreTrainedConfig, adapter: "PeftConfig") -> int:
    """Counts the parameters that an adapter adds to a model of this configuration."""
    from peft import get_peft_model  # a second or two, for those who need it

    adapter.inference_mode = False
    model = get_peft_model(empty_model(config), adapter, low_cpu_mem_usage=True)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _part_of(model: PreTrainedModel, name: str) -> str:
    """Returns the part of the model that a parameter belongs to."""
    path, _, _ = name.rpartition(".")
    module = model.get_submodule(path)
    if module is model.get_output_embeddings() or path in ("score", "classifier"):
        return "head"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if "norm" in type(module).__name__.lower():
        return "norms"
    return next((part for word, part in PART_OF_WORD.items() if word in path.lower()), "other")

"""The configuration of llmlab's decoder: Hugging Face's names are its fields, the seed's names work as aliases.

This file is saved beside the weights, so it imports Transformers alone.  It completes and checks values; they are
chosen in `build`.
"""

import os
import shutil
from pathlib import Path

from transformers import LlamaConfig, PreTrainedConfig

# saved beside the weights, for machines without llmlab; they import each other by relative paths
CODE_FILES = ("configuration.py", "positions.py", "blocks.py", "norms.py", "attention.py", "loss.py", "modeling.py")
CHOICES = {
    "positional_encoding": ("sinusoidal", "rope", "alibi", "yarn"),
    "attention_type": ("mha", "mqa", "gqa"),
    "norm_type": ("layernorm", "rmsnorm"),
    "hidden_act": ("relu", "gelu", "silu", "leaky_relu", "swiglu", "relu2"),
    "initialization": ("normal", "zero_outputs"),
}
LAYER_TYPES = ("full_attention", "sliding_attention")


class LLMLabConfig(PreTrainedConfig):
    """Shape and options of the decoder; the defaults are Qwen2.5-0.5B's shape, about 494 million parameters.

    Fields that Llama's configuration has mean the same here. Source: seed, LLM-Lab document, "Model Configuration".
    """

    model_type = "llmlab"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "d_model": "hidden_size",
        "d_ff": "intermediate_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "max_seq_len": "max_position_embeddings",
        "activation": "hidden_act",
        "norm_eps": "rms_norm_eps",
    }
    base_model_tp_plan = LlamaConfig.base_model_tp_plan  # the modules have Llama's names
    base_model_pp_plan = LlamaConfig.base_model_pp_plan

    vocab_size: int = 151936
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int | None = None  # by attention_type; 2 for gqa
    head_dim: int | None = None  # hidden_size / num_attention_heads
    attention_type: str = "gqa"
    positional_encoding: str = "rope"
    norm_type: str = "rmsnorm"  # of either, rms_norm_eps is the epsilon
    hidden_act: str = "swiglu"
    max_position_embeddings: int = 1024
    rope_parameters: dict | None = None  # of rope and yarn: rope_theta, rope_type, factor, ...
    sliding_window: int | None = None  # keys that a query attends to, its own among them
    layer_types: list[str] | None = None  # all sliding where there is a window, else all full
    attention_bias: bool = False
    attention_output_bias: bool | None = None  # as attention_bias
    dropout: float = 0.0  # of the embeddings and of each sublayer's output
    attention_dropout: float | None = None  # of the attention weights; as dropout
    rms_norm_eps: float = 1e-6
    value_embeddings: bool = False  # see `LLMLabAttention`
    qk_norm: bool = False  # an RMSNorm on each head's queries and keys, as in Qwen3
    initialization: str = "normal"  # see `LLMLabPreTrainedModel._init_weights`
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        for alias in self.attribute_map.keys() & kwargs.keys():
            setattr(self, alias, kwargs.pop(alias))
        self._check_fields()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = {"mha": self.num_attention_heads, "mqa": 1, "gqa": 2}[self.attention_type]
        if self.head_dim is None:
            self._check_divides("hidden_size", "num_attention_heads")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.attention_dropout is None:
            self.attention_dropout = self.dropout
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        if self.uses_rope:
            self._complete_rope_parameters()
        elif self.rope_parameters:
            raise ValueError(f"rope_parameters has no meaning with positional_encoding = {self.positional_encoding}")
        super().__post_init__(**kwargs)
        if not self.is_gated:  # a plan must name no module that is not there
            self.base_model_tp_plan = {key: how for key, how in self.base_model_tp_plan.items() if "gate" not in key}
        if self.qk_norm:
            norms = dict.fromkeys((f"layers.*.self_attn.{x}_norm" for x in "qk"), "replicated_with_grad_allreduce")
            self.base_model_tp_plan = self.base_model_tp_plan | norms
        if not self.uses_rope:
            self.rope_parameters = None  # the parent fills in defaults for every configuration that has the field
        self.auto_map = {
            "AutoConfig": "configuration.LLMLabConfig",
            "AutoModel": "modeling.LLMLabModel",
            "AutoModelForCausalLM": "modeling.LLMLabForCausalLM",
            "AutoModelForSequenceClassification": "modeling.LLMLabForSequenceClassification",
        }
        self.check()

    @property
    def uses_rope(self) -> bool:
        """Whether queries and keys get rotary embeddings."""
        return self.positional_encoding in ("rope", "yarn")

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layers have a gate."""
        return self.hidden_act == "swiglu"

    def check(self) -> None:
        """Raises ValueError where values contradict each other; the model calls it too, since fields can be set."""
        self._check_fields()
        self._check_divides("num_attention_heads", "num_key_value_heads")
        expected = {"mha": self.num_attention_heads, "mqa": 1}.get(self.attention_type, self.num_key_value_heads)
        if self.num_key_value_heads != expected:
            raise ValueError(
                f"num_key_value_heads = {self.num_key_value_heads} contradicts attention_type = "
                f"{self.attention_type}, which has {expected}; expected attention_type = gqa, or leave one out"
            )
        if self.uses_rope and self.head_dim % 2:
            raise ValueError(
                f"head_dim = {self.head_dim}: {self.positional_encoding} rotates pairs, so it must be even"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            found, expected = len(self.layer_types), self.num_hidden_layers
            raise ValueError(f"layer_types has {found} entries; expected num_hidden_layers = {expected}")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("sliding_window = None contradicts layer_types, where a layer is sliding_attention")

    def _check_fields(self) -> None:
        """Checks each field by itself."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} = {getattr(self, name)}: expected one of {', '.join(choices)}")
        for kind in self.layer_types or ():
            if kind not in LAYER_TYPES:
                raise ValueError(f"layer_types has {kind}: expected {' or '.join(LAYER_TYPES)}")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        optional = ("num_key_value_heads", "head_dim", "sliding_window")
        for name in (*sizes, "max_position_embeddings", *optional):
            value = getattr(self, name)
            if not (isinstance(value, int) and value > 0) and not (name in optional and value is None):
                raise ValueError(f"{name} = {value}: expected a whole number of at least 1")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least 0 and less than 1")

    def _check_divides(self, whole: str, part: str) -> None:
        number, divisor = getattr(self, whole), getattr(self, part)
        if number % divisor:
            raise ValueError(f"{whole} = {number} is not divisible by {part} = {divisor}")

    def _complete_rope_parameters(self) -> None:
        parameters = dict(self.rope_parameters or {})
        if self.positional_encoding == "yarn":
            parameters = {"rope_type": "yarn", "factor": 4.0, **parameters}
            original = int(self.max_position_embeddings / parameters["factor"])
            parameters.setdefault("original_max_position_embeddings", max(original, 1))
        kind = parameters.get("rope_type", "default")
        if (kind == "yarn") != (self.positional_encoding == "yarn"):
            problem = f"rope_type = {kind} beside positional_encoding = {self.positional_encoding}"
            expected = "yarn" if kind == "yarn" else "rope"
            raise ValueError(f"rope_parameters has {problem}; expected positional_encoding = {expected}")
        self.rope_parameters = parameters

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Saves the configuration and the model's code; a model saves its configuration through this method too.

        Transformers' own way of saving code would copy torch's file in place of ours from a model that FSDP wraps.
        """
        os.makedirs(save_directory, exist_ok=True)
        for name in CODE_FILES:
            source, target = Path(__file__).with_name(name), Path(save_directory, name)
            # a configuration that was loaded by itself from a folder came without the model's code
            if source.exists() and source.resolve() != target.resolve():
                shutil.copyfile(source, target)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


__all__ = ["LLMLabConfig"]

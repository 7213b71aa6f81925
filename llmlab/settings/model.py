"""The architecture of a decoder trained from nothing, in the seed's words.

`llmlab.model.build_config` turns these settings into a Transformers configuration.
Source: seed, LLM-Lab document, "Model Configuration".
"""

from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field, model_validator

from llmlab.settings.base import Alias, Settings, When
from llmlab.settings.paths import PathName, Reads
from llmlab.settings.vocabulary import conflict


class ModelSettings(Settings):
    """The decoder's shape. The defaults are Qwen2.5-0.5B's: about 494 million parameters."""

    panel: ClassVar[str] = "Model"

    tokenizer_name: Annotated[PathName, Reads("path")] = Field(
        "Qwen/Qwen2.5-0.5B", description="Tokenizer: a hub id, a folder, or a tokenizer.json file.", min_length=1
    )
    positional_encoding: Literal["sinusoidal", "rope", "alibi", "yarn"] = Field(
        "rope", description="How positions are told: added sines, rotation, distance penalties, or stretched rotation."
    )
    attention_type: Literal["mha", "mqa", "gqa"] = Field(
        "gqa", description="Key/value heads: one each (mha), one for all (mqa), or n_kv_heads groups (gqa)."
    )
    norm_type: Literal["layernorm", "rmsnorm"] = Field("rmsnorm", description="Normalization of activations.")
    activation: Annotated[Literal["relu", "gelu", "silu", "leaky_relu", "swiglu"], Alias("hidden_act")] = Field(
        "swiglu", description="Feed-forward activation; swiglu is gated and has half as many weights again."
    )
    d_model: Annotated[int, Gt(0), Alias("hidden_size")] = Field(
        896, description="Width of embeddings and hidden states."
    )
    n_heads: Annotated[int, Gt(0), Alias("num_attention_heads")] = Field(14, description="Attention heads.")
    n_kv_heads: Annotated[int, Gt(0), Alias("num_key_value_heads"), When("attention_type", "gqa")] = Field(
        2, description="Key/value heads of grouped-query attention."
    )
    d_ff: Annotated[int, Gt(0), Alias("intermediate_size")] = Field(
        4864, description="Width of the feed-forward layers (4 x d_model, or 2.67 x with swiglu, is usual)."
    )
    n_layers: Annotated[int, Gt(0), Le(10_000), Alias("num_hidden_layers")] = Field(24, description="Decoder layers.")
    vocab_size: Annotated[int, Gt(0)] = Field(
        151936, description="Rows of the embedding; follows the tokenizer unless set, and is never smaller than it."
    )
    max_seq_len: Annotated[int, Gt(1), Alias("max_position_embeddings", "max_seq_length", "max_length")] = Field(
        1024, description="Longest sequence in tokens."
    )
    dropout: Annotated[float, Ge(0), Lt(1)] = Field(
        0.0, description="Share of activations dropped in training (0.1 helps on small data)."
    )
    sliding_window: Annotated[int | None, Gt(0)] = Field(
        None, description="Tokens each token may look back; none is all."
    )
    attention_bias: bool = Field(False, description="Biases in the attention projections.")
    norm_eps: Annotated[float, Gt(0), Alias("rms_norm_eps", "layer_norm_eps")] = Field(
        1e-6, description="Term against division by 0 in the normalization."
    )
    tie_word_embeddings: bool = Field(True, description="Share the input embedding with the output head.")
    rope_theta: Annotated[float, Gt(0), When("positional_encoding", "rope", "yarn")] = Field(
        10000.0, description="Base of the rotation's wavelengths."
    )
    yarn_factor: Annotated[float, Gt(1), When("positional_encoding", "yarn")] = Field(
        4.0, description="How many times longer than its original length the context becomes."
    )
    yarn_original_max_seq_len: Annotated[
        int | None, Gt(0), Alias("original_max_position_embeddings"), When("positional_encoding", "yarn")
    ] = Field(None, description="Length before stretching; none is max_seq_len / yarn_factor.")
    initializer_range: Annotated[float, Gt(0)] = Field(0.02, description="Standard deviation of the initial weights.")

    @model_validator(mode="after")
    def check_heads(self) -> "ModelSettings":
        if self.d_model % self.n_heads:
            near = nearest_divisor(self.d_model, self.n_heads)
            raise conflict(
                f"d_model = {self.d_model} is not divisible by n_heads = {self.n_heads}; "
                f"the nearest number of heads that divides it is {near}",
                "d_model",
                "n_heads",
            )
        if self.attention_type == "gqa" and self.n_heads % self.n_kv_heads:
            near = nearest_divisor(self.n_heads, self.n_kv_heads)
            raise conflict(
                f"n_heads = {self.n_heads} is not divisible by n_kv_heads = {self.n_kv_heads}; "
                f"the nearest number of key/value heads that divides it is {near}",
                "n_heads",
                "n_kv_heads",
            )
        if self.positional_encoding in ("rope", "yarn") and (self.d_model // self.n_heads) % 2:
            raise conflict(
                f"{self.positional_encoding} rotates pairs, so d_model / n_heads must be even; "
                f"{self.d_model} / {self.n_heads} is {self.d_model // self.n_heads}",
                "d_model",
                "n_heads",
                "positional_encoding",
            )
        original = self.yarn_original_max_seq_len
        if self.positional_encoding == "yarn" and original is not None and original >= self.max_seq_len:
            raise conflict(
                f"yarn_original_max_seq_len = {original} must be shorter than max_seq_len = {self.max_seq_len}",
                "max_seq_len",
                "yarn_original_max_seq_len",
            )
        return self


def nearest_divisor(number: int, wanted: int) -> int:
    """Returns the divisor of a number that is nearest to the wanted one, the larger of two equally near."""
    below = next(d for d in range(min(wanted, number), 0, -1) if number % d == 0)
    above = next((d for d in range(wanted, min(number, 2 * wanted - below) + 1) if number % d == 0), below)
    return above

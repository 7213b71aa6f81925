"""The architecture of a decoder trained from scratch, in the seed's words; `llmlab.model.build_config` turns these
settings into a Transformers configuration."""

from collections.abc import Iterator
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from llmlab.settings.base import Alias, Settings, When
from llmlab.settings.paths import PathName, Reads

ACTIVATIONS = ("relu", "gelu", "silu", "leaky_relu", "swiglu", "relu2")
YARN = When("positional_encoding", "yarn")


class ModelSettings(Settings, panel="Model"):
    """The decoder's shape, by default Qwen2.5-0.5B's. Source: seed, LLM-Lab document, "Model Configuration"."""

    tokenizer_name: Annotated[PathName, Reads("path")] = "Qwen/Qwen2.5-0.5B"
    """Tokenizer: a hub id, a folder, or a tokenizer.json file."""
    positional_encoding: Literal["sinusoidal", "rope", "alibi", "yarn"] = "rope"
    """Position encoding: sinusoidal added to the embeddings, rotary (rope), ALiBi's linear attention biases, or YaRN
    (rope scaled to a longer context)."""
    attention_type: Literal["mha", "mqa", "gqa"] = "gqa"
    """Multi-head, multi-query or grouped-query attention: one key/value head per query head, one in all, or
    n_kv_heads."""
    norm_type: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    """Normalization layers."""
    activation: Annotated[Literal[ACTIVATIONS], Alias("hidden_act")] = "swiglu"  # type: ignore[valid-type]
    """Activation of the feed-forward layers; swiglu is gated and has a third matrix, relu2 is the square of relu."""
    d_model: Annotated[int, Gt(0), Alias("hidden_size")] = 896
    """Hidden size."""
    n_heads: Annotated[int, Gt(0), Alias("num_attention_heads")] = 14
    """Attention heads."""
    n_kv_heads: Annotated[int, Gt(0), Alias("num_key_value_heads"), When("attention_type", "gqa")] = 2
    """Key/value heads of grouped-query attention."""
    d_ff: Annotated[int, Gt(0), Alias("intermediate_size")] = 4864
    """Hidden size of the feed-forward layers; usually 4 x d_model, or 2.67 x with swiglu."""
    n_layers: Annotated[int, Gt(0), Le(10_000), Alias("num_hidden_layers")] = 24
    """Decoder layers."""
    vocab_size: Annotated[int, Gt(0)] = 151936
    """Rows of the embedding; the tokenizer's size unless set, and never smaller."""
    max_seq_len: Annotated[int, Gt(1), Alias("max_position_embeddings", "max_seq_length", "max_length")] = 1024
    """Context length in tokens, and the length of a packed row."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout probability; 0.1 helps on small data."""
    sliding_window: Annotated[int | None, Gt(0)] = None
    """Sliding-window attention over this many tokens; none is full attention."""
    attention_bias: bool = False
    """Biases in the attention projections."""
    norm_eps: Annotated[float, Gt(0), Alias("rms_norm_eps", "layer_norm_eps")] = 1e-6
    """Epsilon of the normalization layers."""
    qk_norm: bool = False
    """Normalize each head's queries and keys (RMSNorm, before rotary embeddings), as Qwen3 does."""
    value_embeddings: bool = False
    """Add a learned vector of each token to the attention values of each layer: a lower loss on small corpora, and
    n_layers more tables of the vocabulary."""
    tie_word_embeddings: bool = True
    """Share the weights of the input embedding and the output head."""
    rope_theta: Annotated[float, Gt(0), When("positional_encoding", "rope", "yarn")] = 10000.0
    """Base of the rotary frequencies."""
    yarn_factor: Annotated[float, Gt(1), YARN] = 4.0
    """YaRN's factor: the context length divided by the original one."""
    yarn_original_max_seq_len: Annotated[int | None, Gt(0), Alias("original_max_position_embeddings"), YARN] = None
    """Context length before YaRN; none is max_seq_len / yarn_factor."""
    initializer_range: Annotated[float, Gt(0)] = 0.02
    """Standard deviation of the initial weights."""
    initialization: Literal["normal", "zero_outputs"] = "normal"
    """Initial weights: normal with initializer_range, or zero in the last matrix of each sublayer and uniform with
    variance 1 / fan_in in the others (0.4 times as wide before relu2), beside N(0, 0.8) in the embedding and
    N(0, 0.001) in the head, if untied."""

    def contradictions(self) -> Iterator[str]:
        width, heads, groups = self.d_model, self.n_heads, self.n_kv_heads
        if width % heads:
            yield (
                f"d_model = {width} is not divisible by n_heads = {heads}; "
                f"the nearest number of heads that divides it is {nearest_divisor(width, heads)}"
            )
        if self.attention_type == "gqa" and heads % groups:
            yield (
                f"n_heads = {heads} is not divisible by n_kv_heads = {groups}; "
                f"the nearest number of key/value heads that divides it is {nearest_divisor(heads, groups)}"
            )
        if self.positional_encoding in ("rope", "yarn") and not width % heads and width // heads % 2:
            yield (
                f"positional_encoding = {self.positional_encoding} rotates pairs, so d_model / n_heads must be even; "
                f"{width} / {heads} is {width // heads}"
            )
        original = self.yarn_original_max_seq_len
        if self.positional_encoding == "yarn" and original is not None and original >= self.max_seq_len:
            yield f"yarn_original_max_seq_len = {original} must be shorter than max_seq_len = {self.max_seq_len}"


def nearest_divisor(number: int, wanted: int) -> int:
    """Returns the divisor of a number that is nearest to the wanted one, the larger of two equally near."""
    below = next(divisor for divisor in range(min(wanted, number), 0, -1) if number % divisor == 0)
    largest = min(number, 2 * wanted - below)
    return next((divisor for divisor in range(wanted, largest + 1) if number % divisor == 0), below)

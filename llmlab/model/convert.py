"""Converts Llama, Mistral, Qwen2 and Qwen3 models to llmlab's decoder and back: the same tensors under the same names.

Only the configuration is translated; an option that the other side cannot express is refused by name.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from llmlab.model.build import load_model
from llmlab.model.configuration import LLMLabConfig
from llmlab.model.modeling import LLMLabForCausalLM
from llmlab.settings.errors import UserError, did_you_mean

FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
SHARED_FIELDS = LLMLabConfig.__annotations__.keys() & LlamaConfig.__annotations__.keys() - {
    "hidden_act",  # the families' silu is gated
    "attention_bias",  # Mistral has no such field, and Qwen2 has biases without one
}
PROBE_TOKENS, LONGEST_PROBE = 48, 512


def to_llmlab(source: PreTrainedModel | str | Path) -> LLMLabForCausalLM:
    """Returns a Llama, Mistral, Qwen2 or Qwen3 model, or the folder or hub id of one, as llmlab's decoder."""
    model = source if isinstance(source, PreTrainedModel) else load_model(source, dtype=None)
    config = model.config
    if config.model_type not in FAMILIES:
        raise UserError(f"model_type = {config.model_type}: expected one of {', '.join(FAMILIES)}")
    if config.hidden_act not in ("silu", "swish"):
        raise UserError(f"hidden_act = {config.hidden_act} in a gated feed-forward layer: expected silu")
    if getattr(config, "mlp_bias", False):
        raise UserError("mlp_bias = True: llmlab's feed-forward layers have no biases")
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    bias = getattr(config, "attention_bias", False)
    converted = LLMLabConfig(
        **{name: getattr(config, name, None) for name in SHARED_FIELDS},  # Qwen2 has no head_dim
        hidden_act="swiglu",
        positional_encoding="yarn" if config.rope_parameters["rope_type"] == "yarn" else "rope",
        attention_type="mha" if key_value_heads == heads else "mqa" if key_value_heads == 1 else "gqa",
        qk_norm=config.model_type == "qwen3",
        attention_bias=config.model_type == "qwen2" or bias,
        attention_output_bias=bias,
        sliding_window=getattr(config, "sliding_window", None),
        layer_types=getattr(config, "layer_types", None),
    )
    return _transfer_weights(model, LLMLabForCausalLM, converted)


def from_llmlab(model: LLMLabForCausalLM, family: str) -> PreTrainedModel:
    """Returns llmlab's decoder as a model of another family: `llama`, `mistral`, `qwen2` or `qwen3`."""
    if family not in FAMILIES:
        raise UserError(f"family = {family}: expected one of {', '.join(FAMILIES)}{did_you_mean(family, FAMILIES)}")
    config = model.config
    windows, biases = set(config.layer_types), (config.attention_bias, config.attention_output_bias)
    possible_biases = {"mistral": [(False, False)], "qwen2": [(True, False)]}
    possible = {  # dropout is left behind
        "positional_encoding": config.uses_rope,
        "qk_norm": config.qk_norm == (family == "qwen3"),
        "value_embeddings": not config.value_embeddings,
        "norm_type": config.norm_type == "rmsnorm",
        "activation": config.is_gated,
        "sliding_window": family != "llama" or windows == {"full_attention"},
        "layer_types": family != "mistral" or len(windows) == 1,
        "attention_bias": biases in possible_biases.get(family, [(False, False), (True, True)]),
    }
    if obstacle := next((name for name, fits in possible.items() if not fits), None):
        raise UserError(f"{obstacle} = {getattr(config, obstacle)}, which {family} cannot express")
    options: dict[str, Any] = {name: getattr(config, name) for name in SHARED_FIELDS} | {"hidden_act": "silu"}
    slides = "sliding_attention" in windows
    if family in ("llama", "qwen3"):
        options["attention_bias"] = config.attention_bias
    if family != "llama":
        options["sliding_window"] = config.sliding_window if slides else None
    if family in ("qwen2", "qwen3"):
        options |= {"use_sliding_window": slides, "layer_types": config.layer_types}
    config_class, model_class = FAMILIES[family]
    return _transfer_weights(model, model_class, config_class(**options))


def _transfer_weights(source: PreTrainedModel, kind: type[PreTrainedModel], config: PreTrainedConfig) -> Any:
    """Returns a model with the source's weights, once its logits are equal."""
    weights = {name: weight.clone() for name, weight in source.state_dict().items()}
    options = {"config": config, "dtype": source.dtype, "attn_implementation": "sdpa"}
    target = kind.from_pretrained(None, state_dict=weights, **options)
    target.generation_config = source.generation_config
    target.to(source.device)
    _check_logits(source, target)
    return target


@torch.no_grad()
def _check_logits(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Raises RuntimeError where the logits for random tokens differ by more than rounding explains."""
    length = min((getattr(source.config, "sliding_window", None) or 0) + PROBE_TOKENS, LONGEST_PROBE)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, source.config.vocab_size, (1, length), generator=generator).to(source.device)
    was_training = source.training
    expected, found = (model.eval()(tokens, use_cache=False).logits.float() for model in (source, target))
    for model in (source, target):
        model.train(was_training)
    tolerance = max(1e-5, 4 * torch.finfo(source.dtype).eps) * max(expected.abs().max().item(), 1.0)
    if not (difference := (expected - found).abs().max().item()) <= tolerance:
        raise RuntimeError(f"the converted model's logits differ by {difference:.2g}, more than {tolerance:.2g}")

"""Weights of Llama, Mistral and Qwen2 into llmlab's decoder and back: the same tensors under the same names.

Only the configuration is translated, by one table a direction; what the other side cannot express is refused by name.
Each conversion compares the logits of both models before it returns.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llmlab.model.build import load_model
from llmlab.model.configuration import LLMLabConfig
from llmlab.model.modeling import LLMLabForCausalLM
from llmlab.settings.errors import UserError, did_you_mean

FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "tie_word_embeddings",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
PROBE_TOKENS, LONGEST_PROBE = 48, 512


def to_llmlab(source: PreTrainedModel | str | Path) -> LLMLabForCausalLM:
    """Returns a Llama, Mistral or Qwen2 model as llmlab's decoder, with weights and precision as they are.

    Args:
        source: the model, or the folder or hub id of one.

    Raises:
        UserError: another family, or an option that llmlab's decoder does not have.
        RuntimeError: the two models' logits differ, which is a fault of this module.
    """
    model = source if isinstance(source, PreTrainedModel) else load_model(source, dtype=None)
    config = model.config
    if config.model_type not in FAMILIES:
        raise UserError(f"model_type = {config.model_type}: expected one of {', '.join(FAMILIES)}")
    return _with_weights_of(model, LLMLabForCausalLM, _config_to_llmlab(config))


def from_llmlab(model: LLMLabForCausalLM, family: str) -> PreTrainedModel:
    """Returns llmlab's decoder as a model of another family, which runs wherever that family does.

    Args:
        model: the decoder.
        family: `llama`, `mistral` or `qwen2`.

    Raises:
        UserError: there is no such family, or it cannot express one of the decoder's options.
        RuntimeError: the two models' logits differ, which is a fault of this module.
    """
    if family not in FAMILIES:
        raise UserError(f"family = {family}: expected one of {', '.join(FAMILIES)}{did_you_mean(family, FAMILIES)}")
    if obstacle := find_obstacle(model.config, family):
        raise UserError(f"{obstacle}, which {family} cannot express")
    config_class, model_class = FAMILIES[family]
    return _with_weights_of(model, model_class, config_class(**_options_of(model.config, family)))


def find_obstacle(config: LLMLabConfig, family: str) -> str | None:
    """Returns the first option, with its value, that a family cannot express, or None where it can express all.

    Dropout of the residual stream is no obstacle: it acts in training alone, and is left behind.
    """
    windows = set(config.layer_types)
    biases = (config.attention_bias, config.attention_output_bias)
    possible = {
        "positional_encoding": config.uses_rope,
        "norm_type": config.norm_type == "rmsnorm",
        "activation": config.is_gated,
        "sliding_window": family != "llama" or windows == {"full_attention"},
        "layer_types": family != "mistral" or len(windows) == 1,
        "attention_bias": biases
        in {"llama": [(False, False), (True, True)], "mistral": [(False, False)]}.get(family, [(True, False)]),
    }
    return next((f"{name} = {getattr(config, name)}" for name, fits in possible.items() if not fits), None)


def _options_of(config: LLMLabConfig, family: str) -> dict[str, Any]:
    options = {name: getattr(config, name) for name in SHARED_FIELDS} | {"hidden_act": "silu"}
    if family == "llama":
        options["attention_bias"] = config.attention_bias
    else:
        slides = "sliding_attention" in config.layer_types  # the window of other families holds for every layer
        options["sliding_window"] = config.sliding_window if slides else None
    if family == "qwen2":
        options |= {"use_sliding_window": slides, "layer_types": config.layer_types}
    return options


def _config_to_llmlab(config: PreTrainedConfig) -> LLMLabConfig:
    family = config.model_type
    if config.hidden_act not in ("silu", "swish"):
        raise UserError(f"hidden_act = {config.hidden_act} in a gated feed-forward layer: expected silu")
    if getattr(config, "mlp_bias", False):
        raise UserError("mlp_bias = True: llmlab's feed-forward layers have no biases")
    options = {name: getattr(config, name) for name in SHARED_FIELDS if name != "head_dim"}
    options["head_dim"] = getattr(config, "head_dim", None)  # Qwen2 has no such field
    heads, key_values = config.num_attention_heads, config.num_key_value_heads
    yarn = config.rope_parameters["rope_type"] == "yarn"
    return LLMLabConfig(
        **options,
        hidden_act="swiglu",
        positional_encoding="yarn" if yarn else "rope",
        attention_type="mha" if key_values == heads else "mqa" if key_values == 1 else "gqa",
        attention_bias=family == "qwen2" or getattr(config, "attention_bias", False),
        attention_output_bias=getattr(config, "attention_bias", False),
        sliding_window=getattr(config, "sliding_window", None),
        layer_types=getattr(config, "layer_types", None),
    )


def _with_weights_of(
    source: PreTrainedModel, target_class: type[PreTrainedModel], config: PreTrainedConfig
) -> PreTrainedModel:
    weights = {name: weight.clone() for name, weight in source.state_dict().items()}
    target = target_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=source.dtype, attn_implementation="sdpa"
    )
    target.generation_config = source.generation_config
    target.to(source.device).train(source.training)
    difference, tolerance = compare_logits(source, target)
    if not difference <= tolerance:
        raise RuntimeError(f"the converted model's logits differ by {difference:.2g}, more than {tolerance:.2g}")
    return target


@torch.no_grad()
def compare_logits(first: PreTrainedModel, second: PreTrainedModel) -> tuple[float, float]:
    """Returns the largest difference of two models' logits on fixed tokens, and how much of it rounding explains.

    Args:
        first: a causal language model.
        second: another with the same vocabulary, on the same device.
    """
    generator = torch.Generator().manual_seed(0)
    past_window = min((getattr(first.config, "sliding_window", None) or 0) + 8, LONGEST_PROBE)
    length = max(PROBE_TOKENS, past_window)
    tokens = torch.randint(0, first.config.vocab_size, (1, length), generator=generator).to(first.device)
    logits = []
    for model in (first, second):
        was_training = model.training
        logits.append(model.eval()(tokens, use_cache=False).logits.float())  # (batch, time, vocabulary)
        model.train(was_training)
    largest = max(logits[0].abs().max().item(), 1.0)
    return (logits[0] - logits[1]).abs().max().item(), max(1e-5, 4 * torch.finfo(first.dtype).eps) * largest

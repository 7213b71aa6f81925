"""From settings, or a folder, to a model: the places where llmlab makes or loads a decoder.

Training it is not done here, and neither is choosing a device.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmlab.model.configuration import LLMLabConfig
from llmlab.model.modeling import LLMLabForCausalLM
from llmlab.settings.errors import UserError
from llmlab.settings.model import ModelSettings


def build_config(
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    vocab_size: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> LLMLabConfig:
    """Returns the configuration of the decoder that the settings describe.

    Args:
        settings: the architecture, in the seed's words.
        tokenizer: whose special tokens to take over, where they are not given.
        vocab_size: rows of the embedding; None is the settings'.
        bos_token_id: id of the token that begins a text.
        eos_token_id: id of the token that ends one.
        pad_token_id: id of the token that fills rows up.

    Source: seed, LLM-Lab document, "Model Configuration".
    """
    special = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    if tokenizer is not None:
        special = {name: getattr(tokenizer, name) if value is None else value for name, value in special.items()}
    rope = None
    if settings.positional_encoding in ("rope", "yarn"):
        rope = {"rope_type": "default", "rope_theta": settings.rope_theta}
    if settings.positional_encoding == "yarn":
        original = settings.yarn_original_max_seq_len or max(int(settings.max_seq_len / settings.yarn_factor), 1)
        rope |= {
            "rope_type": "yarn",
            "factor": settings.yarn_factor,
            "original_max_position_embeddings": original,
        }
    return LLMLabConfig(
        vocab_size=settings.vocab_size if vocab_size is None else vocab_size,
        hidden_size=settings.d_model,
        intermediate_size=settings.d_ff,
        num_hidden_layers=settings.n_layers,
        num_attention_heads=settings.n_heads,
        num_key_value_heads=settings.n_kv_heads if settings.attention_type == "gqa" else None,
        attention_type=settings.attention_type,
        positional_encoding=settings.positional_encoding,
        norm_type=settings.norm_type,
        hidden_act=settings.activation,
        max_position_embeddings=settings.max_seq_len,
        rope_parameters=rope,
        sliding_window=settings.sliding_window,
        attention_bias=settings.attention_bias,
        dropout=settings.dropout,
        rms_norm_eps=settings.norm_eps,
        initializer_range=settings.initializer_range,
        tie_word_embeddings=settings.tie_word_embeddings,
        **special,
    )


def new_model(config: LLMLabConfig, *, dtype: torch.dtype = torch.float32) -> LLMLabForCausalLM:
    """Returns an untrained decoder, initialized from torch's random state."""
    return LLMLabForCausalLM(config).to(dtype)


def load_config(source: str | Path) -> PreTrainedConfig:
    """Loads a model's configuration.

    Args:
        source: a run folder or a hub id.

    Raises:
        UserError: there is no such model, or its folder is broken.
    """
    _check_folder(source)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {str(error).splitlines()[0]}") from error


def load_model(
    source: str | Path, *, dtype: torch.dtype | None = torch.float32, trust_remote_code: bool | None = None
) -> PreTrainedModel:
    """Loads a causal language model, llmlab's or any other that Transformers knows.

    Args:
        source: a run folder or a hub id.
        dtype: of the weights; None is as saved.
        trust_remote_code: whether to run code that comes with the model; llmlab's own is never taken from there.

    Raises:
        UserError: there is no such model, or its folder is broken.
    """
    _check_folder(source)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype="auto" if dtype is None else dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{source}: {str(error).splitlines()[0]}") from error
    if absent := sorted(report["missing_keys"]):  # Transformers would go on with random weights
        raise UserError(f"{source} holds weights of another model: {len(absent)} are missing, such as {absent[0]}")
    return model


def _check_folder(source: str | Path) -> None:
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise UserError(f"{source} holds no config.json: expected a run folder with a model, or a hub id")

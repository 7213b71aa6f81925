"""A tiny decoder, with weights large enough that a token that must not be seen would change the logits."""

from collections.abc import Callable

import pytest
import torch

from llmlab.model import LLMLabConfig, LLMLabForCausalLM

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture
def tiny_config() -> Callable[..., LLMLabConfig]:
    return lambda **options: LLMLabConfig(**{**TINY, **options})


@pytest.fixture
def tiny_model(tiny_config) -> Callable[..., LLMLabForCausalLM]:
    def build(implementation: str = "sdpa", **options) -> LLMLabForCausalLM:
        torch.manual_seed(0)
        config = tiny_config(**options)
        config._attn_implementation = implementation
        return LLMLabForCausalLM(config).eval()

    return build

"""The tiny model that the optimizer tests share, and how they drive it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmlab.optim.build import build_optimizer
from llmlab.settings.optimizer import OptimizerSettings


def _tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 24,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))


def _build(model, name: str, lr: float = 1e-2, weight_decay: float = 0.1, **settings):
    settings = OptimizerSettings(optimizer=name, **settings)
    return build_optimizer(model, settings, learning_rate=lr, weight_decay=weight_decay)


def _set_gradients(model, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale


@pytest.fixture
def tiny_llama():
    """A function that makes a two-layer Llama with random weights."""
    return _tiny_llama


@pytest.fixture
def build():
    """A function that builds the named optimizer over a model."""
    return _build


@pytest.fixture
def set_gradients():
    """A function that gives every parameter of a model a random gradient."""
    return _set_gradients


@pytest.fixture(params=["adamw", "adafactor", "lion", "sophia", "muon"])
def optimizer_name(request) -> str:
    """Each optimizer in turn."""
    return request.param

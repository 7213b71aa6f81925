"""Counts against real models, optimizers and saved tensors; operations against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmlab.model import LLMLabConfig, measure
from llmlab.optim.build import build_optimizer
from llmlab.settings.training import PretrainSettings

OPTIMIZERS = ["adamw", "adafactor", "lion", "sophia", "muon"]


def test_default_by_part():
    size = measure(LLMLabConfig())
    assert size.embeddings == 151936 * 896 and size.head == 0
    assert size.attention == 24 * 2 * (896 * 896 + 896 * 128)
    assert size.mlp == 24 * 3 * 896 * 4864
    assert size.norms == 49 * 896
    assert size.total == size.embeddings + size.non_embedding
    untied = measure(LLMLabConfig(tie_word_embeddings=False))
    assert untied.head == size.embeddings and untied.non_embedding == size.non_embedding


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False, "attention_bias": True, "hidden_act": "relu"}])
def test_optimizer_states_take_as_many_bytes_as_counted(tiny_model, optimizer, options):
    model = tiny_model(**options)
    settings = PretrainSettings(optimizer=optimizer)
    stepping = build_optimizer(model, settings, learning_rate=1e-3, weight_decay=0.1)
    tokens = torch.arange(3, 12)[None]
    model(tokens, labels=tokens).loss.backward()
    stepping.step()
    kept = sum(
        value.nbytes
        for state in stepping.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1  # step counts are left out
    )
    assert measure(model.config).optimizer_bytes(optimizer) == kept


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False, "hidden_act": "gelu"}])
def test_operations_agree_with_torchs_count(tiny_model, options):
    model = tiny_model("eager", **options)
    tokens = torch.randint(3, 64, (2, 32))
    with FlopCounterMode(display=False) as forward:
        loss = model(tokens, labels=tokens).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    size = measure(model.config)
    assert size.forward_flops_per_token(32) * tokens.numel() == forward.get_total_flops()
    total = forward.get_total_flops() + backward.get_total_flops()
    assert size.training_flops_per_token(32) * tokens.numel() == pytest.approx(total, rel=0.01)


def test_palm_formula():
    """6 N + 12 L H Q T, with N the weights that multiply."""
    size = measure(LLMLabConfig())
    n = size.total - size.norms
    assert size.training_flops_per_token(1024) == 6 * n + 12 * 24 * 14 * 64 * 1024
    windowed = measure(LLMLabConfig(sliding_window=128))
    assert windowed.training_flops_per_token(1024) == 6 * n + 12 * 24 * 14 * 64 * 128


def test_kv_cache():
    size = measure(LLMLabConfig())
    assert size.kv_cache_bytes_per_token("bf16") == 24 * 2 * 2 * 64 * 2
    assert size.kv_cache_bytes_per_token("fp32") == 2 * size.kv_cache_bytes_per_token("bf16")
    everyone = measure(LLMLabConfig(attention_type="mha"))
    assert everyone.kv_cache_bytes_per_token("bf16") == 7 * size.kv_cache_bytes_per_token("bf16")

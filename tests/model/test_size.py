"""Counts against real models, optimizers and saved tensors; operations against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmlab.model import LLMLabConfig, LLMLabForCausalLM, measure
from llmlab.optim.build import build_optimizer
from llmlab.settings.pretrain import PretrainSettings

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


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"norm_type": "layernorm", "hidden_act": "gelu", "positional_encoding": "alibi"}, {"hidden_act": "relu"}],
)
def test_activations_are_estimated_within_a_quarter(dtype, options):
    config = LLMLabConfig(
        vocab_size=8, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, **options
    )
    config._attn_implementation = "sdpa"
    model = LLMLabForCausalLM(config).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        is_weight_copy = tensor.ndim == 2 and tensor.shape in shapes
        if storage.data_ptr() not in weights and not is_weight_copy:
            kept[storage.data_ptr()] = storage
        return tensor

    shapes = {s for p in model.parameters() if p.ndim == 2 for s in (p.shape, p.t().shape)}
    tokens = torch.randint(0, 8, (3, 50))  # 150 is the width of no weight
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"),
    ):
        hidden = model.model(tokens).last_hidden_state
    measured = sum(storage.nbytes() for storage in kept.values()) / tokens.numel()
    assert hidden.requires_grad
    assert measure(config).activation_bytes_per_token(dtype) == pytest.approx(measured, rel=0.25)


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


def test_training_memory():
    size = measure(LLMLabConfig())
    plain = size.training_memory("adamw", rows=2, sequence=512, dtype="fp32")
    assert (plain.weights, plain.gradients, plain.optimizer) == (4 * size.total, 4 * size.total, 8 * size.total)
    assert plain.total == sum((plain.weights, plain.gradients, plain.optimizer, plain.activations))
    mixed = size.training_memory("adamw", rows=2, sequence=512, dtype="bf16")
    assert mixed.weights > plain.weights and mixed.activations < plain.activations
    saved = size.training_memory("adamw", rows=2, sequence=512, dtype="bf16", gradient_checkpointing=True)
    assert saved.activations < 0.5 * mixed.activations
    assert size.training_memory("adamw", rows=4, sequence=512).activations > 1.5 * plain.activations


def test_kv_cache():
    size = measure(LLMLabConfig())
    assert size.kv_cache_bytes_per_token("bf16") == 24 * 2 * 2 * 64 * 2
    assert size.kv_cache_bytes_per_token("fp32") == 2 * size.kv_cache_bytes_per_token("bf16")
    everyone = measure(LLMLabConfig(attention_type="mha"))
    assert everyone.kv_cache_bytes_per_token("bf16") == 7 * size.kv_cache_bytes_per_token("bf16")

"""Attention in blocks against the textbook's formula in double precision, and where training uses it."""

from functools import partialmethod

import pytest
import torch

from llmlab.model import attention
from llmlab.model.blocks import BLOCK, block_attention
from llmlab.runs.policy import compile_layers


def reference(query, key, value, scaling):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    length = query.shape[2]
    later = torch.ones(length, length).triu(1).bool()
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def heads_of(batch, heads, time, dim, dtype):  # laid out as the projections leave them
    return torch.randn(batch, time, heads, dim).to(dtype).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("time", [2, BLOCK - 1, BLOCK, 2 * BLOCK + 7])
@pytest.mark.parametrize(("heads", "key_value_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_values_and_gradients(time, heads, key_value_heads, dtype, tolerance):
    torch.manual_seed(time)
    query = heads_of(2, heads, time, 8, dtype)
    key, value = (heads_of(2, key_value_heads, time, 8, dtype) for _ in range(2))
    mixed = block_attention(query, key, value, 0.3)
    direction = torch.randn(mixed.shape).to(dtype)
    gradients = torch.autograd.grad(mixed, (query, key, value), direction)
    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected = reference(*exact, 0.3)
    expected_gradients = torch.autograd.grad(expected, exact, direction.double())
    for found, wanted in zip((mixed, *gradients), (expected, *expected_gradients), strict=True):
        assert found.dtype == dtype
        assert (found - wanted).abs().mean() < tolerance * wanted.abs().mean()


def test_torchs_operator_checks():
    tensors = [heads_of(2, heads, 70, 8, torch.bfloat16) for heads in (4, 2, 2)]
    torch.library.opcheck(torch.ops.llmlab_model_blocks.block_attention.default, (*tensors, 0.3))


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of `block_attention` by the decoder."""
    made = []
    monkeypatch.setattr(attention, "block_attention", lambda *a: made.append(1) or block_attention(*a))
    return made


def random_tokens(length=40):
    return torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(0))


def test_training_in_bf16_uses_blocks_and_stays_near_fp32(tiny_model, calls):
    model = tiny_model().train()
    tokens = random_tokens()
    exact = model(tokens, labels=tokens).loss
    model.generate(tokens, max_new_tokens=2, eos_token_id=None)
    assert not calls
    exact.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert len(calls) == model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).norm() < 0.05 * expected[name].norm(), name


def test_scoring_in_bf16_gives_the_log_probabilities_of_training(tiny_model, calls):
    """Bit by bit: a policy's first KL from its frozen copy is 0."""
    model, tokens = tiny_model().train(), random_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        trained = model(tokens).logits.detach()
        with torch.no_grad():
            scored = model.eval().requires_grad_(False)(tokens).logits
    assert scored.equal(trained) and len(calls) == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        ({}, {"attention_mask": (random_tokens() > 5).long()}),
        ({"attention_dropout": 0.5}, {}),
        ({"sliding_window": 7}, {}),
        ({"positional_encoding": "alibi"}, {}),
        ({}, {"position_ids": torch.arange(40)[None] % 25}),
    ],
    ids=["padding", "dropout", "window", "alibi", "packed"],
)
def test_the_rest_is_left_to_transformers(tiny_model, calls, options, inputs):
    tokens = random_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        tiny_model(**options).train()(tokens, **inputs)
    assert not calls


def test_compiles_whole_in_bf16(tiny_model):
    torch._dynamo.reset()
    model = tiny_model().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = random_tokens()
    losses = []
    for each in (model, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(each(tokens, labels=tokens, return_logits=False).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, atol=1e-3, rtol=0)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_compiled_decoder_trains_the_same(tiny_model, monkeypatch, window, bf16):
    # everything but the generation of C++, which takes a minute
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    tokens = random_tokens(21)

    def loss_and_gradients(compiled):
        torch._dynamo.reset()
        model = tiny_model(sliding_window=window, num_key_value_heads=2).train()
        if compiled:
            compile_layers(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(tokens, labels=tokens, return_logits=False).loss
        loss.backward()
        return loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}

    plain, compiled = loss_and_gradients(False), loss_and_gradients(True)
    torch.testing.assert_close(compiled[0], plain[0], atol=2e-3 if bf16 else 1e-5, rtol=1e-3)
    for name, gradient in plain[1].items():
        assert (compiled[1][name] - gradient).norm() <= (0.03 if bf16 else 1e-4) * gradient.norm(), name


def test_compiled_layers_save_attention_for_the_backward_pass(tiny_model, monkeypatch):
    partition = torch._dynamo.lookup_backend("aot_eager_decomp_partition")
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: partition)
    torch._dynamo.reset()
    model = tiny_model().train()
    compile_layers(model)
    tokens = random_tokens()
    loss = model(tokens, labels=tokens).loss
    with torch.profiler.profile() as profile:
        loss.backward()
    operators = {event.key for event in profile.key_averages()}
    assert "llmlab_model_blocks::block_attention_backward" in operators
    assert "llmlab_model_blocks::block_attention" not in operators

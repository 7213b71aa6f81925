"""Attention in blocks against the textbook's formula in double precision, and that training in bf16 takes it."""

import pytest
import torch

from llmlab.model import attention
from llmlab.model.blocks import BLOCK, attend_in_blocks


def by_hand(query, key, value, scaling):
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
    mixed = attend_in_blocks(query, key, value, 0.3)
    direction = torch.randn(mixed.shape).to(dtype)
    gradients = torch.autograd.grad(mixed, (query, key, value), direction)
    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected = by_hand(*exact, 0.3)
    expected_gradients = torch.autograd.grad(expected, exact, direction.double())
    for found, wanted in zip((mixed, *gradients), (expected, *expected_gradients), strict=True):
        assert found.dtype == dtype
        assert (found - wanted).abs().mean() < tolerance * wanted.abs().mean()


def test_torchs_operator_checks():
    tensors = [heads_of(2, heads, 70, 8, torch.bfloat16) for heads in (4, 2, 2)]
    torch.library.opcheck(torch.ops.llmlab_model_blocks.attend_in_blocks.default, (*tensors, 0.3))


def test_training_in_bf16_takes_blocks_and_stays_near_fp32(tiny_model, monkeypatch):
    taken = []
    monkeypatch.setattr(attention, "attend_in_blocks", lambda *a: taken.append(1) or attend_in_blocks(*a))
    model = tiny_model().train()
    tokens = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    exact = model(tokens, labels=tokens).loss
    model.generate(tokens, max_new_tokens=2, eos_token_id=None)
    assert not taken
    exact.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
        model(tokens, attention_mask=(tokens > 5).long())  # padding goes another way
    loss.backward()
    assert len(taken) == model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).norm() < 0.05 * expected[name].norm(), name


def test_compiles_whole_in_bf16(tiny_model):
    torch._dynamo.reset()
    model = tiny_model().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = torch.randint(3, 64, (2, 40))
    losses = []
    for each in (model, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(each(tokens, labels=tokens, return_logits=False).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, atol=1e-3, rtol=0)

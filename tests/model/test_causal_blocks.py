"""Attention in causal blocks for decoders of Transformers: where it is used, and that it changes nothing."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmlab.model import causal_blocks as attention

PADDED = {"none": None, "right": torch.arange(90) < torch.tensor([[90], [50]]), "left": torch.arange(90) >= 40}


@pytest.fixture
def calls(monkeypatch):
    calls, compute = [], attention.block_attention
    monkeypatch.setattr(attention, "block_attention", lambda *args: (calls.append(1), compute(*args))[1])
    return calls


def gradients(model, ids, mask, autocast):
    labels = ids if mask is None else ids.masked_fill(~mask.bool(), -100)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    return output.loss.detach(), torch.autograd.grad(output.loss, list(model.parameters()))


CASES = [*((side, "bfloat16", False) for side in PADDED), ("right", "float32", False), ("right", "float32", True)]


@pytest.mark.parametrize(("side", "dtype", "autocast"), CASES)
def test_equals_sdpa(side, dtype, autocast, calls):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **shape)).to(getattr(torch, dtype))
    ids, mask = torch.randint(0, 64, (2, 90)), PADDED[side]
    mask = mask if mask is None else mask.expand(2, -1).long()
    expected, theirs = gradients(model, ids, mask, autocast)
    attention.use_blocks(model)
    loss, ours = gradients(model, ids, mask, autocast)
    assert len(calls) == (2 if (dtype == "bfloat16" or autocast) and side != "left" else 0)  # layers
    # bf16 has 8 bits: a rounding error of 2^-9 an operation, as sdpa's own
    assert loss == pytest.approx(expected.item(), rel=1e-2 if calls else 1e-6)
    error = torch.stack([(a - b).norm() for a, b in zip(ours, theirs, strict=True)]).norm()
    assert error <= (0.03 if calls else 1e-5) * torch.stack([b.norm() for b in theirs]).norm()


def test_generation_is_as_before(calls):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    ids, options = torch.randint(0, 64, (2, 6)), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    before = model.generate(ids, **options)
    attention.use_blocks(model)
    assert model.generate(ids, **options).equal(before)

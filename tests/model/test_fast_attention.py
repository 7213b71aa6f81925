"""The block-causal product equals sdpa, and steps back wherever it would be wrong or is of no use."""

from functools import partialmethod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.model import LLMLabConfig, LLMLabForCausalLM, fast_attention
from llmlab.model.fast_attention import BlockCausalAttention, block_causal_attention_forward


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(fast_attention, "BLOCK", 8)


def states(batch, heads, kv_heads, time, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, count, time, width) for count in (heads, kv_heads, kv_heads, heads)]
    query, key, value, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return [x.requires_grad_() for x in (query, key, value)], grad


def value_and_gradients(function, tensors, grad):
    value = function(*tensors)
    return [value, *torch.autograd.grad(value, tensors, grad)]


def reference(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=0.3)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    time=st.integers(1, 40),
    width=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 2**16),
)
def test_equals_sdpa(batch, kv_heads, group, time, width, seed):
    tensors, grad = states(batch, kv_heads * group, kv_heads, time, width, torch.float64, seed)
    mine = value_and_gradients(lambda *qkv: BlockCausalAttention.apply(*qkv, 0.3), tensors, grad)
    torch.testing.assert_close(mine, value_and_gradients(reference, tensors, grad), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_exact_as_sdpa(dtype):
    tensors, grad = states(2, 6, 2, 37, 16, dtype)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    truth = value_and_gradients(reference, wide, grad.double())
    mine = value_and_gradients(lambda *qkv: BlockCausalAttention.apply(*qkv, 0.3), tensors, grad)
    sdpa = value_and_gradients(reference, tensors, grad)
    for found, theirs, true in zip(mine, sdpa, truth, strict=True):
        assert found.dtype == dtype
        assert (found - true).norm() <= 2 * (theirs - true).norm()


def test_long_texts_have_a_bounded_number_of_blocks():
    blocks = fast_attention._blocks(1000)
    assert len(blocks) <= fast_attention.MOST_BLOCKS
    assert [start for start, _ in blocks] == [0, *(end for _, end in blocks[:-1])]
    assert blocks[-1][1] == 1000


class Module(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 3

    def forward(self, query, key, value, **options):
        options = {"attention_mask": None, **options}
        return block_causal_attention_forward(self, query, key, value, scaling=0.3, **options)[0]


def operators_compiled(function, *args, **kwargs):
    """Returns what a compiled function gives, and the names of the operators in its graph."""
    names = []

    def backend(graph, example_inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)(*args, **kwargs), " ".join(names)


def test_takes_over_plain_causal_attention_under_compile():
    tensors, _ = states(2, 6, 2, 20, 8, torch.float32)
    mixed, names = operators_compiled(Module(), *tensors)
    assert "scaled_dot_product_attention" not in names
    torch.testing.assert_close(mixed, reference(*tensors).transpose(1, 2))


MASK = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
MASK[0, :, :, :3] = False


@pytest.mark.parametrize(
    ("options", "keys"),
    [({"attention_mask": MASK}, 20), ({"dropout": 0.5}, 20), ({"is_causal": False}, 20), ({}, 25)],
    ids=["mask", "dropout", "not causal", "cache"],
)
def test_leaves_the_rest_to_sdpa(options, keys):
    (query, key, value), _ = states(2, 6, 2, 25, 8, torch.float32)
    mixed, names = operators_compiled(Module(), query[:, :, :20], key[:, :, :keys], value[:, :, :keys], **options)
    assert "scaled_dot_product_attention" in names
    if "dropout" not in options:
        fast = Module()(query[:, :, :20], key[:, :, :keys], value[:, :, :keys], **options)
        torch.testing.assert_close(mixed, fast, equal_nan=True)


@pytest.mark.parametrize("window", [None, 6])
def test_a_compiled_decoder_trains_the_same(tiny_config, monkeypatch, window):
    """The whole path: the name in Transformers' interface, masks, autocast, one compiled layer after another."""
    from llmlab.runs.compile import compile_layers

    # everything but the generation of C++, which takes a minute
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))

    def loss_and_gradients(compiled):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = LLMLabForCausalLM(tiny_config(sliding_window=window, num_key_value_heads=2)).train()
        if compiled:
            compile_layers(model)
        tokens = torch.randint(0, 64, (2, 21), generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, labels=tokens, return_logits=False).loss
        loss.backward()
        return loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}

    plain, compiled = loss_and_gradients(False), loss_and_gradients(True)
    torch.testing.assert_close(compiled[0], plain[0], atol=2e-3, rtol=1e-3)
    assert compiled[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        assert (compiled[1][name] - gradient).norm() <= 0.03 * gradient.norm(), name


def test_is_used_in_a_compiled_decoder(tiny_config):
    model = LLMLabForCausalLM(tiny_config(num_key_value_heads=2))
    fast_attention.register()
    model.set_attn_implementation(fast_attention.NAME)
    hidden, _ = states(1, 1, 1, 20, 32, torch.float32)
    rotation = model.model.rotary_emb(hidden[0][0], torch.arange(20)[None])
    layer = model.model.layers[0]
    mixed, names = operators_compiled(layer, hidden[0][0], position_embeddings=rotation, attention_mask=None)
    assert "scaled_dot_product_attention" not in names
    torch.testing.assert_close(mixed, layer(hidden[0][0], position_embeddings=rotation, attention_mask=None))
    assert LLMLabConfig.from_dict(model.config.to_dict())._attn_implementation is None


@pytest.mark.slow
def test_its_kernels_compute_the_same():
    """The generated C++ with a masked softmax of several blocks, forward and backward."""
    tensors, grad = states(1, 2, 1, 20, 8, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *qkv: BlockCausalAttention.apply(*qkv, 0.3), fullgraph=True)
    mine = value_and_gradients(compiled, tensors, grad)
    torch.testing.assert_close(mine, value_and_gradients(reference, tensors, grad), rtol=0.05, atol=0.02)

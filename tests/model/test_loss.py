"""The chunked loss equals the loss of full logits, gradients included, and never holds those logits."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from llmlab.model import loss as loss_module
from llmlab.model.loss import chunk_tokens, linear_cross_entropy, loss_and_gradients
from llmlab.model.modeling import LanguageModelHead

IGNORED = -100


@pytest.fixture
def small_chunks(monkeypatch):
    """Makes a few tokens need several chunks, and several rows of softmax in each."""
    monkeypatch.setattr(loss_module, "CPU_CHUNK_TOKENS", 4)
    monkeypatch.setattr(loss_module, "CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(loss_module, "MULTIPLE", 1)
    monkeypatch.setattr(loss_module, "CPU_SOFTMAX_ELEMENTS", 50)


def full_logits(hidden, weight, labels):
    logits = F.linear(hidden, weight)[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def inputs(batch, time, width, vocabulary, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, time, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    labels = torch.randint(0, vocabulary, (batch, time), generator=generator)
    return [x.requires_grad_() for x in (hidden, weight)], labels


def value_and_gradients(function, tensors):
    value = function()
    return value.detach(), torch.autograd.grad(value, tensors)


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 11),
    width=st.integers(1, 6),
    vocabulary=st.integers(1, 40),
    chunk=st.integers(1, 12),
    multiple=st.integers(1, 5),
    rows=st.integers(1, 5),
    ignored=st.sets(st.integers(0, 32)),
    seed=st.integers(0, 2**16),
)
def test_equals_full_logits(batch, time, width, vocabulary, chunk, multiple, rows, ignored, seed):
    tensors, labels = inputs(batch, time, width, vocabulary, seed)
    labels.view(-1)[[i for i in ignored if i < labels.numel()]] = IGNORED
    scored = (labels[:, 1:] != IGNORED).sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CPU_CHUNK_TOKENS", chunk)
        patch.setattr(loss_module, "CPU_CHUNK_BYTES", 1)
        patch.setattr(loss_module, "MULTIPLE", multiple)
        patch.setattr(loss_module, "CPU_SOFTMAX_ELEMENTS", rows * vocabulary)
        found = value_and_gradients(lambda: linear_cross_entropy(*tensors, labels), tensors)
    if scored == 0:
        expected = torch.zeros(()), [torch.zeros_like(x) for x in tensors]
    else:
        expected = value_and_gradients(lambda: full_logits(*tensors, labels), tensors)
    torch.testing.assert_close(found[0], expected[0], atol=2e-6, rtol=1e-6)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert torch.equal(mine, theirs) or (mine - theirs).norm() <= 1e-6 * theirs.norm() + 1e-6


def test_double_precision_stays_double(small_chunks):
    tensors, labels = inputs(2, 7, 3, 11, dtype=torch.float64)
    labels[0, 2] = IGNORED
    mine = value_and_gradients(lambda: linear_cross_entropy(*tensors, labels), tensors)
    logits = F.linear(*tensors)[:, :-1].flatten(0, 1)
    theirs = value_and_gradients(lambda: F.cross_entropy(logits, labels[:, 1:].flatten()), tensors)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bf16_is_as_close_as_full_logits_in_bf16(small_chunks, weights):
    exact, labels = inputs(4, 16, 32, 200)
    truth, true_gradients = value_and_gradients(lambda: full_logits(*exact, labels), exact)
    rounded = [x.detach().to(weights).requires_grad_() for x in exact]
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        found, gradients = value_and_gradients(lambda: linear_cross_entropy(*rounded, labels), rounded)
        full, full_gradients = value_and_gradients(lambda: full_logits(*rounded, labels), rounded)
    assert found.dtype == torch.float32
    assert abs(found - truth) <= 2 * abs(full - truth) + 1e-3
    for mine, theirs, true in zip(gradients, full_gradients, true_gradients, strict=True):
        assert mine.dtype == weights
        assert relative_error(mine.float(), true) <= 1.2 * relative_error(theirs.float(), true)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_eight_rows_at_once_equal_eight_accumulated(small_chunks, as_tensor):
    (hidden, weight), labels = inputs(8, 6, 5, 30)
    labels[torch.rand(8, 6, generator=torch.Generator().manual_seed(1)) < 0.4] = IGNORED
    count = (labels[:, 1:] != IGNORED).sum()
    count = count if as_tensor else int(count)
    at_once = value_and_gradients(lambda: linear_cross_entropy(hidden, weight, labels), [weight])
    accumulated = [
        value_and_gradients(
            lambda row=row: linear_cross_entropy(
                hidden[row : row + 1], weight, labels[row : row + 1], num_items_in_batch=count
            ),
            [weight],
        )
        for row in range(8)
    ]
    torch.testing.assert_close(sum(value for value, _ in accumulated), at_once[0])
    torch.testing.assert_close(sum(gradient for _, (gradient,) in accumulated), at_once[1][0])


def test_nothing_to_predict_gives_zero_and_zero_gradients():
    (hidden, weight), labels = inputs(2, 5, 4, 9)
    value, gradients = value_and_gradients(
        lambda: linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORED)), [hidden, weight]
    )
    assert value == 0
    assert all(not gradient.any() for gradient in gradients)


def test_extreme_logits_stay_finite():
    hidden, weight = torch.full((1, 3, 2), 1e4), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    labels = torch.tensor([[0, 1, 0]])
    found = linear_cross_entropy(hidden, weight, labels)
    assert found == 1e4  # one of two predictions is 2e4 nats off


def test_tied_weights_get_the_gradients_of_both_uses(small_chunks):
    (_, weight), labels = inputs(2, 8, 5, 30)
    mine = value_and_gradients(lambda: linear_cross_entropy(weight[labels].tanh(), weight, labels), [weight])
    theirs = value_and_gradients(lambda: full_logits(weight[labels].tanh(), weight, labels), [weight])
    torch.testing.assert_close(mine, theirs)


def test_frozen_head_gets_no_gradient(small_chunks):
    (hidden, weight), labels = inputs(2, 8, 5, 30)
    weight.requires_grad_(False)
    mine = value_and_gradients(lambda: linear_cross_entropy(hidden, weight, labels), [hidden])
    torch.testing.assert_close(mine, value_and_gradients(lambda: full_logits(hidden, weight, labels), [hidden]))
    assert weight.grad is None


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "on_cpu", "expected"),
    [
        (2044, 49_152, True, 1024),  # as few chunks as 128 MiB allow, about equally long
        (2044, 151_936, True, 512),  # at least 512
        (2044, 151_936, False, 2048),
        (1365, 49_152, True, 1376),  # in one: a few more than fit make the number a multiple of 16
        (0, 49_152, True, 16),
    ],
)
def test_length_of_a_chunk(tokens, vocabulary, on_cpu, expected):
    assert chunk_tokens(tokens, vocabulary, torch.bfloat16, on_cpu=on_cpu) == expected


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_holds_all_logits(small_chunks, dtype):
    tokens, width, vocabulary = 64, 8, 100
    hidden, weight = torch.randn(tokens, width), torch.randn(vocabulary, width)
    with LargestTensor() as largest:
        loss_and_gradients(hidden, weight, torch.randint(0, vocabulary, (tokens,)), dtype, True, True)
    assert largest.elements <= max(vocabulary * width, loss_module.CPU_CHUNK_TOKENS * vocabulary)


def test_without_gradients_only_the_loss_is_computed(small_chunks):
    (hidden, weight), labels = inputs(2, 8, 5, 30)
    with torch.no_grad(), LargestTensor() as largest:
        found = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(found, full_logits(hidden, weight, labels).detach())
    assert largest.elements < weight.numel()


@pytest.mark.parametrize("reentrant", [False, True])
def test_survives_gradient_checkpointing(small_chunks, reentrant):
    (hidden, weight), labels = inputs(2, 8, 5, 30)

    def loss(hidden, weight):
        return linear_cross_entropy(hidden.tanh(), weight, labels)

    def checkpointed():
        return torch.utils.checkpoint.checkpoint(loss, hidden, weight, use_reentrant=reentrant)

    def gradients(function):
        hidden.grad = weight.grad = None
        function().backward()
        return hidden.grad, weight.grad

    torch.testing.assert_close(gradients(checkpointed), gradients(lambda: loss(hidden, weight)))


def test_a_second_backward_is_refused_not_wrong():
    (hidden, weight), labels = inputs(2, 8, 5, 30)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_as_one_graph(autocast):
    tensors, labels = inputs(2, 8, 5, 30)

    def loss(hidden, weight):
        return linear_cross_entropy(hidden * 2, weight, labels)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mine = value_and_gradients(lambda: compiled(*tensors), tensors)
        theirs = value_and_gradients(lambda: loss(*tensors), tensors)
    torch.testing.assert_close(mine, theirs)


def test_a_copy_of_the_file_works_beside_the_original():
    """Run folders carry this file, and both may be imported in one process."""
    spec = importlib.util.spec_from_file_location("saved_loss", Path(loss_module.__file__))
    saved = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(saved)
    (hidden, weight), labels = inputs(2, 8, 5, 30)
    results = [
        value_and_gradients(lambda f=f: f(hidden, weight, labels), [hidden, weight])
        for f in (linear_cross_entropy, saved.linear_cross_entropy, full_logits)
    ]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_a_frozen_head_is_multiplied_once_for_all_rows():
    """Of a slice of hidden states, torch would expand the weights to each row, and a CPU copy them."""
    head = LanguageModelHead(4, 16, bias=False).requires_grad_(False)
    hidden = torch.randn(3, 5, 4)[:, -1:]
    with FlopCounterMode(display=False) as counter:
        logits = head(hidden)
    assert torch.ops.aten.bmm not in counter.get_flop_counts()["Global"]
    assert torch.allclose(logits[:, 0], hidden[:, 0] @ head.weight.t())

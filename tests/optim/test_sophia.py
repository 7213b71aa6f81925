"""Sophia's curvature: the Gauss-Newton-Bartlett estimate is what the paper says, alone and over processes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from llmlab.optim.sophia import Sophia, estimate_hessian, estimate_hessian_if_due


class SoftmaxRegression(nn.Module):
    """Logits that are linear in fixed features of the present token."""

    def __init__(self, vocabulary: int = 5, features: int = 3):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("features", torch.randn(vocabulary, features, generator=generator))
        self.weight = nn.Parameter(torch.randn(vocabulary, features, generator=generator))

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.features[input_ids] @ self.weight.T)


def keeping_only_the_last(model: nn.Module, **kwargs) -> Sophia:
    """A Sophia whose diagonal is its last estimate."""
    return Sophia(model.parameters(), lr=1e-3, betas=(0.9, 0.0), **kwargs)


def test_estimate_is_batch_size_times_the_squared_gradient_of_the_mean_loss(tiny_llama):
    model = tiny_llama()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 24, (3, 10), generator=generator)
    labels = ids.clone()
    labels[0, :4] = labels[2, 7:] = -100
    optimizer = keeping_only_the_last(model)
    estimate_hessian(model, {"input_ids": ids, "labels": labels}, optimizer, torch.Generator().manual_seed(5))

    rows = [(b, t) for b in range(3) for t in range(9) if labels[b, t + 1] != -100]
    assert len(rows) == 27 - 3 - 3
    logits = model(input_ids=ids).logits
    scored = torch.stack([logits[b, t] for b, t in rows])
    drawn = torch.multinomial(scored.softmax(-1), 1, generator=torch.Generator().manual_seed(5))[:, 0]
    gradients = torch.autograd.grad(cross_entropy(scored, drawn), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(optimizer.state[parameter]["hessian"], len(rows) * gradient**2)
        assert parameter.grad is None


def test_padding_is_not_scored():
    model = SoftmaxRegression()
    ids = torch.tensor([[0, 1, 2, 3]])
    padded = torch.tensor([[0, 1, 2, 3, 4, 4]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    model.forward = lambda input_ids, use_cache, attention_mask=None: SoftmaxRegression.forward(
        model, input_ids, False
    )
    short, long = keeping_only_the_last(model), keeping_only_the_last(model)
    estimate_hessian(model, {"input_ids": ids}, short, torch.Generator().manual_seed(0))
    estimate_hessian(model, {"input_ids": padded, "attention_mask": mask}, long, torch.Generator().manual_seed(0))
    assert torch.equal(short.state[model.weight]["hessian"], long.state[model.weight]["hessian"])


def test_estimate_averages_to_the_gauss_newton_diagonal():
    model = SoftmaxRegression()
    ids = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [4, 3, 2, 2, 1, 0, 1]])
    optimizer = keeping_only_the_last(model)
    generator = torch.Generator().manual_seed(1)
    draws = []
    for _ in range(2000):
        estimate_hessian(model, {"input_ids": ids}, optimizer, generator)
        draws.append(optimizer.state[model.weight]["hessian"].clone())
    draws = torch.stack(draws)

    x = model.features[ids[:, :-1]].flatten(0, 1)  # (B, features)
    p = (x @ model.weight.detach().T).softmax(-1)  # (B, vocabulary)
    exact = torch.einsum("bk,bd->kd", p * (1 - p), x**2) / len(x)
    deviation = (draws.mean(0) - exact) / (draws.std(0) / len(draws) ** 0.5)
    assert deviation.abs().max() < 4
    assert ((draws.mean(0) - exact).abs() / exact).max() < 0.25


def test_estimates_follow_the_rhythm(tiny_llama, set_gradients):
    model = tiny_llama()
    optimizer = Sophia(model.parameters(), lr=1e-3, update_every=3)
    batch = {"input_ids": torch.arange(12)[None]}
    estimated = []
    for step in range(8):
        before = optimizer.state[model.model.norm.weight].get("hessian", torch.zeros(16)).clone()
        for _ in range(2):  # two micro-batches of one step: one estimate
            estimate_hessian_if_due(model, batch, optimizer, seed=0)
        if not torch.equal(before, optimizer.state[model.model.norm.weight].get("hessian", torch.zeros(16))):
            estimated.append(step)
        set_gradients(model, seed=step)
        optimizer.step()
        optimizer.zero_grad()
    assert estimated == [0, 3, 6]


def test_draws_leave_the_global_random_state_alone(tiny_llama):
    model = tiny_llama()
    state = torch.get_rng_state()
    first, second = keeping_only_the_last(model), keeping_only_the_last(model)
    for optimizer in (first, second):
        estimate_hessian_if_due(model, {"input_ids": torch.arange(12)[None]}, optimizer, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    weight = model.model.norm.weight
    assert torch.equal(first.state[weight]["hessian"], second.state[weight]["hessian"])


def test_other_optimizers_get_no_estimate(tiny_llama):
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters())
    estimate_hessian_if_due(model, {"input_ids": torch.arange(12)[None]}, optimizer, seed=0)
    assert not optimizer.state


def test_leftover_gradients_are_refused(tiny_llama, set_gradients):
    model = tiny_llama()
    set_gradients(model, seed=0)
    with pytest.raises(RuntimeError, match="between zero_grad"):
        estimate_hessian(model, {"input_ids": torch.arange(12)[None]}, Sophia(model.parameters(), lr=1e-3))


IDS = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [4, 3, 2, 2, 1, 0, 1]])
LABELS = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [4, 3, 2, 2, -100, -100, -100]])


def _estimate_in_process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = DistributedDataParallel(SoftmaxRegression())
    optimizer = keeping_only_the_last(model)
    batch = {"input_ids": IDS[rank : rank + 1], "labels": LABELS[rank : rank + 1]}
    with model.no_sync(), pytest.raises(RuntimeError, match="no_sync"):
        estimate_hessian(model, batch, optimizer)
    estimate_hessian(model, batch, optimizer, torch.Generator().manual_seed(rank))
    torch.save(optimizer.state[model.module.weight]["hessian"], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_estimate_as_one_batch(tmp_path):
    torch.multiprocessing.spawn(_estimate_in_process, (str(tmp_path),), nprocs=2)
    model = SoftmaxRegression()
    total, examples = torch.zeros_like(model.weight), 0
    for rank in range(2):
        scored = model.features[IDS[rank, :-1]][LABELS[rank, 1:] != -100] @ model.weight.T
        drawn = torch.multinomial(scored.softmax(-1), 1, generator=torch.Generator().manual_seed(rank))[:, 0]
        total += torch.autograd.grad(cross_entropy(scored, drawn, reduction="sum"), model.weight)[0]
        examples += len(drawn)
    assert examples == 6 + 3
    expected = examples * (total / examples) ** 2
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)

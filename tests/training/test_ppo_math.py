"""The arithmetic of PPO: numbers worked out by hand, and the same formulas as plain loops over floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.training.online.advantages import (
    explained_variance,
    gae,
    k3,
    kl_penalty,
    per_turn,
    token_rewards,
    value_loss,
    whiten,
)

ROWS, TIME = 3, 9
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1],  # one turn, full length
        [1, 1, 0, 0, 0, 1, 1, 0, 0],  # two turns around a tool's text, then padding
        [0, 1, 1, 0, 1, 0, 0, 0, 0],
    ]
)


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def looped_gae(rewards, values, gammas, lams, mask):
    """Equation 16 of the paper as a double sum over the tokens of the policy, which is not how ours goes."""
    advantages = [[0.0] * len(row) for row in rewards]
    for row in range(len(rewards)):
        written = [t for t in range(len(mask[row])) if mask[row][t]]
        for i, t in enumerate(written):
            weight = 1.0
            for j in range(i, len(written)):
                now = written[j]
                following = values[row][written[j + 1]] if j + 1 < len(written) else 0.0
                delta = rewards[row][now] + gammas[row][now] * following - values[row][now]
                advantages[row][t] += weight * delta
                weight *= gammas[row][now] * lams[row][now]
    return advantages


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5)
    advantages, returns = gae(rewards, values, torch.ones(1, 3), 0.9, 0.5)
    last = 1 - 0.5
    middle = (0.9 * 0.5 - 0.5) + 0.45 * last
    first = (0.9 * 0.5 - 0.5) + 0.45 * middle
    assert advantages[0].tolist() == pytest.approx([first, middle, last])  # 0.02875, 0.175, 0.5
    assert returns[0].tolist() == pytest.approx([first + 0.5, middle + 0.5, 1.0])


def test_gae_at_the_ends_of_lambda():
    rewards, values, mask = numbers(0, 1, 4), numbers(1, 1, 4), torch.ones(1, 4)
    monte_carlo = [sum(0.9 ** (j - t) * rewards[0, j].item() for j in range(t, 4)) for t in range(4)]
    assert gae(rewards, values, mask, 0.9, 1.0)[1][0].tolist() == pytest.approx(monte_carlo)
    following = [*values[0, 1:].tolist(), 0.0]
    one_step = [rewards[0, t].item() + 0.9 * following[t] for t in range(4)]
    assert gae(rewards, values, mask, 0.9, 0.0)[1][0].tolist() == pytest.approx(one_step)


def test_gae_steps_over_what_the_policy_did_not_write():
    rewards, values = torch.tensor([[0.1, 77.0, 0.2, 1.0, 55.0]]), torch.tensor([[0.5, 99.0, 0.4, 0.3, -88.0]])
    mask = torch.tensor([[1, 0, 1, 1, 0]])
    advantages, returns = gae(rewards, values, mask, 0.9, 0.8)
    kept = mask[0].bool()
    alone, alone_returns = gae(rewards[:, kept], values[:, kept], torch.ones(1, 3), 0.9, 0.8)
    assert torch.equal(advantages[:, kept], alone) and torch.equal(returns[:, kept], alone_returns)
    assert not advantages[:, ~kept].any() and not returns[:, ~kept].any()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_gae_is_the_papers_sum(seed, gamma, lam, by_turn):
    rewards, values = numbers(seed, ROWS, TIME), numbers(seed + 1, ROWS, TIME)
    gammas = per_turn(MASK, gamma).double() if by_turn else torch.full((ROWS, TIME), gamma, dtype=torch.float64)
    lams = per_turn(MASK, lam).double() if by_turn else torch.full((ROWS, TIME), lam, dtype=torch.float64)
    expected = looped_gae(rewards.tolist(), values.tolist(), gammas.tolist(), lams.tolist(), MASK.tolist())
    advantages, returns = gae(rewards, values, MASK, gammas, lams)
    assert advantages.tolist() == [pytest.approx(row, abs=1e-12) for row in expected]
    assert torch.allclose(returns, (advantages + values) * MASK)


def test_a_turn_is_one_step_of_an_episode():
    assert per_turn(MASK, 0.5).tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 1, 0.5],
        [1, 0.5, 1, 1, 1, 1, 0.5, 1, 1],
        [1, 1, 0.5, 1, 0.5, 1, 1, 1, 1],
    ]
    # 300 tokens in two turns: the reward at the end is discounted once on its way to the first token
    mask = torch.ones(1, 300)
    mask[0, 100:150] = 0
    rewards = token_rewards(torch.ones(1), torch.zeros(1, 300), mask)
    returns = gae(rewards, torch.zeros(1, 300), mask, per_turn(mask, 0.99), per_turn(mask, 1.0))[1]
    assert returns[0, 0].item() == pytest.approx(0.99)
    assert gae(rewards, torch.zeros(1, 300), mask, 0.99, 1.0)[1][0, 0].item() == pytest.approx(0.99**249, rel=1e-4)


def test_the_score_comes_last_and_each_token_pays():
    rewards = token_rewards(torch.tensor([2.0, 3.0, 4.0]), torch.full((ROWS, TIME), 0.1), MASK)
    assert rewards[0].tolist() == pytest.approx([-0.1] * 8 + [1.9])
    assert rewards[1].tolist() == pytest.approx([-0.1, -0.1, 0, 0, 0, -0.1, 2.9, 0, 0])
    assert rewards[2].tolist() == pytest.approx([0, -0.1, -0.1, 0, 3.9, 0, 0, 0, 0])
    nothing = token_rewards(torch.tensor([2.0]), torch.ones(1, 4), torch.zeros(1, 4, dtype=torch.long))
    assert not nothing.any()


def test_kl_penaltys():
    ours, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    assert kl_penalty(ours, reference, "kl").tolist() == [[0.5, -1.0]]
    assert kl_penalty(ours, reference, "abs").tolist() == [[0.5, 1.0]]


@settings(deadline=None)
@given(st.floats(-80, 0, width=32), st.floats(-80, 0, width=32))
def test_k3_is_never_negative(ours, other):
    estimate = k3(torch.tensor(ours), torch.tensor(other)).item()
    assert estimate >= 0
    assert (estimate == 0) or ours != other


@settings(deadline=None)
@given(st.floats(-80, 0, width=32), st.floats(-1e-5, 1e-5))
def test_k3_of_neighbours_is_never_negative(ours, step):
    assert k3(torch.tensor(ours), torch.tensor(ours) + step).item() >= 0


def test_k3_has_the_mean_of_the_divergence():
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    divergence = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    assert (p * k3(p.log(), q.log())).sum().item() == pytest.approx(divergence)


def test_value_loss_by_hand():
    #        inside the range | moved towards the return | moved away from it | moved past the return
    values = torch.tensor([0.1, 0.5, -0.5, 1.5], requires_grad=True)
    old, returns = torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, 1.0])
    losses, clipped = value_loss(values, old, returns, 0.2)
    held = 0.5 * (0.2 - 1) ** 2
    assert losses.tolist() == pytest.approx([0.5 * 0.81, held, 0.5 * 1.5**2, held])
    assert clipped.tolist() == [0, 1, 0, 1]
    losses.sum().backward()
    assert values.grad.tolist() == pytest.approx([-0.9, 0, -1.5, 0])  # what was held is left alone
    plain, none = value_loss(values, old, returns, None)
    assert plain.tolist() == pytest.approx([0.5 * (v - 1) ** 2 for v in (0.1, 0.5, -0.5, 1.5)]) and not none.any()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 2))
def test_value_loss_is_the_loop(seed, clip):
    values, old, returns = (numbers(seed + i, ROWS, TIME) for i in range(3))
    expected = []
    for v, o, r in zip(*(x.flatten().tolist() for x in (values, old, returns)), strict=True):
        held = min(max(v, o - clip), o + clip)
        expected.append(0.5 * max((v - r) ** 2, (held - r) ** 2))
    assert value_loss(values, old, returns, clip)[0].flatten().tolist() == pytest.approx(expected)


def test_whitening_looks_at_the_policys_tokens_alone():
    x = numbers(3, ROWS, TIME) * 5 + 2
    white = whiten(torch.where(MASK.bool(), x, 1e6), MASK)
    kept = white[MASK.bool()]
    assert kept.mean().item() == pytest.approx(0, abs=1e-12)
    assert kept.var(unbiased=False).item() == pytest.approx(1)
    assert not white[~MASK.bool()].any()
    assert not whiten(torch.ones(1, 4), torch.ones(1, 4)).any()  # all alike: nothing to prefer


def test_whitening_is_over_all_processes():
    x, half = numbers(4, 4, TIME), 2
    mask = torch.ones(4, TIME)
    # each "process" is told what the others add, in the order in which it asks
    others = [torch.stack([mask[half:].sum(), x[half:].sum()]), (x[half:] - x.mean()).square().sum()]
    first = whiten(x[:half], mask[:half], lambda sums: sums + others.pop(0))
    assert torch.allclose(first, whiten(x, mask)[:half])


def test_explained_variance():
    returns, mask = numbers(5, ROWS, TIME), torch.ones(ROWS, TIME)
    assert explained_variance(returns, returns, mask) == pytest.approx(1)
    assert explained_variance(returns + 3, returns, mask) == pytest.approx(1)  # an offset is no variance
    assert explained_variance(torch.zeros_like(returns), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)

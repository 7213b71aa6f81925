"""Greedy generation: batched equals single, static equals dynamic cache, cached equals recomputed."""

import pytest
import torch

VARIANTS = [(encoding, window) for encoding in ("sinusoidal", "rope", "alibi", "yarn") for window in (None, 4)]
LENGTHS = (9, 3, 6)


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (length,), generator=generator) for length in LENGTHS]


def continue_greedily(model, prompt: torch.Tensor, tokens: int) -> list[int]:
    """Recomputes the whole row for each token, without a cache."""
    row = prompt[None]
    for _ in range(tokens):
        row = torch.cat((row, model(row, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return row[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("encoding", "window"), VARIANTS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_left_padded_batches_equal_single_prompts(tiny_model, encoding, window, cache):
    model = tiny_model(positional_encoding=encoding, sliding_window=window)
    longest = max(LENGTHS)
    rows = torch.stack([torch.cat((torch.zeros(longest - len(p), dtype=torch.long), p)) for p in prompts()])
    mask = torch.stack([torch.arange(longest) >= longest - len(p) for p in prompts()]).long()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batched = model.generate(rows, attention_mask=mask, cache_implementation=cache, **options)[:, longest:]
    expected = [continue_greedily(model, prompt, 12) for prompt in prompts()]
    assert batched.tolist() == expected
    assert len({tuple(row) for row in expected}) == len(LENGTHS)  # the prompts do matter


@torch.no_grad()
def test_sampling_and_beams_run(tiny_model):
    model = tiny_model()
    rows = torch.stack([p[:3] for p in prompts()])
    for options in ({"do_sample": True, "top_p": 0.9}, {"num_beams": 3}):
        assert model.generate(rows, max_new_tokens=5, eos_token_id=None, **options).shape == (3, 8)


@torch.no_grad()
def test_assisted_generation_equals_greedy(tiny_model):
    model = tiny_model()
    prompt = prompts()[0]
    assisted = model.generate(
        prompt[None], max_new_tokens=10, do_sample=False, eos_token_id=None, assistant_model=tiny_model()
    )
    assert assisted[0, len(prompt) :].tolist() == continue_greedily(model, prompt, 10)


@torch.no_grad()
def test_scores_without_positions_under_left_padding(tiny_model):
    """GRPO scores completions with a mask alone."""
    for encoding in ("sinusoidal", "rope", "alibi", "yarn"):
        model = tiny_model(positional_encoding=encoding)
        prompt = prompts()[1]
        row = torch.cat((torch.zeros(4, dtype=torch.long), prompt))[None]
        mask = torch.tensor([[0] * 4 + [1] * len(prompt)])
        scored = model(row, attention_mask=mask, logits_to_keep=2).logits
        torch.testing.assert_close(scored, model(prompt[None]).logits[:, -2:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_logits_to_keep(tiny_model):
    model = tiny_model()
    row = prompts()[0][None]
    everything = model(row).logits
    torch.testing.assert_close(model(row, logits_to_keep=1).logits, everything[:, -1:])
    places = torch.tensor([0, 5])
    torch.testing.assert_close(model(row, logits_to_keep=places).logits, everything[:, places])

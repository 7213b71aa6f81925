"""Which tokens see which: packing, padding, windows, caches and implementations, for every encoding."""

from functools import partial

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.integrations.flex_attention import WrappedFlexAttention

from llmlab.model.positions import alibi_slopes

ENCODINGS = ["sinusoidal", "rope", "alibi", "yarn"]
VARIANTS = [(encoding, window) for encoding in ENCODINGS for window in (None, 4)]


def documents(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (1, length), generator=generator) for length in lengths]


def positions_of(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.arange(part.shape[1]) for part in parts])[None]


@pytest.mark.parametrize(("encoding", "window"), VARIANTS)
@pytest.mark.parametrize("use_cache", [None, True])
def test_packed_documents_equal_documents_alone(tiny_model, encoding, window, use_cache):
    model = tiny_model(positional_encoding=encoding, sliding_window=window)
    parts = documents(7, 3, 9)
    alone = torch.cat([model(part).logits for part in parts], dim=1)
    packed = model(torch.cat(parts, 1), position_ids=positions_of(parts), use_cache=use_cache)
    torch.testing.assert_close(packed.logits, alone, atol=1e-5, rtol=0)
    assert packed.past_key_values is not None  # caching is on by default, and was no obstacle


@pytest.mark.parametrize(("encoding", "window"), VARIANTS)
def test_packed_rows_of_different_documents(tiny_model, encoding, window):
    model = tiny_model(positional_encoding=encoding, sliding_window=window)
    rows = [documents(7, 3, 9), documents(5, 11, 3)]
    alone = [torch.cat([model(part).logits for part in parts], dim=1) for parts in rows]
    packed = model(
        torch.cat([torch.cat(parts, 1) for parts in rows]),
        position_ids=torch.cat([positions_of(parts) for parts in rows]),
    )
    torch.testing.assert_close(packed.logits, torch.cat(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("encoding", "window"), VARIANTS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_changes_nothing(tiny_model, encoding, window, side, implementation):
    model = tiny_model(implementation, positional_encoding=encoding, sliding_window=window)
    (tokens,) = documents(9)
    padding, ones = torch.zeros(1, 5, dtype=torch.long), torch.ones_like(tokens)
    order = (padding, tokens) if side == "left" else (tokens, padding)
    mask = torch.cat((padding, ones) if side == "left" else (ones, padding), 1)
    padded = model(torch.cat(order, 1), attention_mask=mask).logits
    kept = padded[:, 5:] if side == "left" else padded[:, :9]
    torch.testing.assert_close(kept, model(tokens).logits, atol=1e-5, rtol=0)
    assert padded.isfinite().all()


@pytest.mark.parametrize(("encoding", "window"), VARIANTS)
@pytest.mark.parametrize("static", [False, True])
def test_cached_decoding_equals_the_full_forward(tiny_model, encoding, window, static):
    model = tiny_model(positional_encoding=encoding, sliding_window=window)
    tokens = torch.cat(documents(13, 13))
    full = model(tokens, use_cache=False).logits
    cache = StaticCache(model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    pieces = tokens.split([6, 1, 1, 3, 1, 1], dim=1)  # a chunk of 3 in the middle: a continued conversation
    seen, logits = 0, []
    for piece in pieces:
        mask = torch.ones(2, seen + piece.shape[1], dtype=torch.long)
        logits.append(model(piece, attention_mask=mask, past_key_values=cache).logits)
        seen += piece.shape[1]
    torch.testing.assert_close(torch.cat(logits, 1), full, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("encoding", "window"), VARIANTS)
def test_eager_equals_sdpa(tiny_model, encoding, window):
    tokens = torch.cat(documents(11, 11))
    eager, sdpa = (
        tiny_model(name, positional_encoding=encoding, sliding_window=window)(tokens).logits
        for name in ("eager", "sdpa")
    )
    torch.testing.assert_close(eager, sdpa, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("encoding", "window"), VARIANTS)
def test_flex_equals_sdpa(tiny_model, monkeypatch, encoding, window):
    torch._dynamo.reset()
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # needs no C++ compiler
    tokens = torch.cat(documents(16, 16))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    with torch.no_grad():
        flex, sdpa = (
            tiny_model(name, positional_encoding=encoding, sliding_window=window)(tokens, attention_mask=mask).logits
            for name in ("flex_attention", "sdpa")
        )
    torch.testing.assert_close(flex[mask.bool()], sdpa[mask.bool()], atol=1e-5, rtol=0)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_nothing_is_seen_outside_the_window(tiny_model, encoding):
    model = tiny_model(positional_encoding=encoding, sliding_window=3, num_hidden_layers=1)
    (tokens,) = documents(8)
    changed = tokens.clone()
    changed[0, 2] = 63 - changed[0, 2]
    moved = (model(tokens).logits - model(changed).logits).abs().amax(-1)[0] > 1e-4
    assert moved.tolist() == [False, False, True, True, True, False, False, False]


@pytest.mark.parametrize("window", [None, 4])
def test_positions_matter_in_every_encoding(tiny_model, window):
    (tokens,) = documents(4)
    swapped = tokens[:, [1, 0, 2, 3]]
    for encoding in ENCODINGS:
        model = tiny_model(positional_encoding=encoding, sliding_window=window, num_hidden_layers=1)
        difference = (model(tokens).logits - model(swapped).logits)[0, -1].abs().max()
        assert difference > 1e-3, encoding


def test_alibi_scores_are_lowered_by_slope_times_distance(tiny_model):
    model = tiny_model("eager", positional_encoding="alibi", num_hidden_layers=1, attention_type="mha")
    (tokens,) = documents(6)
    weights = model(tokens, output_attentions=True).attentions[0][0]  # (heads, query, key)
    layer = model.model.layers[0]
    normed = layer.input_layernorm(model.model.embed_tokens(tokens))[0]  # (time, hidden)
    slopes = alibi_slopes(4)
    for head in range(4):
        rows = slice(8 * head, 8 * head + 8)
        query, key = (normed @ module.weight[rows].T for module in (layer.self_attn.q_proj, layer.self_attn.k_proj))
        for place in range(6):
            scores = torch.stack(
                [query[place] @ key[other] / 8**0.5 - slopes[head] * (place - other) for other in range(place + 1)]
            )
            torch.testing.assert_close(weights[head, place, : place + 1], scores.softmax(0), atol=1e-5, rtol=0)


def test_alibi_refuses_implementations_without_bias(tiny_model):
    model = tiny_model(positional_encoding="alibi")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 cannot add alibi's per-head slopes.*eager, sdpa"):
        model(documents(4)[0])


def test_alibi_refuses_split_heads(tiny_model):
    attention = tiny_model(positional_encoding="alibi").model.layers[0].self_attn
    attention.q_proj = torch.nn.Linear(32, 16, bias=False)  # half the heads, as tensor parallelism leaves
    with pytest.raises(ValueError, match="tensor parallelism"):
        attention(torch.zeros(1, 3, 32))


def test_mixed_layers_have_their_own_masks(tiny_model):
    model = tiny_model(sliding_window=2, layer_types=["full_attention", "sliding_attention"])
    (tokens,) = documents(9)
    changed = tokens.clone()
    changed[0, 0] = 63 - changed[0, 0]
    assert (model(tokens).logits - model(changed).logits)[0, -1].abs().max() > 1e-4  # through the full layer
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in tokens.split([5, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays_finite_and_near(tiny_model, encoding, dtype):
    model = tiny_model(positional_encoding=encoding)
    tokens = torch.cat(documents(9, 9))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    exact = model(tokens, attention_mask=mask).logits
    for implementation in ("sdpa", "eager"):
        model.config._attn_implementation = implementation
        rough = model.to(dtype)(tokens, attention_mask=mask).logits
        assert rough.dtype == dtype and rough.isfinite().all()
        assert (rough.float() - exact)[mask.bool()].abs().mean() < 0.1 * exact.abs().mean()
        model.float()


@pytest.mark.parametrize(("encoding", "window"), VARIANTS)
def test_compiles_without_graph_breaks(tiny_model, encoding, window):
    torch._dynamo.reset()
    model = tiny_model(positional_encoding=encoding, sliding_window=window).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = torch.cat(documents(9, 9))
    expected = model(tokens, labels=tokens)
    outputs = compiled(tokens, labels=tokens)
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-5, rtol=0)
    outputs.loss.backward()
    parts = documents(5, 4)
    packed = compiled(torch.cat(parts, 1), position_ids=positions_of(parts)).logits
    alone = torch.cat([model(part).logits for part in parts], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)

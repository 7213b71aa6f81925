"""Options of the decoder beyond Llama's: each acts alike in every path, and none changes another."""

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

from llmlab.model import LLMLabForCausalLM, LLMLabForSequenceClassification, attention

OPTIONS = {
    "qk_norm": {"qk_norm": True},
    "value_embeddings": {"value_embeddings": True},
    "relu2": {"hidden_act": "relu2"},
    "all": {"qk_norm": True, "hidden_act": "relu2", "tie_word_embeddings": False},
}
OPTIONS["all"]["value_embeddings"] = True
OPTIONS["all in windows"] = OPTIONS["all"] | {"sliding_window": 4}


@pytest.fixture(params=OPTIONS)
def model(request, tiny_model):
    """A tiny decoder with an option, whose norms have weights of their own."""
    return with_weights(tiny_model(**OPTIONS[request.param]))


def with_weights(model):
    """Takes vectors off the values at which they change nothing."""
    for parameter in model.parameters():
        if parameter.ndim < 2:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


def rows(*shape):
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_an_option_changes_the_logits(tiny_model):
    tokens = rows(2, 9)
    plain = tiny_model()(tokens).logits
    for name, options in OPTIONS.items():
        model, changed = tiny_model(), tiny_model(**options)
        changed.load_state_dict(model.state_dict(), strict=False)
        assert (changed(tokens).logits - plain).abs().max() > 1e-3, name


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(model, static):
    tokens = rows(2, 13)
    full = model(tokens, use_cache=False).logits
    cache = StaticCache(model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    logits = [model(piece, past_key_values=cache).logits for piece in tokens.split([6, 1, 1, 3, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), full, atol=1e-5, rtol=0)


@torch.no_grad()
def test_packed_documents_equal_documents_alone(model):
    parts = [rows(2, length) for length in (7, 3, 9)]
    alone = torch.cat([model(part).logits for part in parts], dim=1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    packed = model(torch.cat(parts, 1), position_ids=positions).logits
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_left_padded_batches_generate_what_single_prompts_do(model, cache):
    prompts = [rows(length) for length in (9, 3)]
    batch = torch.stack([torch.cat((torch.zeros(9 - len(p), dtype=torch.long), p)) for p in prompts])
    mask = torch.stack([torch.arange(9) >= 9 - len(p) for p in prompts]).long()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batched = model.generate(batch, attention_mask=mask, cache_implementation=cache, **options)[:, 9:]
    for prompt, found in zip(prompts, batched, strict=True):
        row = prompt[None]
        for _ in range(8):
            row = torch.cat((row, model(row, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
        assert row[0, len(prompt) :].tolist() == found.tolist()


def test_saved_and_loaded_logits_are_equal(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, report = LLMLabForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict()
    assert torch.equal(loaded(rows(1, 9)).logits, model(rows(1, 9)).logits)


def gradients(model, **options):
    model.zero_grad()
    loss = model(rows(2, 12), labels=rows(2, 12), **options).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def test_the_chunked_loss_and_checkpointing_give_the_same_gradients(model):
    expected = gradients(model.train())
    torch.testing.assert_close(gradients(model, return_logits=False), expected, atol=1e-6, rtol=1e-4)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(model), expected, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_evaluation_has_the_same_token_losses(model):
    tokens = rows(2, 12)
    logits = model(tokens).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    loss = model(tokens, labels=tokens, return_logits=False).loss
    torch.testing.assert_close(model.lm_head.token_losses, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, expected.mean())


def test_compiled_layers_give_the_same_gradients(model):
    torch._dynamo.reset()
    expected = gradients(model.train())
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(model), expected, atol=1e-5, rtol=1e-3)


def test_attention_stays_in_autocasts_precision(model, monkeypatch):
    seen = set()
    for module, name in ((torch.nn.functional, "scaled_dot_product_attention"), (attention, "block_attention")):

        def record(*args, function=getattr(module, name), **kwargs):
            seen.update(x.dtype for x in args[:3])
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, record)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(rows(1, 9))
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("tied", [True, False])
def test_zero_outputs_leave_the_residual_stream_alone_at_first(tiny_config, tied):
    shape = {"hidden_size": 64, "vocab_size": 2048, "initializer_range": 0.02, "tie_word_embeddings": tied}
    config = tiny_config(initialization="zero_outputs", intermediate_size=96, **shape)
    model = LLMLabForCausalLM(config).eval()
    layer, tokens = model.model.layers[0], rows(1, 9)
    hidden = model.model.embed_tokens(tokens)
    assert torch.equal(
        layer(hidden, position_embeddings=model.model.rotary_emb(hidden, torch.arange(9)[None])), hidden
    )
    for matrix in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
        assert matrix.weight.abs().max() <= (3 / 64) ** 0.5
        assert matrix.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    embedding, head = (0.02, 0.02) if tied else (0.8, 0.001)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(embedding, rel=0.05)
    assert model.lm_head.weight.std().item() == pytest.approx(head, rel=0.05)
    squared = LLMLabForCausalLM(tiny_config(initialization="zero_outputs", hidden_act="relu2", **shape))
    assert squared.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.4 * 64**-0.5, rel=0.1)
    classifier = LLMLabForSequenceClassification(config)
    assert not classifier.model.layers[1].mlp.down_proj.weight.any() and classifier.score.weight.any()


def test_value_embeddings_grow_with_the_vocabulary(tiny_model):
    model = tiny_model(value_embeddings=True)
    before = [table.weight.clone() for table in model.model.value_embeddings]
    assert len(before) == model.config.num_hidden_layers
    model.resize_token_embeddings(70)
    for table, old in zip(model.model.value_embeddings, before, strict=True):
        assert table.weight.shape[0] == table.num_embeddings == 70
        assert torch.equal(table.weight[:64], old)
        torch.testing.assert_close(table.weight[64:], old.mean(0).expand(6, -1))
    assert model(torch.tensor([[69, 3]])).logits.shape == (1, 2, 70)
    model.resize_token_embeddings(32)
    assert torch.equal(model.model.value_embeddings[0].weight, before[0][:32])


def test_value_embeddings_need_ids(tiny_model):
    model = tiny_model(value_embeddings=True)
    with pytest.raises(ValueError, match="inputs_embeds: not supported with value_embeddings"):
        model(inputs_embeds=model.get_input_embeddings()(rows(1, 4)))

"""One loop decodes: the tokens of `generate` for greedy, its distribution for sampling, whatever shares a batch."""

from functools import partial

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from llmlab import decoding as module
from llmlab.decoding import STEPS, decode, decode_batch, why_not
from llmlab.model import LLMLabConfig, LLMLabForCausalLM
from llmlab.model.step import Product, suits

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
ENDS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
LLAMA = {**SHAPE, **ENDS, "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 128}
OLD = {**ENDS, "vocab_size": 300, "initializer_range": 0.3}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
WINDOWS = {"sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True}
ROWS = [[5, 6, 7], [9], [5, 6, 7], list(range(20, 45)), [1, 2], [8] * 11]  # a prompt twice, and one of one token


def own(**options):
    shape = {"num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 48, "attention_bias": True}
    return LLMLabForCausalLM(LLMLabConfig(**SHAPE, **shape, **options))


MODELS = {  # and whether the fused step is theirs
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), True),
    "mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**LLAMA, sliding_window=9, head_dim=8)), True),
    "qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA, **WINDOWS)), True),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA, head_dim=8)), True),
    "dynamic": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA | {"rope_parameters": DYNAMIC})), False),
    "rope": (lambda: own(sliding_window=6), True),
    "value embeddings": (lambda: own(value_embeddings=True, hidden_act="relu2", qk_norm=True), True),
    "yarn beyond its length": (
        lambda: own(positional_encoding="yarn", hidden_act="gelu", norm_type="layernorm"),
        True,
    ),
    "alibi": (lambda: own(positional_encoding="alibi"), False),
    "sinusoidal": (lambda: own(positional_encoding="sinusoidal"), False),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**OLD, n_embd=32, n_layer=2, n_head=4)), False),
    "bloom": (lambda: hf.BloomForCausalLM(hf.BloomConfig(**OLD, hidden_size=32, n_layer=2, n_head=4)), False),
    "gemma3": (lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=8)), False),
}


def make(name="llama"):
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def greedy(tokens=45, **options):
    return GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0, **options)


def sampled(tokens=1, **options):
    return GenerationConfig(max_new_tokens=tokens, do_sample=True, pad_token_id=0, **{"top_k": 0, **options})


def padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def generated(model, rows, config, **options):
    """Returns the completions of `generate`, up to and with the end token."""
    ids, mask = padded(rows)
    new = model.generate(ids, config, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()
    ends = config.eos_token_id or []
    return [row[: next((k + 1 for k, token in enumerate(row) if token in ends), len(row))] for row in new]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_generate(name):
    """45 tokens pass the cache's first 64 columns and the smaller models' context; several tokens end a row."""
    model = make(name)
    free = generated(model, ROWS, greedy())
    config = greedy(eos_token_id=sorted({free[1][7], free[3][20]}))
    expected = generated(model, ROWS, config)
    assert suits(model) == MODELS[name][1] and why_not(model) is None
    assert len(expected[1]) <= 8 and len(expected[3]) <= 21
    for batch_size in (None, 2):
        assert decode(model, ROWS, config, batch_size=batch_size).tokens == expected
    assert generated(model, ROWS, config, custom_generate=decode_batch) == expected


def test_prompts_are_read_in_parts(monkeypatch):
    """Of at most 8 tokens with padding: [9] and [1, 2] without their last tokens, [5, 6, 7], [8] * 11, the longest."""
    model, read, config = make(), [], greedy(20)
    expected = generated(model, ROWS, config)
    monkeypatch.setattr(module, "READ", 8)
    forward = module.Loop._forward
    monkeypatch.setattr(
        module.Loop, "_forward", lambda loop, ids, *rest: (read.append(tuple(ids.shape)), forward(loop, ids, *rest))[1]
    )
    assert decode(model, ROWS, config).tokens == expected
    assert read == [(3, 2), (1, 10), (1, 24)]


def test_one_token_whole_contexts_and_ends_at_once():
    model = make()
    assert decode(model, ROWS, greedy(1)).tokens == generated(model, ROWS, greedy(1))
    first = [ids[0] for ids in generated(model, ROWS, greedy(1))]
    at_once = greedy(20, eos_token_id=sorted(set(first)))  # pad or not, the end comes in each row's first token
    assert decode(model, ROWS, at_once).tokens == [[token] for token in first]
    config = greedy(20)
    config.pad_token_id, config.eos_token_id = first[0], [first[0]]
    assert decode(model, ROWS, config).tokens == generated(model, ROWS, config)
    tokens = decode(model, ROWS, greedy(20), max_length=25).tokens
    assert [len(ids) for ids in tokens] == [min(20, 25 - len(row)) for row in ROWS]
    assert all(ids == whole[: len(ids)] for ids, whole in zip(tokens, generated(model, ROWS, greedy(20)), strict=True))


def test_a_penalty_knows_no_padding():
    """Penalized tokens are the row's own, also where rows came and went."""
    model, config = make(), greedy(30, repetition_penalty=1.3)
    expected = generated(model, ROWS, config)
    assert expected != generated(model, ROWS, greedy(30))
    assert decode(model, ROWS, config).tokens == decode(model, ROWS, config, batch_size=2).tokens == expected
    assert generated(model, ROWS, config, custom_generate=decode_batch) == expected


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_take_part(dora):
    model = get_peft_model(make(), LoraConfig(target_modules="all-linear", init_lora_weights=False, use_dora=dora))
    assert suits(model.get_base_model()) == (not dora)
    found = decode(model, ROWS, greedy(20)).tokens
    assert found == generated(model.eval(), ROWS, greedy(20))
    with model.disable_adapter():
        assert decode(model, ROWS, greedy(20)).tokens == decode(make(), ROWS, greedy(20)).tokens != found


def test_arranged_weights_serve_the_next_call_until_they_change():
    """Of a frozen model; edits of `.data` and merged adapters, which make no new version, count."""
    model = get_peft_model(make(), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    decode(model, ROWS, greedy(20))  # whose adapters may be trained on: nothing is kept
    base = model.requires_grad_(False).get_base_model()
    assert base not in STEPS
    edits = [
        lambda: None,
        lambda: base.model.embed_tokens.weight.data.mul_(-1),
        lambda: model.merge_adapter(),
        lambda: model.unmerge_adapter(),
        lambda: base.model.norm.weight.data.copy_(torch.linspace(-3, 3, 32)),
        lambda: base.lm_head.weight.data[0, :1].add_(1e-4),
    ]
    steps = []
    for edit in edits:
        edit()
        assert decode(model, ROWS, greedy(20)).tokens == generated(model, ROWS, greedy(20))
        steps.append(STEPS[base][1])
        assert decode(model, ROWS, greedy(20)).tokens and STEPS[base][1] is steps[-1]
    assert len(set(map(id, steps))) == len(edits)
    decode(model.requires_grad_(True), ROWS, greedy(20))
    assert not STEPS


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_p": 0.6}, {"top_k": 5}, {"min_p": 0.2}, {"top_p": 0.05}]
)
def test_samples_have_the_distribution_of_generate(options):
    """Pearson's chi-square against the probabilities that Transformers' processors leave, at 1 in 10,000."""
    model = make()
    config, rows, count = sampled(**options), [[5, 6, 7]], 4000
    output = model.generate(*padded(rows)[:1], config, output_scores=True, return_dict_in_generate=True)
    expected = output.scores[0][0].softmax(-1) * count
    torch.manual_seed(1)
    drawn = torch.tensor(decode(model, rows * count, config).tokens)[:, 0]
    counts = torch.bincount(drawn, minlength=300).float()
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    groups = torch.cat([common.nonzero()[:, 0], torch.tensor([-1])])  # the rare ones are one group
    pairs = [(counts[k], expected[k]) if k >= 0 else (counts[~common].sum(), expected[~common].sum()) for k in groups]
    statistic = sum(((found - mean) ** 2 / mean).item() for found, mean in pairs if mean > 1)
    degrees = max(len(pairs) - 1, 1)
    # Wilson and Hilferty's normal approximation; 3.72 standard deviations are passed once in 10,000 times
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)) ** 0.5) ** 3


def test_a_seed_repeats_samples_and_rows_are_independent():
    model, config, results = make(), sampled(30), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(decode(model, ROWS, config, batch_size=3).tokens)
    assert results[0] == results[1] != results[2]
    assert results[0][0] != results[0][2]  # of the same prompt


@pytest.mark.parametrize("name", ["llama", "alibi"])
def test_log_probabilities_are_those_of_a_forward_pass(name):
    model = make(name)
    found = decode(model, ROWS, sampled(30, temperature=0.7, top_p=0.9), batch_size=4, log_probs=True)
    for row, ids, scores in zip(ROWS, found.tokens, found.log_probs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row + ids])).logits[0, len(row) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-4, rtol=0)  # fp32, sums of 32 to 300 terms


def test_prompts_are_read_once_and_rows_that_are_done_leave():
    model, shapes = make("gpt2"), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    decode(model, [[5, 6, 7, 8]] * 6 + [[1, 2]] * 2, greedy(10))
    assert shapes[0] == (2, 3) and set(shapes[1:]) == {(8, 1)}
    shapes.clear()
    decode(model, [[1] * k for k in range(3, 11)], greedy(10), max_length=11)  # 1 to 8 tokens of room
    assert [rows for rows, time in shapes if time == 1] == [8, 8, 6, 5, 4, 3, 2, 1]  # a quarter leaves at a time


def test_generate_does_what_the_loop_cannot():
    torch.manual_seed(0)
    mamba = hf.MambaForCausalLM(hf.MambaConfig(**OLD, hidden_size=32, num_hidden_layers=2)).eval()
    assert "LinearAttentionLayer" in why_not(mamba)
    found = decode(mamba, ROWS, greedy(5), max_length=28, log_probs=True)
    assert found.log_probs is None
    assert found.tokens == [
        ids[: 28 - len(row)] for ids, row in zip(generated(mamba, ROWS, greedy(5)), ROWS, strict=True)
    ]
    model = make()
    for options in ({"num_beams": 3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 3, "eos_token_id": [17, 33]}):
        config = greedy(8, **options)
        assert decode(model, ROWS, config, batch_size=6).tokens == generated(model, ROWS, config)
        assert generated(model, ROWS, config, custom_generate=decode_batch) == generated(model, ROWS, config)
    config = greedy(8, return_dict_in_generate=True, output_logits=True)
    assert len(model.generate(*padded(ROWS)[:1], config, custom_generate=decode_batch).logits) == 8
    assert decode(model, ROWS, greedy(8, max_time=60.0), log_probs=True).log_probs is None
    for parameter in model.parameters():
        parameter.ds_id = 0  # as DeepSpeed ZeRO-3 marks those that it shards
    assert why_not(model) == "its weights are sharded"


def test_a_training_model_is_left_as_it_was():
    model = make()
    expected = decode(model, ROWS, greedy(10)).tokens
    model.train().gradient_checkpointing_enable()
    model.model.layers[1].eval()
    model.config.attention_dropout = 0.5
    modes = [module.training for module in model.modules()]
    assert decode(model, ROWS, greedy(10)).tokens == expected
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_packed_products_are_those_of_linear_layers(bias):
    layers = [torch.nn.Linear(64, width, bias=bias and width > 32).bfloat16() for width in (64, 32, 48)]
    product, x = Product(*layers, dtype=torch.bfloat16), torch.randn(5, 64).bfloat16()
    with torch.no_grad():
        expected = torch.cat([layer(x) for layer in layers], 1)
        for pack in (False, True):
            if pack:
                product.pack()
            torch.testing.assert_close(product(x), expected, atol=0.02, rtol=0.01)  # one rounding of bf16 is 2^-8


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_log_probabilities_are_near_those_of_fp32(autocast):
    exact = make()
    model = make() if autocast else make().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = decode(model, ROWS, sampled(30), log_probs=True)
    for row, ids, scores in zip(ROWS, found.tokens, found.log_probs, strict=True):
        with torch.no_grad():
            logits = exact(torch.tensor([row + ids])).logits[0, len(row) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert (torch.tensor(scores) - expected).abs().mean() < 0.1  # logits have a deviation of about 2


def test_a_model_without_a_distribution_is_refused():
    model = make()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    for options in ({}, {"top_p": 0.9}):
        with pytest.raises(RuntimeError, match="probability tensor contains either `inf`, `nan`"):
            decode(model, ROWS, sampled(3, **options))


def test_the_callers_criteria_stop_a_row():
    model, ids = make(), torch.tensor([[5, 6, 7]])
    stop = [lambda ids, *_: torch.tensor([ids.shape[1] >= 8])]
    expected = model.generate(ids, greedy(20), stopping_criteria=stop)
    streamer = hf.TextStreamer(None)
    streamer.put = (found := []).append
    streamer.end = partial(found.append, "end")
    loop = partial(decode_batch, streamer=streamer)
    assert torch.equal(model.generate(ids, greedy(20), stopping_criteria=stop, custom_generate=loop), expected)
    assert found[0].tolist() == [[5, 6, 7]] and [part.item() for part in found[1:-1]] == expected[0, 3:].tolist()

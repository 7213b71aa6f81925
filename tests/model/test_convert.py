"""Llama, Mistral, Qwen2 and Qwen3 in and out: the same logits and text, and clear words where it cannot be."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llmlab.model import LLMLabForCausalLM, convert, from_llmlab, to_llmlab
from llmlab.settings.errors import UserError

SHAPE = {
    "rms_norm_eps": 1e-3,
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
RELATIVES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "num_key_value_heads": 1}),
    "llama-wide-heads": (LlamaForCausalLM, LlamaConfig, {"head_dim": 16}),
    "llama-3.1": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "llama-yarn": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": YARN}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 4}),
    "mistral-no-window": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-mixed": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "qwen3-biases": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8, "attention_bias": True}),
    "qwen3-mixed": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
}


def relative(name: str):
    model_class, config_class, options = RELATIVES[name]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SHAPE, **options})).eval()
    for parameter_name, parameter in model.named_parameters():  # biases and norms start at 0 and 1, which hides them
        if parameter_name.endswith("bias") or "norm" in parameter_name:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model


@pytest.mark.parametrize("name", RELATIVES)
def test_in_and_out_again(name, tmp_path):
    model = relative(name)
    family = name.split("-")[0]
    model.save_pretrained(tmp_path)
    ours = to_llmlab(tmp_path)
    assert type(ours) is LLMLabForCausalLM
    assert ours.state_dict().keys() == model.state_dict().keys()
    tokens = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours(tokens).logits, model(tokens).logits)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(tokens, **options), model.generate(tokens, **options))

    back = from_llmlab(ours, family)
    assert type(back) is type(model) and back.config.model_type == model.config.model_type
    assert torch.equal(back(tokens).logits, model(tokens).logits)
    apart = {"architectures", "_name_or_path", "head_dim", "max_window_layers", "dtype"}
    if model.config.sliding_window is None if family.startswith("qwen") else False:
        apart.add("use_sliding_window")
    before, after = (m.config.to_dict() for m in (model, back))
    assert {k: v for k, v in before.items() if k not in apart} == {k: after[k] for k in before if k not in apart}


def test_the_converted_model_is_a_copy():
    model = relative("llama")
    ours = to_llmlab(model)
    ours.model.norm.weight.data.fill_(7.0)
    assert not (model.model.norm.weight == 7).any()


def test_precision_is_kept():
    assert to_llmlab(relative("qwen2").bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "family", "message"),
    [
        ({"positional_encoding": "alibi"}, "llama", "positional_encoding = alibi, which llama cannot express"),
        ({"positional_encoding": "sinusoidal"}, "qwen2", "positional_encoding = sinusoidal, which qwen2"),
        ({"norm_type": "layernorm"}, "mistral", "norm_type = layernorm, which mistral"),
        ({"hidden_act": "gelu"}, "llama", "activation = gelu, which llama"),
        ({"sliding_window": 4}, "llama", "sliding_window = 4, which llama"),
        ({"attention_bias": True}, "mistral", "attention_bias = True, which mistral"),
        ({"attention_bias": True}, "qwen2", "attention_bias = True, which qwen2"),  # a bias after attention too
        ({}, "qwen2", "attention_bias = False, which qwen2"),
        (
            {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
            "mistral",
            "layer_types = .* which mistral",
        ),
        ({}, "qwen3", "qk_norm = False, which qwen3"),
        ({"qk_norm": True}, "llama", "qk_norm = True, which llama"),
        ({"value_embeddings": True}, "llama", "value_embeddings = True, which llama"),
        ({"qk_norm": True, "hidden_act": "relu2"}, "qwen3", "activation = relu2, which qwen3"),
        ({}, "lama", "family = lama: expected one of llama, mistral, qwen2, qwen3; did you mean 'llama'"),
    ],
)
def test_what_a_family_cannot_express_is_refused_by_name(tiny_model, options, family, message):
    with pytest.raises(UserError, match=message):
        from_llmlab(tiny_model(**options), family)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)), "model_type = gpt2"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, mlp_bias=True)), "mlp_bias = True"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, hidden_act="gelu")), "hidden_act = gelu"),
    ],
)
def test_what_llmlab_cannot_express_is_refused_by_name(model, message):
    with pytest.raises(UserError, match=message):
        to_llmlab(model())


def test_a_wrong_conversion_is_noticed(monkeypatch):
    """Takes a field out of the table: the logits no longer agree, and nothing is returned."""
    monkeypatch.setattr(convert, "SHARED_FIELDS", tuple(n for n in convert.SHARED_FIELDS if n != "rope_parameters"))
    model = relative("llama-3.1")
    monkeypatch.setattr(model.config, "rope_parameters", {**LLAMA3_ROPE})
    with pytest.raises(RuntimeError, match="logits differ"):
        to_llmlab(model)

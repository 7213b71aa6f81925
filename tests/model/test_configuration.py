"""Names, completion and checks of the configuration, and every valid combination of its options."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.model import LLMLabConfig, LLMLabForCausalLM, build_config, from_llmlab, measure
from llmlab.model.configuration import CHOICES
from llmlab.settings.model import ModelSettings


@st.composite
def shapes(draw) -> ModelSettings:
    """Any valid architecture, small."""
    kind = draw(st.sampled_from(["mha", "mqa", "gqa"]))
    key_values, groups, width = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 4))
    length = draw(st.integers(8, 64))
    return ModelSettings(
        positional_encoding=draw(st.sampled_from(CHOICES["positional_encoding"])),
        attention_type=kind,
        norm_type=draw(st.sampled_from(CHOICES["norm_type"])),
        activation=draw(st.sampled_from(CHOICES["hidden_act"])),
        d_model=key_values * groups * width,
        n_heads=key_values * groups,
        n_kv_heads=key_values,
        d_ff=draw(st.integers(1, 40)),
        n_layers=draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(2, 50)),
        max_seq_len=length,
        dropout=draw(st.sampled_from([0.0, 0.5])),
        sliding_window=draw(st.none() | st.integers(1, 12)),
        attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        value_embeddings=draw(st.booleans()),
        yarn_factor=draw(st.sampled_from([1.5, 4.0])),
    )


@settings(max_examples=60, deadline=None)
@given(shapes())
def test_every_valid_architecture_learns_and_is_counted(shape):
    config = build_config(shape)
    model = LLMLabForCausalLM(config).train()
    tokens = torch.randint(0, shape.vocab_size, (2, 9))
    outputs = model(tokens, labels=tokens)
    outputs.loss.backward()
    assert outputs.logits.shape == (2, 9, shape.vocab_size) and outputs.loss.isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())
    size = measure(config)
    assert size.total == sum(p.numel() for p in model.parameters())
    layers = list(model.model.layers)
    attention = [(n, p) for layer in layers for n, p in layer.self_attn.named_parameters() if "norm" not in n]
    assert size.attention == sum(p.numel() for _, p in attention)
    assert size.mlp == sum(p.numel() for layer in layers for p in layer.mlp.parameters())
    assert size.head == (0 if shape.tie_word_embeddings else shape.vocab_size * shape.d_model)
    again = LLMLabConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("encoding", CHOICES["positional_encoding"])
def test_settings_become_the_configuration(encoding):
    shape = ModelSettings(
        positional_encoding=encoding, attention_type="gqa", norm_type="layernorm", activation="gelu", d_model=48,
        n_heads=6, n_kv_heads=3, d_ff=20, n_layers=3, vocab_size=99, max_seq_len=40, dropout=0.1, sliding_window=7,
        attention_bias=True, norm_eps=1e-3, tie_word_embeddings=False, rope_theta=500.0, yarn_factor=2.0,
        initializer_range=0.5,
    )  # fmt: skip
    config = build_config(shape, SimpleNamespace(bos_token_id=None, eos_token_id=5, pad_token_id=6))
    for name in ("d_model", "n_heads", "n_kv_heads", "d_ff", "n_layers", "vocab_size", "max_seq_len", "activation"):
        assert getattr(config, name) == getattr(shape, name), name
    for name in ("norm_type", "norm_eps", "dropout", "sliding_window", "attention_bias", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(shape, name), name
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 5, 6)
    assert config.attention_dropout == 0.1 and config.attention_output_bias and config.initializer_range == 0.5
    assert config.layer_types == ["sliding_attention"] * 3
    expected = {
        "rope": {"rope_type": "default", "rope_theta": 500.0},
        "yarn": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0, "original_max_position_embeddings": 20
        },
    }  # fmt: skip
    assert config.rope_parameters == expected.get(encoding)


def test_defaults_are_the_seeds_and_count_494_million():
    assert LLMLabConfig().to_dict() == build_config(ModelSettings()).to_dict()
    assert 493_500_000 < measure(LLMLabConfig()).total < 494_500_000


def test_key_value_heads_follow_the_attention_type():
    assert LLMLabConfig(attention_type="mha").num_key_value_heads == 14
    assert LLMLabConfig(attention_type="mqa").num_key_value_heads == 1
    assert LLMLabConfig().num_key_value_heads == 2
    assert build_config(ModelSettings(attention_type="mqa")).num_key_value_heads == 1


def test_seed_names_are_aliases_everywhere():
    config = LLMLabConfig(d_model=64, n_heads=4, n_layers=3, activation="relu", norm_eps=1e-3)
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (64, 3, 16)
    assert (config.hidden_act, config.rms_norm_eps, len(config.layer_types)) == ("relu", 1e-3, 3)
    assert not config.to_dict().keys() & {"d_model", "n_heads", "n_layers", "activation", "norm_eps"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hidden_size": 896, "num_attention_heads": 15},
            "hidden_size = 896 is not divisible by num_attention_heads = 15",
        ),
        ({"num_key_value_heads": 4}, "num_attention_heads = 14 is not divisible by num_key_value_heads = 4"),
        ({"attention_type": "mha", "num_key_value_heads": 2}, "contradicts attention_type = mha, which has 14"),
        ({"attention_type": "mla"}, "attention_type = mla: expected one of mha, mqa, gqa"),
        ({"positional_encoding": "learned"}, "positional_encoding = learned: expected one of sinusoidal, rope"),
        ({"hidden_act": "tanh"}, "hidden_act = tanh: expected one of relu, gelu, silu, leaky_relu, swiglu"),
        ({"norm_type": "batchnorm"}, "norm_type = batchnorm: expected one of layernorm, rmsnorm"),
        ({"hidden_size": 42, "head_dim": 3}, "head_dim = 3: rope rotates pairs"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0: expected a whole number of at least 1"),
        ({"vocab_size": "64"}, "vocab_size = 64: expected a whole number"),
        ({"dropout": 1.0}, "dropout = 1.0: expected at least 0 and less than 1"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries; expected num_hidden_layers = 24"),
        ({"layer_types": ["sliding_attention"] * 24}, "sliding_window = None contradicts layer_types"),
        ({"layer_types": ["mamba"] * 24}, "layer_types has mamba: expected full_attention or sliding_attention"),
        ({"positional_encoding": "alibi", "rope_parameters": {"rope_theta": 1.0}}, "no meaning with .* = alibi"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "expected positional_encoding = yarn"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LLMLabConfig(**options)


def test_a_field_changed_afterwards_is_checked_by_the_model(tiny_config):
    config = tiny_config()
    config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    with pytest.raises(ValueError, match="sliding_window = None contradicts layer_types"):
        LLMLabForCausalLM(config)


@pytest.mark.parametrize("activation", CHOICES["hidden_act"])
def test_the_tensor_parallel_plan_names_what_is_there(activation, tiny_config, tmp_path):
    config = tiny_config(hidden_act=activation)
    model = LLMLabForCausalLM(config)
    names = {name.replace(".0.", ".*.") for name, _ in model.model.named_modules() if ".1." not in name}
    assert set(config.base_model_tp_plan) <= names
    assert ("layers.*.mlp.gate_proj" in config.base_model_tp_plan) == (activation == "swiglu")
    assert "layers.*.mlp.gate_proj" in LLMLabConfig.base_model_tp_plan
    model.save_pretrained(tmp_path)
    assert "base_model_tp_plan" not in (tmp_path / "config.json").read_text()
    assert LLMLabConfig.from_pretrained(tmp_path).base_model_tp_plan == config.base_model_tp_plan


def test_a_window_beside_full_layers(tiny_config):
    """As in Qwen2 configurations that name a window and do not use it."""
    torch.manual_seed(0)
    idle = LLMLabForCausalLM(tiny_config(sliding_window=3, layer_types=["full_attention"] * 2)).eval()
    plain = LLMLabForCausalLM(tiny_config()).eval()
    plain.load_state_dict(idle.state_dict())
    tokens = torch.arange(3, 20)[None]
    assert torch.equal(idle(tokens).logits, plain(tokens).logits)
    for family in ("llama", "mistral"):
        torch.testing.assert_close(from_llmlab(idle, family)(tokens).logits, plain(tokens).logits)


def test_initial_weights(tiny_config):
    torch.manual_seed(0)
    model = LLMLabForCausalLM(tiny_config(hidden_size=128, attention_bias=True, initializer_range=0.05))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert abs(parameter.std() - 0.05) < 0.005 and abs(parameter.mean()) < 0.005, name


def test_meta_device_construction_and_materialization(tiny_config, tiny_model):
    for encoding in CHOICES["positional_encoding"]:
        model = tiny_model(positional_encoding=encoding)
        with torch.device("meta"):
            empty = LLMLabForCausalLM(tiny_config(positional_encoding=encoding))
        assert all(p.is_meta for p in empty.parameters())
        filled = empty.to_empty(device="cpu")
        filled.init_weights()  # also what the rotation keeps, which no state dict holds
        filled.load_state_dict(model.state_dict())
        tokens = torch.arange(3, 12)[None]
        torch.testing.assert_close(filled.eval()(tokens).logits, model(tokens).logits)

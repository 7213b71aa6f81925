"""Every trainable parameter is sorted exactly once, and to the kind that its role asks for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    MixtralConfig,
    Qwen2Config,
)

from llmlab.model import LLMLabConfig, LLMLabForCausalLM
from llmlab.optim.build import build_optimizer, sort_parameters
from llmlab.settings.errors import UserError
from llmlab.settings.optimizer import OptimizerSettings

SMALL = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SMALL),
    "gpt2": GPT2Config(vocab_size=24, n_positions=32, n_embd=16, n_layer=2, n_head=2),
    "cohere": CohereConfig(**SMALL, use_qk_norm=True),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=2),
    "mamba": MambaConfig(vocab_size=24, hidden_size=16, num_hidden_layers=1, state_size=4),
}


def names_by_kind(model) -> dict[str, set[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {kind: {names[p] for p in parameters} for kind, parameters in sort_parameters(model)._asdict().items()}


def assert_partition(model) -> None:
    kinds = sort_parameters(model)
    sorted_ids = [id(p) for parameters in kinds for p in parameters]
    assert len(sorted_ids) == len(set(sorted_ids))
    assert set(sorted_ids) == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("name", CONFIGS)
def test_kinds_partition_the_parameters_of_an_architecture(name):
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    assert_partition(model)
    kinds = names_by_kind(model)
    assert all(name.endswith("weight") for name in kinds["hidden"])
    hidden_and_decayed = kinds["hidden"] | kinds["other_weights"]
    assert not any("norm" in name or "embed" in name or "bias" in name or "wte" in name for name in hidden_and_decayed)
    assert not any("head" in name or "wpe" in name for name in kinds["hidden"])
    for parameters in sort_parameters(model)[:1]:
        assert all(p.ndim == 2 for p in parameters)


def test_llama_layers_hold_the_hidden_matrices():
    layer = {f"self_attn.{part}_proj" for part in "qkvo"} | {f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    hidden = {f"model.layers.{k}.{name}.weight" for k in range(2) for name in layer}
    untied = names_by_kind(AutoModelForCausalLM.from_config(CONFIGS["llama"]))
    assert untied["hidden"] == hidden
    assert untied["other_weights"] == {"lm_head.weight"}
    tied = names_by_kind(AutoModelForCausalLM.from_config(CONFIGS["llama tied"]))
    assert tied["hidden"] == hidden
    assert tied["other_weights"] == set()
    assert "model.embed_tokens.weight" in tied["undecayed"]


def test_gpt2_conv1d_weights_are_hidden_matrices():
    kinds = names_by_kind(AutoModelForCausalLM.from_config(CONFIGS["gpt2"]))
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert kinds["hidden"] == {f"transformer.h.{k}.{part}.weight" for k in range(2) for part in parts}
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= kinds["undecayed"]


def test_norms_with_a_matrix_of_weights_are_still_norms():
    kinds = names_by_kind(AutoModelForCausalLM.from_config(CONFIGS["cohere"]))
    model = AutoModelForCausalLM.from_config(CONFIGS["cohere"])
    assert model.model.layers[0].self_attn.q_norm.weight.ndim == 2
    assert "model.layers.0.self_attn.q_norm.weight" in kinds["undecayed"]


def test_expert_stacks_and_state_matrices_are_not_orthogonalized():
    kinds = names_by_kind(AutoModelForCausalLM.from_config(CONFIGS["mixtral"]))
    assert any("experts" in name for name in kinds["other_weights"])
    assert not any("experts" in name for name in kinds["hidden"])
    kinds = names_by_kind(AutoModelForCausalLM.from_config(CONFIGS["mamba"]))
    assert "backbone.layers.0.mixer.A_log" in kinds["other_weights"]
    assert "backbone.layers.0.mixer.in_proj.weight" in kinds["hidden"]


def test_a_reward_head_is_no_hidden_matrix():
    kinds = names_by_kind(LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3)))
    assert kinds["other_weights"] == {"score.weight"}


def test_lora_factors_are_hidden_except_on_embedding_and_head(tiny_llama):
    model = tiny_llama(tie_word_embeddings=False)
    targets = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, modules_to_save=["v_proj"]))
    assert_partition(model)
    kinds = names_by_kind(model)
    short = {
        kind: {n.removeprefix("base_model.model.").replace(".default", "") for n in names}
        for kind, names in kinds.items()
    }
    layers = [f"model.layers.{k}." for k in range(2)]
    adapted = [at + name for at in layers for name in ("self_attn.q_proj", "mlp.down_proj")]
    factors = {f"{name}.lora_{factor}.weight" for name in adapted for factor in "AB"}
    assert short["hidden"] == factors | {f"{at}self_attn.v_proj.modules_to_save.weight" for at in layers}
    assert short["other_weights"] == {"lm_head.lora_A.weight", "lm_head.lora_B.weight"}
    assert short["undecayed"] == {"model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B"}


@given(st.integers(0, 2**21 - 1))
def test_frozen_parameters_are_left_out(mask):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    for k, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(bool(mask >> k & 1))
    assert_partition(model)


def test_built_groups_hold_every_trainable_parameter_with_its_decay(optimizer_name):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    settings = OptimizerSettings(optimizer=optimizer_name)
    groups = build_optimizer(model, settings, learning_rate=1e-3, weight_decay=0.1).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay) == len(list(model.parameters()))
    for parameter_name, parameter in model.named_parameters():
        spared = "norm" in parameter_name or "embed" in parameter_name
        assert decay[id(parameter)] == (0.0 if spared else 0.1)


def test_a_frozen_model_is_refused(tiny_llama):
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(UserError, match="every weight is frozen"):
        build_optimizer(model, OptimizerSettings(), learning_rate=1e-3, weight_decay=0.1)


def test_muon_without_a_matrix_is_refused(tiny_llama):
    model = tiny_llama().requires_grad_(False)
    model.model.norm.requires_grad_(True)
    with pytest.raises(UserError, match="no hidden 2-D weight"):
        build_optimizer(model, OptimizerSettings(optimizer="muon"), learning_rate=1e-3, weight_decay=0.1)


def test_muon_keeps_the_norm_of_a_bf16_momentum(tiny_llama):
    model = tiny_llama().to(torch.bfloat16)
    settings = OptimizerSettings(optimizer="muon", muon_nesterov=False)
    optimizer = build_optimizer(model, settings, learning_rate=1e-3, weight_decay=0.1)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.grad = torch.full_like(weight, 2.0)
    optimizer.step()
    momentum = optimizer.state[weight]["momentum_buffer"]
    torch.testing.assert_close(momentum, torch.full_like(weight, 0.05 * 2.0))


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_embeddings_and_head_take_their_own_rates(name):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    settings = OptimizerSettings(optimizer=name, embedding_lr=0.3, head_lr=0.02)
    groups = build_optimizer(model, settings, learning_rate=1e-3, weight_decay=0.1).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    vectors = 1e-4 if name == "muon" else 1e-3
    for parameter_name, parameter in model.named_parameters():
        special = {"model.embed_tokens.weight": 0.3, "lm_head.weight": 0.02}
        assert rates[id(parameter)] == special.get(parameter_name, vectors if "norm" in parameter_name else 1e-3)
    assert len(rates) == len(list(model.parameters()))
    assert decay[id(model.get_input_embeddings().weight)] == 0 and decay[id(model.lm_head.weight)] == 0.1


def test_value_embeddings_take_the_rate_of_embeddings():
    shape = {key: size for key, size in SMALL.items() if not key.endswith("id")}
    model = LLMLabForCausalLM(LLMLabConfig(**shape, attention_type="mqa", value_embeddings=True))
    groups = build_optimizer(
        model, OptimizerSettings(embedding_lr=0.3), learning_rate=1e-3, weight_decay=0.1
    ).param_groups
    own = [parameter for group in groups if group["lr"] == 0.3 for parameter in group["params"]]
    assert {id(p) for p in own} == {id(model.model.embed_tokens.weight), id(model.model.value_embeddings["1"].weight)}


def test_a_reward_models_score_is_its_head():
    model = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=1))
    groups = build_optimizer(model, OptimizerSettings(head_lr=0.5), learning_rate=1e-3, weight_decay=0).param_groups
    assert [group["params"] for group in groups if group["lr"] == 0.5] == [[model.score.weight]]


@pytest.mark.parametrize(
    ("config", "rate", "message"),
    [
        ("llama tied", "head_lr", "head_lr = 0.1: no output head of its own is trained: it is tied to the embeddings"),
        ("lora", "head_lr", "head_lr = 0.1: no output head of its own is trained; expected none"),
        ("lora", "embedding_lr", "embedding_lr = 0.1: no embedding is trained; expected none"),
    ],
)
def test_a_rate_for_what_is_not_trained_is_refused(config, rate, message):
    model = AutoModelForCausalLM.from_config(CONFIGS[config if config in CONFIGS else "llama"])
    if config == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=message):
        build_optimizer(model, OptimizerSettings(**{rate: 0.1}), learning_rate=1e-3, weight_decay=0.1)

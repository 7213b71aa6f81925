"""LoRA presets in many architectures, and the PEFT configuration that settings become."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from llmlab.adapters import find_targets, lora_config, trainable_share
from llmlab.model import build_config, new_model
from llmlab.settings.errors import SettingsError, UserError
from llmlab.settings.files import Layer
from llmlab.settings.lora import LoraSettings
from llmlab.settings.model import ModelSettings
from llmlab.settings.sources import resolve
from llmlab.settings.training import SFTSettings

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
LLAMA = (
    ["q_proj", "v_proj"],
    ["k_proj", "o_proj", "q_proj", "v_proj"],
    ["down_proj", "gate_proj", "up_proj"],
    ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
)
EXPECTED = {  # architecture: what minimal, attention_only, ffn_only and all mean in it
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma2": LLAMA,
    "gpt2": (["c_attn"], ["attn.c_proj", "c_attn"], ["c_fc", "mlp.c_proj"], ["c_attn", "c_fc", "c_proj"]),
    "phi3": (
        ["qkv_proj"],
        ["o_proj", "qkv_proj"],
        ["down_proj", "gate_up_proj"],
        ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],
    ),
    "phi": (["q_proj", "v_proj"], ["dense", "k_proj", "q_proj", "v_proj"], ["fc1", "fc2"],
            ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"]),
    "gpt_neox": (["query_key_value"], ["dense", "query_key_value"], ["dense_4h_to_h", "dense_h_to_4h"],
                 ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]),
    "falcon": (["query_key_value"], ["dense", "query_key_value"], ["dense_4h_to_h", "dense_h_to_4h"],
               ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]),
    "opt": (["q_proj", "v_proj"], ["k_proj", "out_proj", "q_proj", "v_proj"], ["fc1", "fc2"],
            ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"]),
}  # fmt: skip
PRESETS = ("minimal", "attention_only", "ffn_only", "all")


def tiny(kind):
    if kind == "llmlab":
        shape = ModelSettings(d_model=32, n_heads=2, n_kv_heads=1, d_ff=64, n_layers=2, vocab_size=64, max_seq_len=32)
        return new_model(build_config(shape))
    values = dict(SMALL)
    if kind == "gpt2":
        values = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    if kind in ("qwen3", "gemma2"):
        values["head_dim"] = 16
    if kind == "opt":
        values |= {"ffn_dim": 64, "word_embed_proj_dim": 32}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values, **special))


@pytest.mark.parametrize("kind", ["llmlab", *EXPECTED])
def test_presets_find_the_projections_of_an_architecture(kind):
    model = tiny(kind)
    for preset, expected in zip(PRESETS, EXPECTED.get(kind, LLAMA), strict=True):
        targets = find_targets(model, preset)
        assert targets == expected, preset
        adapted = get_peft_model(tiny(kind), lora_config(model, LoraSettings(use_lora=True, lora_preset=preset)))
        layers = {name.rpartition(".lora_A")[0] for name, _ in adapted.named_modules() if name.endswith("lora_A")}
        assert layers and all(any(layer.endswith(target) for target in targets) for layer in layers)


def test_the_trainable_share_is_counted():
    model = tiny("llmlab")
    config = lora_config(model, LoraSettings(use_lora=True, lora_r=4))
    share = trainable_share(get_peft_model(model, config))
    # q (32 -> 32) and v (32 -> 16) in two layers: r x (in + out) each
    assert share[0] == 2 * 4 * ((32 + 32) + (32 + 16))
    assert share[1] == sum(p.numel() for p in tiny("llmlab").parameters()) + share[0]
    assert trainable_share(tiny("gpt2"))[0] == trainable_share(tiny("gpt2"))[1]


def test_settings_become_pefts_configuration():
    settings = LoraSettings(
        lora_r=16, lora_alpha=32, lora_dropout=0.1, lora_bias="lora_only", use_dora=True, use_rslora=True,
        lora_target_modules=["mlp.up_proj"], modules_to_save=["norm"],
    )  # fmt: skip
    config = lora_config(tiny("llmlab"), settings)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (16, 32, 0.1, "lora_only")
    assert (config.use_dora, config.use_rslora, config.task_type) == (True, True, "CAUSAL_LM")
    assert (config.target_modules, config.modules_to_save) == ({"mlp.up_proj"}, ["norm"])


def test_a_preset_that_matches_nothing_lists_the_linear_modules():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.ModuleDict({"left": torch.nn.Linear(2, 2), "right": torch.nn.Linear(2, 2)})

    with pytest.raises(UserError, match="lora_preset = ffn_only: it matches no module .* some of left, right"):
        find_targets(Odd(), "ffn_only")
    with pytest.raises(UserError, match="no linear module ends in 'q_prj'; did you mean 'q_proj'"):
        find_targets(tiny("llmlab"), "custom", ["q_prj"])


GUIDE = """{
    "r": 16, "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "lora_dropout": 0.05, "bias": "none", "task_type": "CAUSAL_LM"
}"""


def test_the_guides_block_loads_as_printed_and_implies_lora(tmp_path):
    from llmlab.settings.files import read_layer

    path = tmp_path / "lora.py"
    path.write_text(f"lora_config = {GUIDE}\n")
    resolved = resolve(SFTSettings, read_layer(path))
    settings = resolved.settings
    assert (settings.use_lora, settings.lora_preset, settings.lora_r, settings.lora_alpha) == (True, "custom", 16, 32)
    assert len(settings.lora_target_modules) == 7
    assert resolved.warnings == (f"{path}:4: no effect here: 'task_type' (it follows from the stage)",)


def test_contradictions_are_named():
    with pytest.raises(SettingsError, match="lora_r applies only when use_lora is true, and use_lora is false"):
        resolve(SFTSettings, Layer("command line", {"use_lora": False, "lora_r": 4}))
    with pytest.raises(SettingsError, match="lora_preset = custom needs lora_target_modules"):
        resolve(SFTSettings, Layer("command line", {"lora_preset": "custom"}))


@pytest.mark.parametrize(("given", "alpha"), [({}, 16), ({"lora_r": 32}, 64), ({"lora_r": 32, "lora_alpha": 8}, 8)])
def test_alpha_is_twice_the_rank_unless_it_is_set(given, alpha):
    settings = resolve(LoraSettings, Layer("x", {"use_lora": True, **given})).settings
    model = new_model(build_config(ModelSettings(d_model=8, n_heads=2, d_ff=8, n_layers=1, vocab_size=8)))
    assert lora_config(model, settings).lora_alpha == settings.alpha == alpha
    again = resolve(LoraSettings, Layer("record", settings.recorded()), Layer("cli", {"lora_r": 4})).settings
    assert again.alpha == 8  # 2 x 4, or as it was set

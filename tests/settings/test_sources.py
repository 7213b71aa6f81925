"""Layers, spellings, conditions and errors of settings."""

import json
import string

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmlab.settings.base import Resume, Trl, When, fields_of, spellings_of
from llmlab.settings.data import DataSource
from llmlab.settings.errors import SettingsError, UserError
from llmlab.settings.files import Layer, dump, parse_scalar, read_layer
from llmlab.settings.optimizer import OptimizerSettings
from llmlab.settings.preference import DPOSettings
from llmlab.settings.rl import PPOSettings
from llmlab.settings.sources import load, resolve
from llmlab.settings.training import HealthLimits, PretrainSettings, SFTSettings


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(*layers):
    with pytest.raises(SettingsError) as caught:
        resolve(PretrainSettings, *layers)
    return caught.value.problems


SEED_DEFAULTS = {  # LLM-Lab document, "Model Configuration" and "Base Training"
    "model.tokenizer_name": "Qwen/Qwen2.5-0.5B",
    "model.positional_encoding": "rope",
    "model.attention_type": "gqa",
    "model.norm_type": "rmsnorm",
    "model.activation": "swiglu",
    "model.d_model": 896,
    "model.n_heads": 14,
    "model.n_kv_heads": 2,
    "model.d_ff": 4864,
    "model.n_layers": 24,
    "model.vocab_size": 151936,
    "model.max_seq_len": 1024,
    "model.dropout": 0.0,
    "model.sliding_window": None,
    "model.attention_bias": False,
    "model.norm_eps": 1e-6,
    "max_steps": 10000,
    "optimizer": "adamw",
    "adamw_beta1": 0.9,
    "adamw_beta2": 0.999,
    "adamw_eps": 1e-8,
    "lion_beta1": 0.9,
    "lion_beta2": 0.99,
    "sophia_beta1": 0.965,
    "sophia_beta2": 0.99,
    "sophia_rho": 0.04,
    "muon_momentum": 0.95,
    "muon_nesterov": True,
    "lr": 3e-4,
    "weight_decay": 0.1,
    "scheduler": "cosine",
    "warmup_steps": 1000,
    "batch_size": 1,
    "gradient_accumulation_steps": 64,
    "grad_clip": 1.0,
    "eval_every": 500,
    "eval_steps": 100,
    "save_best_only": True,
}


def test_defaults_are_the_seeds():
    settings = PretrainSettings()
    found = {setting.key: setting.of(settings) for setting in fields_of(PretrainSettings)}
    assert {key: found[key] for key in SEED_DEFAULTS} == SEED_DEFAULTS
    assert [str(source) for source in settings.datasets] == ["HuggingFaceFW/fineweb-edu"]


def test_spellings_meet_before_layers_are_merged(tmp_path):
    path = write(tmp_path, "a.yaml", "learning_rate: 5e-6\nper_device_train_batch_size: 4\nmax_grad_norm: 0.5\n")
    resolved = resolve(PretrainSettings, read_layer(path), Layer("command line", {"lr": 1e-3}))
    assert (resolved.settings.lr, resolved.settings.batch_size, resolved.settings.grad_clip) == (1e-3, 4, 0.5)
    assert resolved.sources["lr"] == "command line"
    assert resolved.sources["batch_size"] == f"{path}:2"
    assert resolved.sources["max_steps"] == "default"


def test_a_fields_own_name_beats_another_fields_alias():
    # `eval_steps` counts batches here, though Hugging Face's field of that name is this stage's `eval_every`
    assert spellings_of(PretrainSettings)["eval_steps"].key == "eval_steps"


def test_nested_keys_may_be_flat_dotted_or_in_their_group(tmp_path):
    for text in (
        "d_model: 64\nn_heads: 4\n",
        "model.d_model: 64\nmodel.n_heads: 4\n",
        "model: {hidden_size: 64, n_heads: 4}\n",
    ):
        settings = load(PretrainSettings, write(tmp_path, "a.yaml", text))
        assert (settings.model.d_model, settings.model.n_heads) == (64, 4)


def test_a_group_may_name_a_file_beside_the_recipe(tmp_path):
    write(tmp_path, "shape.json", json.dumps({"d_model": 64, "n_heads": 4}))
    path = write(tmp_path, "a.yaml", "d_model: 128\nmodel: shape.json\n")
    resolved = resolve(PretrainSettings, read_layer(path))
    assert (resolved.settings.model.d_model, resolved.settings.model.n_heads) == (128, 4)
    assert resolved.sources["model.n_heads"].endswith("shape.json:1")


def test_all_problems_at_once_each_with_file_and_line(tmp_path):
    path = write(
        tmp_path,
        "bad.yaml",
        "learnin_rate: 1\noptimizer: adamv\nbatch_size: 0\nd_model: 10\nn_heads: 3\ndatasets: [a|b|c|d|e]\n",
    )
    found = problems(read_layer(path))
    assert f"{path}:1: unknown key 'learnin_rate'; did you mean 'learning_rate'?" in found
    assert any(
        line.startswith(f"{path}:2: optimizer = adamv: expected one of adamw") and "'adamw'" in line for line in found
    )
    assert f"{path}:3: batch_size = 0: expected greater than 0" in found
    assert any(line.startswith(f"{path}:5: d_model = 10 is not divisible by n_heads = 3") for line in found)
    assert any(line.startswith(f"{path}:6: datasets[0] = a|b|c|d|e: expected 'name | subset") for line in found)
    assert any("n_heads = 3 is not divisible by n_kv_heads = 2" in line for line in found)
    assert len(found) == 6


def test_two_spellings_in_one_file_are_an_error(tmp_path):
    found = problems(read_layer(write(tmp_path, "a.yaml", "lr: 1.0\nlearning_rate: 2.0\n")))
    assert "two spellings of one setting" in found[0]


def test_a_key_twice_in_one_file_is_an_error(tmp_path):
    path = write(tmp_path, "a.yaml", "lr: 1.0\nmax_steps: 3\nlr: 2.0\n")
    with pytest.raises(SettingsError, match=r"a.yaml:3: 'lr' is a duplicate key, first set on line 1"):
        read_layer(path)


def test_conditions():
    found = problems(Layer("file", {"sophia_rho": 0.1}))
    assert found == ["file: sophia_rho applies only when optimizer is sophia, and optimizer is adamw"]
    assert (
        resolve(PretrainSettings, Layer("file", {"sophia_rho": 0.1, "optimizer": "sophia"})).settings.sophia_rho == 0.1
    )
    # a file that lists everything with its defaults is no contradiction
    assert resolve(PretrainSettings, Layer("file", {"sophia_rho": 0.04})).warnings == ()


def test_a_condition_changed_by_a_higher_layer_drops_the_value_with_a_warning():
    resolved = resolve(
        PretrainSettings,
        Layer("file", {"sophia_rho": 0.1, "optimizer": "sophia"}),
        Layer("cli", {"optimizer": "lion"}),
    )
    assert resolved.settings.sophia_rho == 0.04
    assert resolved.warnings == (
        "file: sophia_rho applies only when optimizer is sophia, and optimizer is lion; ignored",
    )


def test_every_condition_names_a_field_and_possible_values():
    for setting in fields_of(PretrainSettings):
        condition = setting.marker(When)
        if condition:
            other = next(s for s in fields_of(PretrainSettings) if s.path == (*setting.path[:-1], condition.field))
            assert set(condition.values) < set(other.choices)


def test_inapplicable_keys_warn_from_a_file_and_fail_elsewhere(tmp_path):
    path = write(tmp_path, "a.yaml", "use_lora: true\n")
    assert "no effect here: 'use_lora' (" in resolve(PretrainSettings, read_layer(path)).warnings[0]
    assert "cannot be set here" in problems(Layer("command line", {"use_lora": True}))[0]


def test_trainer_args_merge_over_layers():
    resolved = resolve(
        PretrainSettings, Layer("file", {"trainer_args": {"a": 1, "b": 2}}), Layer("cli", {"trainer_args.b": 3})
    )
    assert resolved.settings.trainer_args == {"a": 1, "b": 3}


def test_sources_of_data():
    settings = resolve(
        PretrainSettings,
        Layer("f", {"dataset": ["a/b | fra | 2.0", {"name": "c", "column": "t"}, "d | | 3", "e | | | train_sft"]}),
    ).settings
    assert [(s.name, s.subset, s.weight, s.split, s.column) for s in settings.datasets] == [
        ("a/b", "fra", 2.0, None, None),
        ("c", None, 1.0, None, "t"),
        ("d", None, 3.0, None, None),
        ("e", None, 1.0, "train_sft", None),
    ]
    assert [str(s) for s in settings.datasets] == ["a/b | fra | 2", "c", "d |  | 3", "e |  | 1 | train_sft"]
    assert [DataSource.model_validate(str(s)) for s in settings.datasets if not s.column] == [
        s for s in settings.datasets if not s.column
    ]


def test_none_is_written_in_many_ways():
    for word in ("none", "None", None):
        settings = resolve(PretrainSettings, Layer("f", {"sliding_window": word, "scheduler": "none"})).settings
        assert settings.model.sliding_window is None and settings.scheduler == "none"


def test_python_literals_are_read_and_never_executed(tmp_path):
    path = write(tmp_path, "guide.py", 'config = {\n  "learning_rate": 5e-6,  # conservative\n  "seed": 1,\n}\n')
    resolved = resolve(PretrainSettings, read_layer(path))
    assert resolved.settings.lr == 5e-6 and resolved.sources["lr"] == f"{path}:2"
    with pytest.raises(UserError, match="never executed"):
        read_layer(write(tmp_path, "evil.py", 'config = {"seed": __import__("os").getpid()}\n'))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "- 1\n", "expected a mapping"),
        ("a.yaml", "a: [1\n", "not valid YAML"),
        ("a.json", "{", "a.json:1: this is not valid JSON"),
        ("a.txt", "", "not '.txt'"),
    ],
)
def test_unreadable_files(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        read_layer(write(tmp_path, name, text))


def test_missing_and_binary_files(tmp_path):
    write(tmp_path, "recipe.yaml", "")
    with pytest.raises(UserError, match="did you mean 'recipe.yaml'"):
        read_layer(tmp_path / "recip.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="it is not text"):
        read_layer(tmp_path / "b.yaml")


@given(st.floats(min_value=1e-12, max_value=1e6, allow_nan=False))
def test_floats_on_the_command_line_are_yamls(value):
    assert parse_scalar(f"{value:.3e}") == float(f"{value:.3e}")
    assert yaml.safe_load(str(parse_scalar(str(value)))) is not None


@given(
    lr=st.floats(min_value=1e-9, max_value=10),
    steps=st.integers(1, 10**9),
    optimizer=st.sampled_from(["adamw", "lion", "muon"]),
    names=st.lists(st.text(string.ascii_letters + "/-_.", min_size=1, max_size=20), min_size=1, max_size=4),
    weights=st.lists(st.floats(min_value=1e-3, max_value=1e3), min_size=4, max_size=4),
)
def test_what_is_written_is_what_is_read(tmp_path_factory, lr, steps, optimizer, names, weights):
    datasets = [{"name": name, "weight": weight} for name, weight in zip(names, weights, strict=False)]
    settings = PretrainSettings(lr=lr, max_steps=steps, optimizer=optimizer, datasets=datasets)
    folder = tmp_path_factory.mktemp("round")
    for ending in ("yaml", "json"):
        dump(settings.model_dump(mode="json"), folder / f"s.{ending}")
        assert load(PretrainSettings, folder / f"s.{ending}") == settings


@given(
    st.sampled_from(sorted(spellings_of(PretrainSettings))),
    st.integers(0, 30),
    st.sampled_from(string.ascii_lowercase),
)
def test_a_misspelled_key_is_never_accepted_silently(key, position, letter):
    wrong = key[:position] + letter + key[position:]
    if wrong in spellings_of(PretrainSettings):
        return
    assert "unknown key" in problems(Layer("f", {wrong: 1}))[0]


def test_trl_fields_are_transformers_fields():
    from dataclasses import fields

    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)}
    named = {setting.marker(Trl).name for setting in fields_of(PretrainSettings) if setting.marker(Trl)}
    assert named and named <= known
    assert PretrainSettings().trainer_arguments()["per_device_train_batch_size"] == 1


def test_two_spellings_with_one_value_are_one(tmp_path):
    path = write(tmp_path, "a.yaml", "lr: 1e-4\nlearning_rate: 0.0001\n")
    assert load(PretrainSettings, path).lr == 1e-4
    assert "two spellings of one setting" in problems(Layer("x", {"lr": 1e-4, "learning_rate": 2e-4}))[0]


def test_lists_of_mappings_replace_each_other():
    one = Layer("a", {"datasets": {"name": "a", "subset": "x"}})
    settings = resolve(PretrainSettings, one, Layer("b", {"datasets": {"name": "b"}})).settings
    assert [(source.name, source.subset) for source in settings.datasets] == [("b", None)]


def test_alternatives_of_a_later_layer_replace_those_of_an_earlier_one():
    file = Layer("file", {"max_steps": 5, "batch_size": 32, "mini_batch_size": 8})
    settings = resolve(DPOSettings, file, Layer("cli", {"num_train_epochs": 2})).settings
    assert settings.epochs == 2 and "max_steps" not in settings.model_fields_set
    assert resolve(DPOSettings, Layer("file", {"epochs": 2}), Layer("cli", {"max_steps": 5})).settings.epochs is None
    assert resolve(DPOSettings, file, Layer("cli", {"gradient_accumulation_steps": 2})).settings.accumulation(1) == 2
    assert resolve(DPOSettings, file, Layer("cli", {"epochs": None})).settings.max_steps == 5
    with pytest.raises(SettingsError, match="set one quantity in two units; keep one"):
        resolve(DPOSettings, Layer("file", {"max_steps": 5, "epochs": 2}))


@pytest.mark.parametrize(
    ("stage", "values", "every", "batches", "said"),
    [
        (SFTSettings, {"eval_steps": 7}, 500, 7, None),
        (SFTSettings, {"eval_steps": 7, "eval_every": 9}, 9, 7, None),
        (SFTSettings, {"eval_steps": 7, "eval_every": 9, "save_steps": 3}, 9, 7, None),
        (SFTSettings, {"eval_steps": 7, "save_steps": 3}, 7, 50, "beside save_steps, so it counts steps between"),
        (PretrainSettings, {"eval_steps": 7, "logging_steps": 3}, 7, 100, "beside logging_steps, so it counts steps"),
        (DPOSettings, {"eval_steps": 7}, 7, 50, None),
        (DPOSettings, {"eval_steps": 7, "save_steps": 3}, 7, 50, None),
        (DPOSettings, {"eval_steps": 7, "eval_every": 9}, 9, 7, "beside eval_every, so it counts validation batches"),
    ],
)
def test_eval_steps_is_read_by_what_stands_beside_it(stage, values, every, batches, said):
    resolved = resolve(stage, Layer("file", values))
    settings = resolved.settings
    name = "eval_batches" if stage is DPOSettings else "eval_steps"
    assert (settings.eval_every, getattr(settings, name)) == (every, batches)
    assert (said in resolved.warnings[0]) if said else not resolved.warnings


def test_python_files_of_blocks(tmp_path):
    text = "a_config = {'lr': 1e-4}\nother = {\n    'seed': 3,\n}\nmax_steps = 7  # a number\n"
    resolved = resolve(PretrainSettings, read_layer(write(tmp_path, "a.py", text)))
    assert (resolved.settings.lr, resolved.settings.seed, resolved.settings.max_steps) == (1e-4, 3, 7)
    assert resolved.sources["seed"].endswith("a.py:3") and resolved.sources["max_steps"].endswith("a.py:5")
    for wrong, message in (
        ("a = {'lr': 1}\nb = {'lr': 2}\n", "a.py:2: 'lr' is a duplicate key, first set on line 1"),
        ("import os\na = {'lr': 1}\n", "a.py:1: expected name = "),
        ("a = {'lr': open('x')}\n", "a.py:1: only literal values"),
        ("f(1)\n", "a.py:1: expected name = "),
    ):
        with pytest.raises(UserError, match=message):
            read_layer(write(tmp_path, "a.py", wrong))


@pytest.mark.parametrize(
    ("resume", "names"),
    [
        (
            Resume.FREE,
            {
                *("device", "dtype", "tf32", "compile", "gradient_checkpointing", "dataloader_num_workers"),
                *("attn_implementation", "use_liger_kernel"),
                *("max_steps", "epochs", "log_every", "eval_every", "eval_steps", "save_every", "save_best_only"),
                *("save_total_limit", "trainer_args", "allow_dropped", "allow_truncated", "gates", "gate_every"),
                *("on_warning", "on_critical", "max_rollbacks", "skip_spikes", *HealthLimits.model_fields),
            },
        ),
        (Resume.SPLIT, {"batch_size", "gradient_accumulation_steps"}),
        (Resume.LOCAL, {"output_dir", "cache_dir", "num_proc", "auto_batch", "report", "report_to"}),
        (
            Resume.NEW_OPTIMIZER,
            {s.name for s in fields_of(OptimizerSettings)}
            | {"learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"},
        ),
    ],
)
def test_what_a_resumed_run_may_change(resume, names):
    assert {s.name for s in fields_of(SFTSettings) if s.resume is resume} == names


def test_all_contradictions_are_said_at_once():
    words = {"batch_size": 7, "mini_batch_size": 2, "adaptive_kl": True, "init_kl_coef": 0.0}
    with pytest.raises(SettingsError) as caught:
        resolve(PPOSettings, Layer("here", words))
    found = caught.value.problems
    assert len(found) == 2 and found[0].startswith("here: adaptive_kl needs init_kl_coef above 0")
    assert found[1].startswith("here: batch_size = 7 is not a multiple of mini_batch_size = 2")

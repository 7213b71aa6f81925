"""An option that is accepted has an effect: each setting of each stage is changed, and what the stage hands to its
trainer differs.

The stage itself runs, as far as the call of `Trainer.train`.
"""

import hashlib
import json
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.machinery import ModuleSpec
from itertools import islice
from types import ModuleType

import datasets
import pytest
import torch
from pydantic import BaseModel
from rich.console import Console
from transformers import Trainer
from trl import GRPOTrainer

from llmlab.hardware import probe
from llmlab.runs.arguments import build_arguments
from llmlab.settings.base import Trl, When, fields_of
from llmlab.settings.errors import UserError
from llmlab.settings.optimizer import OptimizerSettings
from llmlab.stages import STAGES

TRAINING = ["pretrain", "sft", "dpo", "orpo", "reward", "grpo", "ppo"]
NOT_HERE = ("tf32",)  # CUDA alone has it: see the last test
LATER = {"grpo": ("baseline_mode", "kl_penalty")}  # the trainer asks the settings: test_grpo shows both


class Seen(BaseException):
    """Ends a run where its trainer would begin."""


def plain(value, depth=4):
    """What a value holds, in comparable form: no settings, in which every change would show."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(value, (list, tuple)):
        return [plain(part, depth) for part in value]
    if isinstance(value, dict):
        return {str(key): plain(part, depth) for key, part in value.items()}
    if isinstance(value, (BaseModel, Console, Trainer, torch.nn.Module, datasets.Dataset)) or depth == 0:
        return type(value).__name__
    parts = vars(value) if hasattr(value, "__dict__") and type(value).__module__.startswith("llmlab") else {}
    return [type(value).__name__, {name: plain(part, depth - 1) for name, part in parts.items() if name != "record"}]


def rows_of(data):
    """The first rows of a dataset, and their number where it has one."""
    if data is None:
        return None
    size = len(data) if hasattr(data, "__len__") else None
    rows = islice(data, 24) if size is None else (data[index] for index in range(min(size, 24)))
    return size, [plain(row) for row in rows]


def handed_over(trainer):
    """What a stage handed to its trainer, part by part."""
    optimizer = trainer.create_optimizer()
    model, reference = trainer.model, getattr(trainer, "ref_model", None)
    arguments = {name: value for name, value in trainer.args.to_dict().items() if name != "logging_dir"}
    weights = {name: (str(p.dtype), list(p.shape), p.requires_grad, plain(p)) for name, p in model.named_parameters()}
    return {
        "arguments": {name: str(value) for name, value in arguments.items()},
        "model": [str(model.config), str(model.generation_config)] if hasattr(model, "generation_config") else "",
        "adapters": [str(config) for config in getattr(model, "peft_config", {}).values()],
        "weights": weights,
        "compiled": [name for name, module in model.named_modules() if module._compiled_call_impl is not None],
        "reference": None if reference is None else [plain(p) for p in reference.parameters()],
        "tokenizer": [trainer.processing_class.name_or_path, trainer.processing_class.chat_template],
        "train": rows_of(trainer.train_dataset),
        "validation": rows_of(trainer.eval_dataset),
        "optimizer": type(optimizer).__name__,
        "groups": [{name: plain(v) for name, v in g.items() if name != "params"} for g in optimizer.param_groups],
        "callbacks": [plain(callback) for callback in trainer.callback_handler.callbacks],
        "rewards": [plain(reward) for reward in getattr(trainer, "reward_funcs", [])],
        "streamed": [plain(reader) for reader in getattr(trainer.train_dataset, "readers", [])],
    }


@pytest.fixture
def capture(tiny_settings, tmp_path, monkeypatch):
    """Returns a function that runs a stage as far as its trainer, and says what that was given."""
    monkeypatch.setattr("llmlab.hardware._supports_bf16", lambda device: (True, "for this test"))
    monkeypatch.setattr("llmlab.runs.compile.missing_tool", lambda device_type: None)

    def see(self, *args, **kwargs):
        raise Seen(self)

    def run(stage, **changes):
        settings = tiny_settings(stage, **{"output_dir": tmp_path / "run", **changes})
        monkeypatch.setattr(Trainer, "train", see)
        try:
            STAGES[stage].function(settings, console=Console(quiet=True))
        except Seen as seen:
            trainer = seen.args[0]
            return (handed_over(trainer) if isinstance(trainer, Trainer) else trainer) | {"folders": folders()}
        except UserError as error:
            return {"refused": str(error).replace(str(settings.output_dir), "")}
        finally:
            shutil.rmtree(settings.output_dir, ignore_errors=True)

    def folders():
        return sorted(path.name for path in tmp_path.iterdir() if path.is_dir())

    return run


def own(stage):
    return fields_of(STAGES[stage].settings_class)


def conditions(setting):
    return {mark.field: mark.values[-1] for mark in setting.info.metadata if isinstance(mark, When)}


@pytest.mark.parametrize("stage", TRAINING)
def test_equal_settings_are_handed_over_alike(stage, capture):
    assert capture(stage) == capture(stage)


# Those that are fields of the trainer's arguments: all at once ----------------------------------------------------

SIZES = {  # values that fit together
    "pretrain": {"batch_size": 3, "gradient_accumulation_steps": 2},
    "sft": {"batch_size": 3, "gradient_accumulation_steps": 2, "max_seq_len": 90},
    "dpo": {"mini_batch_size": 2, "max_length": 90, "label_smoothing": 0.2},
    "orpo": {"mini_batch_size": 2, "max_length": 90},
    "reward": {"mini_batch_size": 2, "max_length": 90},
    "grpo": {"mini_batch_size": 2, "gradient_accumulation_steps": 4, "group_size": 2},
    "ppo": {"mini_batch_size": 2, "gradient_accumulation_steps": 2, "value_model": "shared"},
}
ELSEWHERE = ("num_train_epochs", "save_total_limit", "use_vllm", "vllm_mode")  # one by one, below


def named(stage):
    return [s for s in own(stage) if s.marker(Trl) is not None and s.marker(Trl).name not in ELSEWHERE]


def changed(setting, before):
    if isinstance(before, bool):
        return not before
    if isinstance(before, int):
        return before + 1
    return before * 0.7 + 0.011


@pytest.mark.parametrize("stage", TRAINING)
def test_arguments_of_the_trainer(stage, capture, tiny_settings, tmp_path):
    before = tiny_settings(stage, tmp_path / "run")
    values = {"output_dir": str(tmp_path / "other")}
    values |= {s.name: changed(s, s.of(before)) for s in named(stage) if s.name not in ("output_dir", *SIZES[stage])}
    values |= SIZES[stage]
    arguments = capture(stage, **values)["arguments"]
    for setting in named(stage):
        assert values[setting.name] != setting.of(before), setting.key
        assert arguments[setting.marker(Trl).name] == str(values[setting.name]), setting.key


# Those of the optimizers: all of one at once ----------------------------------------------------------------------

OF_OPTIMIZERS = {s.name: conditions(s) for s in fields_of(OptimizerSettings) if conditions(s)}


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sophia", "muon"])
@pytest.mark.parametrize("stage", TRAINING)
def test_settings_of_the_optimizer(stage, optimizer, capture):
    names = [s for s in own(stage) if s.name in OF_OPTIMIZERS and s.name.startswith(optimizer)]
    assert names
    values = {s.name: changed(s, s.default) for s in names}
    built = capture(stage, optimizer=optimizer, **values)
    found = json.dumps(built["groups"])
    for name, value in values.items():
        assert (str(value) if not isinstance(value, bool) else json.dumps(value)) in found, (name, found)


# All others, one by one ----------------------------------------------------------------------------------------------


def single(stage):
    done = {s.key for s in named(stage)} | OF_OPTIMIZERS.keys() | {*NOT_HERE, *LATER.get(stage, ())}
    return [s for s in own(stage) if s.key not in done]


@pytest.fixture(scope="session")
def others(base_folder, wide_base_folder, corpus_file, chat_file, pairs_file, tmp_path_factory):
    """Files and folders that settings may name instead."""
    folder = tmp_path_factory.mktemp("others")
    (folder / "template.jinja").write_text((base_folder / "chat_template.jinja").read_text().replace("\n", " "))
    shutil.copytree(base_folder, folder / "base")
    (folder / "text.jsonl").write_text(corpus_file.read_text().replace("The", "That"))
    (folder / "chat.jsonl").write_text(chat_file.read_text().replace("The", "That"))
    (folder / "pairs.jsonl").write_text(pairs_file.read_text().replace("The", "That"))
    turns = [{"role": role, "content": "Moo."} for role in ("user", "assistant", "user", "assistant")]
    rows = [{"messages": turns, "k": k, "label": k % 3 == 0} for k in range(60)]
    (folder / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from llmlab.model import load_classifier

    load_classifier(base_folder).save_pretrained(folder / "scorer")
    for path in base_folder.glob("token*"):
        shutil.copy(path, folder / "scorer")
    return folder


def damaged(path, folder, rows):
    """A copy with rows that cannot be used: more than the default allows."""
    copy = folder / f"damaged-{path.name}"
    copy.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in rows) * 40)
    return [str(copy)]


@pytest.mark.parametrize(
    ("stage", "setting"),
    [pytest.param(stage, setting, id=f"{stage}-{setting.key}") for stage in TRAINING for setting in single(stage)],
)
def test_each_other_setting_has_an_effect(
    stage, setting, capture, others, corpus_file, chat_file, pairs_file, base_folder, wide_base_folder, tmp_path,
    monkeypatch, share_file, tiny_settings,
):  # fmt: skip
    kind = {"pretrain": "text", "sft": "chat", "grpo": "chat", "ppo": "chat"}.get(stage, "pairs")
    own_data = {"text": corpus_file, "chat": chat_file, "pairs": pairs_file}[kind]
    before, after = dict(conditions(setting)), {}
    online = stage in ("grpo", "ppo")
    batches = {"eval_batches": 1, "eval_steps": 1}
    values = {
        "datasets": [str(others / f"{kind}.jsonl")],
        "validation_datasets": [str(others / f"{kind}.jsonl")],
        "validation_fraction": 0.5,
        "cache_dir": str(tmp_path / "other-cache"),
        "num_proc": 2,
        "max_samples": 11,
        "trainer_args": {"torch_empty_cache_steps": 7},
        "policy_checkpoint": str(others / "base"),
        "reference_checkpoint": str(wide_base_folder),
        "init_from": str(base_folder),
        "chat_template": str(others / "template.jinja"),
        "optimizer": "lion",
        "scheduler": "linear",
        "dtype": "bf16",
        "device": "cuda",
        "compile": True,
        "epochs": 2.0,
        "save_total_limit": 7,
        "save_every": 5,
        "eval_every": 5,
        "lora_preset": "all",
        "lora_alpha": 7.0,
        "lora_bias": "all",
        "lora_target_modules": ["k_proj"],
        "modules_to_save": ["norm"],
        "loss_on": "completion",
        "only_label": False,
        "max_prompt_length": 12,
        "batch_size": 16,
        "gradient_accumulation_steps": 6,
        "rewards": ["length"],
        "reward_model": str(others / "scorer"),
        "value_checkpoint": str(others / "scorer"),
        "num_episodes": 640,
        "log_interval": 64,
        "save_interval": 64,
        "eval_interval": 64,
        "stop_patience": 3,
        "use_vllm": True,
        "max_seq_len": 60,
        "model.tokenizer_name": str(others / "base"),
        "model.positional_encoding": "alibi",
        "model.attention_type": "mha",
        "model.d_model": 64,
        "model.n_heads": 4,
        "model.n_kv_heads": 1,
        "model.max_seq_len": 16,
        "model.vocab_size": 512,
        "model.sliding_window": 4,
        "model.yarn_original_max_seq_len": 12,
        "model.activation": "relu",
        "model.norm_type": "layernorm",
        **batches,
    }
    for_bases = {
        "only_label": {"datasets": [str(others / "turns.jsonl")], "only_label": True},
        "loss_on": {"datasets": [str(others / "turns.jsonl")]},
        "lora_target_modules": {"use_lora": True, "lora_target_modules": ["q_proj"]},
        "validation_datasets": {"validation_fraction": 0.1},
        "allow_dropped": {"datasets": damaged(own_data, tmp_path, [{"text": ""}, {"question": "", "answer": ""}])},
        "compile": {"compile": False},
        "normalize_rewards": {"rewards": [{"name": "length", "weight": 0.5}]},
        "kl_penalty": {"init_kl_coef": 0.1},
        "target_kl": {"adaptive_kl": True, "init_kl_coef": 0.1} if stage == "grpo" else {"early_stop": True},
        "stop_patience": {"stop_patience": 9},
        "reward_model": {"rewards": ["length"]},
    }
    if online:
        before = {"validation_fraction": 0.1, **before}
    before |= for_bases.get(setting.key, {})
    if setting.key == "allow_dropped":
        values["allow_dropped"] = 0.9
    if setting.key == "allow_truncated":
        long = {
            "question": "Why? " * 90,
            "answer": "Moo.",
            "prompt": "Why? " * 90,
            "chosen": "Moo.",
            "rejected": "Mu.",
        }
        before["datasets"] = damaged(own_data, tmp_path, [long])
        values["allow_truncated"] = 0.9
        before["max_seq_len" if stage == "sft" else "max_length"] = 40
        if stage != "sft":
            before["max_prompt_length"] = 39
    if setting.key == "num_proc":  # a cache of its own, and the processes that fill it
        monkeypatch.setattr("llmlab.data.chat.rows.WORTH_PROCESSES", 1)
        monkeypatch.setattr("llmlab.data.text.store.SERIAL_BATCHES", 0)
        monkeypatch.setattr(ProcessPoolExecutor, "__init__", lambda self, number, *rest: stop({"workers": number}))
        original = datasets.Dataset.map
        monkeypatch.setattr(
            datasets.Dataset,
            "map",
            lambda self, *args, num_proc=None, **more: (
                stop({"workers": num_proc}) if num_proc else original(self, *args, **more)
            ),
        )
        before["cache_dir"] = str(tmp_path / "empty-cache")
    if setting.key in ("use_vllm", "vllm_mode"):
        vllm = ModuleType("vllm")
        vllm.__spec__ = ModuleSpec("vllm", None)
        monkeypatch.setitem(sys.modules, "vllm", vllm)
        monkeypatch.setattr(GRPOTrainer, "__init__", lambda self, *, args, **more: stop({"args": str(args)}))
    value = values.get(setting.key, values.get(setting.name))
    if value is None:
        choices = [choice for choice in setting.choices if choice != before.get(setting.name, setting.default)]
        value = choices[-1] if choices else changed(setting, before.get(setting.name, setting.default))
    shape = {name: before.pop(name) for name in list(before) if len(setting.path) > 1}
    if len(setting.path) > 1:
        base = {"n_kv_heads": 2, **shape}
        before["model"], after["model"] = base, {**base, setting.name: value}
    else:
        after = {setting.name: value}
    first, second = capture(stage, **before), capture(stage, **{**before, **after})
    assert first != second, f"{setting.key} = {value}: no effect"
    if setting.key not in ("device", "allow_dropped", "allow_truncated", "allow_code"):
        assert "refused" not in first and "refused" not in second, (first, second)


def stop(seen):
    raise Seen(seen)


def test_tf32_reaches_the_trainer_on_cuda_alone(sft_settings, monkeypatch):
    monkeypatch.setattr("llmlab.runs.arguments.checked_trainer_args", lambda config, settings: {})
    seen = []
    hardware = probe("cpu", "fp32")
    for device in ("cpu", "cuda"):
        build_arguments(
            lambda **values: seen.append(values["tf32"]), sft_settings(tf32=True), replace(hardware, device=device)
        )
    assert seen == [None, True]

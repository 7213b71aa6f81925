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
from llmlab.model import load_classifier, load_model
from llmlab.runs.arguments import build_arguments
from llmlab.runs.policy import choose_kernels
from llmlab.settings.base import Trl, When, fields_of
from llmlab.settings.errors import UserError
from llmlab.settings.optimizer import OptimizerSettings
from llmlab.settings.rewards import SIMULATOR, EnvironmentSettings
from llmlab.settings.training import HealthSettings
from llmlab.stages import STAGES

TRAINING = ["pretrain", "sft", "dpo", "orpo", "reward", "grpo", "ppo", "awr"]  # rs-sft has what awr has
NOT_HERE = ("tf32", "use_liger_kernel", "auto_batch", "report")  # the last tests; tests/runs/test_{auto_batch,page}.py
ELSEWHERE = {  # `test_grpo.py` shows what the trainer asks its settings for; PPO's dropout has one value
    "grpo": ("baseline_mode", "kl_penalty"),
    "ppo": ("lora_dropout",),
    # `offline/` shows what these do
    "awr": ("samples", "rescore", "use_vllm", *(setting.key for setting in fields_of(EnvironmentSettings))),
    "reward": ("gates", "gate_every", "metric_for_best_model"),  # tests/runs/test_gates.py
}
MAY_REFUSE = ("device", "allow_dropped", "allow_truncated", "allow_code")  # a refusal is their effect
DATA = {
    "pretrain": "text",
    "sft": "chat",
    "dpo": "pairs",
    "orpo": "pairs",
    "reward": "pairs",
    "grpo": "chat",
    "ppo": "chat",
    "awr": "chat",
}


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
    for numbers in trainer.usual.values():  # of steps before, beside which the next one may be a spike
        numbers.extend([1.0, 2.0] * 50)
    model, reference = trainer.model, getattr(trainer, "ref_model", None)
    dated = ("logging_dir", "run_name")
    arguments = {name: value for name, value in trainer.args.to_dict().items() if name not in dated}
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
        "attention": model.config._attn_implementation,
        "optimizer": type(optimizer).__name__,
        "spikes": trainer.highest(),
        "groups": [{name: plain(v) for name, v in g.items() if name != "params"} for g in optimizer.param_groups],
        "rates": [trainer.create_scheduler(90, optimizer).lr_lambdas[0](step) for step in range(91)],
        "callbacks": [plain(callback) for callback in trainer.callback_handler.callbacks],
        "rewards": [plain(reward) for reward in getattr(trainer, "reward_funcs", [])],
        "episodes": str(getattr(trainer, "play_options", None)),
        "curriculum": plain(getattr(trainer, "curriculum", None)),
        "environments": [str(make().reward_config) for make in getattr(trainer, "factories", {}).values()],
        "streamed": [plain(reader) for reader in getattr(trainer.train_dataset, "readers", [])],
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where all runs are, so that they can be compared."""
    return tmp_path_factory.mktemp("every")


@pytest.fixture
def capture(tiny_settings, place, monkeypatch):
    """Returns a function that runs a stage as far as its trainer, and says what that was given."""
    monkeypatch.setattr("llmlab.hardware._supports_bf16", lambda device: (True, "for this test"))
    monkeypatch.setattr("llmlab.runs.policy.missing_tool", lambda device_type: None)
    monkeypatch.setattr(Trainer, "train", lambda self, *args, **kwargs: stop(self))

    def run(stage, **changes):
        settings = tiny_settings(stage, **{"output_dir": place / "run", **changes})
        try:
            STAGES[stage].function(settings, console=Console(quiet=True))
        except Seen as seen:
            trainer = seen.args[0]
            built = handed_over(trainer) if isinstance(trainer, Trainer) else trainer
            return {**built, "folders": sorted(path.name for path in place.iterdir())}
        except UserError as error:
            return {"refused": str(error)}
        finally:
            for path in place.iterdir():
                shutil.rmtree(path)

    return run


@pytest.fixture(scope="module")
def unchanged():
    """What `capture` said of settings that many tests compare with."""
    return {}


def stop(seen):
    raise Seen(seen)


def own(stage):
    return fields_of(STAGES[stage].settings_class)


def conditions(setting):
    marks = (mark for mark in setting.info.metadata if isinstance(mark, When))
    return {mark.field: mark.values[-1] if mark.values else SIMULATOR for mark in marks}


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
    "awr": {"batch_size": 3, "gradient_accumulation_steps": 3},
}
ONE_BY_ONE = (
    "use_liger_kernel",
    "num_train_epochs",
    "save_total_limit",
    "use_vllm",
    "vllm_mode",
    "report_to",
)  # one by one, below


def named(stage):
    return [s for s in own(stage) if s.marker(Trl) is not None and s.marker(Trl).name not in ONE_BY_ONE]


def changed(setting, before):
    if isinstance(before, bool):
        return not before
    if isinstance(before, int):
        return before + 1
    return before * 0.7 + 0.011


@pytest.mark.parametrize("stage", TRAINING)
def test_arguments_of_the_trainer(stage, capture, tiny_settings, place):
    before = tiny_settings(stage, place / "run")
    values = {"output_dir": str(place / "other")}
    values |= {s.name: changed(s, s.of(before)) for s in named(stage) if s.name not in ("output_dir", *SIZES[stage])}
    values |= SIZES[stage]
    arguments = capture(stage, **values)["arguments"]
    for setting in named(stage):
        assert values[setting.name] != setting.of(before), setting.key
        assert arguments[setting.marker(Trl).name] == str(values[setting.name]), setting.key


# Those of the optimizers: all of one at once ----------------------------------------------------------------------

OF_OPTIMIZERS = {s.name: conditions(s) for s in fields_of(OptimizerSettings) if "optimizer" in conditions(s)}


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sophia", "muon"])
@pytest.mark.parametrize("stage", TRAINING)
def test_settings_of_the_optimizer(stage, optimizer, capture):
    names = [s for s in own(stage) if s.name in OF_OPTIMIZERS and optimizer in s.marker(When).values]
    assert names
    values = {s.name: changed(s, s.default) for s in names}
    built = capture(stage, optimizer=optimizer, **values)
    found = json.dumps(built["groups"])
    for name, value in values.items():
        assert (str(value) if not isinstance(value, bool) else json.dumps(value)) in found, (name, found)


# All others, one by one ----------------------------------------------------------------------------------------------


def single(stage):
    done = {s.key for s in named(stage)} | OF_OPTIMIZERS.keys() | {*NOT_HERE, *ELSEWHERE.get(stage, ())}
    if stage not in ("pretrain", "reward"):  # the head of the others' model is tied; tests/optim/test_groups.py
        done.add("head_lr")
    if stage != "sft":  # the same callback everywhere
        done |= {setting.key for setting in fields_of(HealthSettings)}
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
    (folder / "held-out.jsonl").write_text(json.dumps({"prompt": "How loudly: the cow?"}) + "\n")
    rows = [{"messages": turns, "k": k} for k in range(60)]
    (folder / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{**row, "label": row["k"] % 3 == 0} for row in rows]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = {"question": "Why? " * 15, "answer": ""}
    (folder / "uneven.jsonl").write_text(json.dumps(long) + "\n" + chat_file.read_text())
    useless = {
        "text": {"text": ""},
        "chat": {"question": "", "answer": ""},
        "pairs": {"prompt": "", "chosen": "", "rejected": ""},
    }
    endless = {
        "chat": {"question": "Why? " * 90, "answer": "Moo."},
        "pairs": {"prompt": "Why? " * 90, "chosen": "Moo.", "rejected": "Mu."},
    }
    for name, file in {"text": corpus_file, "chat": chat_file, "pairs": pairs_file}.items():
        for fault, rows in (("empty", useless), ("long", endless)):
            if name in rows:
                (folder / f"{fault}-{name}.jsonl").write_text(file.read_text() + (json.dumps(rows[name]) + "\n") * 60)
    load_classifier(base_folder).save_pretrained(folder / "scorer")
    for path in base_folder.glob("token*"):
        shutil.copy(path, folder / "scorer")
    return folder


def other_values(stage, others, wide_base_folder, base_folder, place):
    """Values that no tiny run has, by key; other settings get the next number, choice or truth."""
    data = [str(others / f"{DATA[stage]}.jsonl")]
    online = stage in ("grpo", "ppo", "awr")
    return {
        "datasets": data,
        "validation_datasets": data,
        "validation_fraction": 0.5,
        "cache_dir": str(place / "other-cache"),
        "num_proc": 2,
        "max_samples": 11,
        "allow_dropped": 0.9,
        "allow_truncated": 0.9,
        "trainer_args": {"torch_empty_cache_steps": 7},
        "report_to": ["tensorboard"],
        "gates": [gate("distinct_n", others)],
        "gate_every": 10,
        "metric_for_best_model": "gate json_valid",
        "policy_checkpoint": str(others / "base"),
        "reference_checkpoint": str(wide_base_folder),
        "init_from": str(base_folder),
        "chat_template": str(others / "template.jinja"),
        "optimizer": "lion",
        "scheduler": "linear",
        "embedding_lr": 0.03,
        "head_lr": 0.02,
        "dtype": "bf16",
        "skip_spikes": 6.0,
        "attn_implementation": "eager",
        "device": "cuda",
        "compile": True,
        "epochs": 2.0,
        "eval_batches": 1,
        "eval_steps": 1,
        "lora_preset": "all",
        "lora_alpha": 7.0,
        "lora_target_modules": ["k_proj"],
        "modules_to_save": ["norm"],
        "loss_on": "completion",
        "only_label": False,
        "max_prompt_length": 60 if online else 12,
        "max_seq_len": 68 if online else 60,
        "batch_size": 16,
        "gradient_accumulation_steps": 6,
        "rewards": ["length"],
        "reward_model": str(others / "scorer"),
        "value_checkpoint": str(others / "scorer"),
        "allow_code": False,
        "num_episodes": 640,
        "max_prompts": 5,
        "top_k": 9,
        "sampling_batch_size": 4,
        "log_interval": 64,
        "save_interval": 64,
        "eval_interval": 64,
        "stop_patience": 3,
        "environment": SIMULATOR,
        "use_vllm": True,
        "model.tokenizer_name": str(others / "base"),
        "model.d_model": 64,
        "model.n_heads": 4,
        "model.n_kv_heads": 1,
        "model.max_seq_len": 16,
        "model.vocab_size": 512,
        "model.sliding_window": 4,
        "model.yarn_original_max_seq_len": 12,
    }


def gate(name, others):
    """A gate on data that no run here trains on."""
    return {"name": name, "prompts": {"name": str(others / "held-out.jsonl"), "column": "prompt"}, "n": 3}


def start_for(stage, key, others, place):
    """What a run needs beside the tiny settings for one of them to mean something."""
    uneven = {"datasets": [str(others / "uneven.jsonl")]} if stage in ("grpo", "ppo", "awr") else {}
    gates = {"gates": [gate("json_valid", others)], "gate_every": 5}
    long = {"max_seq_len": 40} if stage == "sft" else {"max_length": 40, "max_prompt_length": 39}
    scale = {"normalize_advantage": False} if stage == "awr" else {}
    return {
        **dict.fromkeys(("gates", "gate_every", "metric_for_best_model"), gates),
        "only_label": {"datasets": [str(others / "labelled.jsonl")], "only_label": True},
        "loss_on": {"datasets": [str(others / "turns.jsonl")]},
        "lora_target_modules": {"use_lora": True, "lora_target_modules": ["q_proj"]},
        "allow_dropped": {"datasets": [str(others / f"empty-{DATA[stage]}.jsonl")]},
        "allow_truncated": {"datasets": [str(others / f"long-{DATA[stage]}.jsonl")], **long},
        "compile": {"compile": False},
        "head_lr": {"model": {"tie_word_embeddings": False}} if stage == "pretrain" else {},  # else a score
        "max_prompt_length": uneven,
        "max_seq_len": uneven,
        "gradient_accumulation_steps": {"batch_size": ...},
        "log_interval": {"log_every": ...},
        "eval_interval": {"eval_every": ...},
        "reward_model": {"rewards": ["length"]},
        "normalize_rewards": {"rewards": [{"name": "length", "weight": 0.5}], **scale},
        "num_proc": {"cache_dir": str(place / "cache")},
    }.get(key, {})


@pytest.mark.parametrize(
    ("stage", "setting"),
    [pytest.param(stage, setting, id=f"{stage}-{setting.key}") for stage in TRAINING for setting in single(stage)],
)
def test_each_other_setting_has_an_effect(
    stage, setting, capture, unchanged, others, base_folder, wide_base_folder, place, monkeypatch
):
    key = setting.key
    if key == "num_proc":
        count_processes(monkeypatch)
    elif key in ("use_vllm", "vllm_mode"):
        pretend_vllm(monkeypatch)
    before = {**conditions(setting), **start_for(stage, key, others, place)}
    if stage in ("grpo", "ppo", "awr"):
        before = {"validation_fraction": 0.1, **before}
    values = other_values(stage, others, wide_base_folder, base_folder, place)
    if key in values:
        value = values[key]
    else:
        now = before.get(setting.name, setting.default)
        choices = [choice for choice in setting.choices if choice != now]
        value = choices[-1] if choices else changed(setting, now)
    if setting.path[0] == "reward_config":
        before |= {"environment": SIMULATOR}
        after = {**before, "reward_config": {setting.name: value}}
    elif setting.path[0] == "health":
        after = {**before, "health": {setting.name: value}}
    elif len(setting.path) > 1:
        shape = {"n_kv_heads": 2, **before}
        before, after = {"model": shape}, {"model": {**shape, setting.name: value}}
    else:
        after = {**before, setting.name: value}
    if str((stage, before)) not in unchanged or key in ("num_proc", "use_vllm", "vllm_mode"):
        unchanged[str((stage, before))] = capture(stage, **before)
    first, second = unchanged[str((stage, before))], capture(stage, **after)
    assert first != second, f"{key} = {value}: no effect"
    if key not in MAY_REFUSE:
        assert "refused" not in first and "refused" not in second, (first.get("refused"), second.get("refused"))


def count_processes(monkeypatch):
    """Ends a run where it would start processes, and says how many."""
    monkeypatch.setattr("llmlab.data.workers.SERIAL_BATCHES", 0)
    monkeypatch.setattr(ProcessPoolExecutor, "__init__", lambda self, number, *rest: stop({"workers": number}))


def pretend_vllm(monkeypatch):
    """Lets vLLM seem to be installed, and ends a run where TRL's trainer would start it."""
    vllm = ModuleType("vllm")
    vllm.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(GRPOTrainer, "__init__", lambda self, *, args, **kwargs: stop({"arguments": args.to_dict()}))


def test_tf32_reaches_the_trainer_on_cuda_alone(sft_settings, monkeypatch):
    monkeypatch.setattr("llmlab.runs.arguments.checked_trainer_args", lambda config, settings: {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    seen = []
    hardware, settings = probe("cpu", "fp32"), sft_settings(tf32=True, use_liger_kernel=True)
    for device in ("cpu", "cuda"):
        build_arguments(
            lambda **values: seen.append((values["tf32"], values["use_liger_kernel"])),
            settings,
            replace(hardware, device=device),
        )
    assert seen == [(None, True), (True, True)]


def test_kernels_that_an_architecture_does_not_have(sft_settings, base_folder, monkeypatch):
    package = ModuleType("liger_kernel.transformers.monkey_patch")
    package.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    monkeypatch.setitem(sys.modules, package.__name__, package)
    model = load_model(base_folder)
    with pytest.raises(UserError, match="liger-kernel has no layers for model_type = llmlab"):
        choose_kernels(model, sft_settings(use_liger_kernel=True), True)
    choose_kernels(model, sft_settings(attn_implementation="eager"), True)
    assert model.config._attn_implementation == "eager"
    model.config.positional_encoding = "alibi"
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(UserError, match="attn_implementation = flash_attention_2: not supported by this model"):
        choose_kernels(model, sft_settings(attn_implementation="flash_attention_2"), True)

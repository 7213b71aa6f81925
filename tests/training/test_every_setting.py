"""An option that is accepted has an effect: each setting is flipped, and something that is built must differ."""

import hashlib
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, GRPOConfig, RewardConfig
from trl.experimental.orpo import ORPOConfig

from llmlab.data import build_corpus, load_tokenizer
from llmlab.data.chat import rows as rows_module
from llmlab.data.chat.makers import InstructionMaker
from llmlab.data.mixture import Mixture
from llmlab.data.text import corpus as corpus_module
from llmlab.hardware import probe
from llmlab.model import build_config, new_model
from llmlab.optim.build import build_optimizer
from llmlab.runs.arguments import build_arguments
from llmlab.runs.callbacks import Rhythm, WholeCheckpoints
from llmlab.runs.compile import decide_compile
from llmlab.runs.policy import load_policy
from llmlab.settings.base import Setting, When, fields_of
from llmlab.settings.dpo import DPOSettings
from llmlab.settings.grpo import GRPOSettings
from llmlab.settings.orpo import ORPOSettings
from llmlab.settings.preference import PreferenceSettings
from llmlab.settings.pretrain import PretrainSettings
from llmlab.settings.reward import RewardModelSettings
from llmlab.settings.sft import SFTSettings
from llmlab.settings.sources import Resolved
from llmlab.training import pretrain as stage
from llmlab.training import sft as sft_stage
from llmlab.training.online.run import make_reward, online_arguments, read_prompts
from llmlab.training.preference.dpo import load_reference
from llmlab.training.preference.reward import load_scorer
from llmlab.training.preference.run import preference_arguments, read_pairs


def other_value(setting: Setting, folder, corpus_file, **special):
    """Returns a valid value that is not the one in use."""
    special = {
        "datasets": [{"name": str(corpus_file), "weight": 1.0}, {"name": "demo/stories", "weight": 3.0}],
        "validation_datasets": [{"name": str(corpus_file)}],
        "output_dir": str(folder / "elsewhere"),
        "cache_dir": str(folder / "other-cache"),
        "num_proc": 2,
        "trainer_args": {"torch_empty_cache_steps": 7},
        "model.tokenizer_name": str(folder / "copy"),
        "model.n_heads": 4,
        "model.n_kv_heads": 1,
        "model.d_model": 64,
        "model.max_seq_len": 16,
        "model.vocab_size": 512,
        "model.sliding_window": 4,
        "model.yarn_original_max_seq_len": 12,
        "compile": False,
        "allow_dropped": 0.5,
        "dtype": "bf16",
        "tf32": True,
        "lora_alpha": 7.0,
        "max_samples": 11,
        **special,
    }
    if setting.key in special:
        return special[setting.key]
    choices = [choice for choice in setting.choices if choice not in ("auto", setting.default)]
    if choices:
        return choices[-1]
    if isinstance(setting.default, bool):
        return not setting.default
    if isinstance(setting.default, int):
        return setting.default + 1
    return setting.default * 0.7 + 0.011


def digest(settings: PretrainSettings, monkeypatch) -> dict[str, str]:
    """Builds everything that these settings decide, and returns it in comparable form."""
    opened = []
    original = corpus_module.open_store

    def watch(*args, **kwargs):
        opened.append({key: value for key, value in kwargs.items() if key != "progress"})
        return original(*args, **kwargs)

    monkeypatch.setattr(corpus_module, "open_store", watch)
    tokenizer = load_tokenizer(settings.model.tokenizer_name)
    settings = stage.complete_shape(settings, tokenizer)
    torch.manual_seed(settings.seed)
    model = new_model(build_config(settings.model, tokenizer))
    hardware = probe("cpu", settings.dtype)
    corpus = build_corpus(
        settings,
        tokenizer,
        max_seq_len=settings.model.max_seq_len,
        rows_needed=64,
        validation_rows=settings.eval_steps,
    )
    rows = [row["input_ids"].tolist() for _, row in zip(range(24), iter_rows(corpus.train), strict=False)]
    held = [] if corpus.validation is None else [corpus.validation[i]["input_ids"].tolist() for i in range(4)]
    optimizer = build_optimizer(model, settings, learning_rate=settings.lr, weight_decay=settings.weight_decay)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    arguments = stage.trainer_arguments(settings, hardware, corpus).to_dict()
    rhythm = Rhythm(best_only=settings.save_best_only, evaluates=corpus.validation is not None)
    kept = WholeCheckpoints(None, settings.save_total_limit)
    compiled = decide_compile(
        settings.compile, device_type="cpu", steps=settings.max_steps, tokens_per_step=10**6, parameters=10**8
    )
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    return {
        "config": str(model.config.to_dict()),
        "weights": weights,
        "train": str(rows),
        "validation": str((held, corpus.report.validation_rows)),
        "stores": str(opened),
        "stream": str((type(corpus.train), [r.allow_dropped for r in getattr(corpus.train, "readers", [])])),
        "optimizer": str((type(optimizer), groups)),
        "arguments": str({key: value for key, value in arguments.items() if key != "logging_dir"}),
        "rhythm": str((vars(rhythm), vars(kept))),
        "compile": str(compiled),
        "tokenizer": tokenizer.name_or_path,
    }


def iter_rows(train):
    if isinstance(train, Mixture):
        return (train[index] for index in range(len(train)))
    return iter(train)


# device and init_from choose what is built at all, and have tests of their own in test_hardware and test_pretrain
@pytest.mark.parametrize(
    "setting",
    [s for s in fields_of(PretrainSettings) if s.key not in ("device", "init_from", "tf32", "save_total_limit")],
    ids=lambda setting: setting.key,
)
def test_each_pretraining_setting_has_an_effect(
    setting, settings, corpus_file, tokenizer_folder, tmp_path, monkeypatch
):
    shutil.copytree(tokenizer_folder, tmp_path / "copy")
    monkeypatch.setattr("llmlab.runs.compile.missing_tool", lambda device_type: None)
    monkeypatch.setattr("llmlab.hardware._supports_bf16", lambda device: (True, "for this test"))
    changes = {"compile": "auto", "dtype": "fp32"}
    model = {"n_kv_heads": 2, "n_heads": 2}
    conditions = {mark.field: mark.values[-1] for mark in setting.info.metadata if isinstance(mark, When)}
    for field, value in conditions.items():
        (model if len(setting.path) > 1 else changes)[field] = value
    before = digest(settings(**changes, model=model), monkeypatch)
    value = other_value(setting, tmp_path, corpus_file)
    if len(setting.path) > 1:
        after = settings(**changes, model={**model, setting.name: value})
    else:
        after = settings(**{**changes, setting.name: value}, model=model)
    after = digest(after, monkeypatch)
    differing = [name for name in before if before[name] != after[name]]
    assert differing, f"{setting.key} = {value} changes nothing that is built"


def digest_sft(settings: SFTSettings, monkeypatch) -> dict[str, str]:
    """The same for fine-tuning: the policy, its rows and its trainer."""
    folders = []
    original = rows_module.cache_folder
    monkeypatch.setattr(rows_module, "cache_folder", lambda folder: folders.append(folder) or original(folder))
    workers = []
    render = Dataset.map
    monkeypatch.setattr(
        Dataset, "map", lambda self, *a, num_proc=None, **k: workers.append(num_proc) or render(self, *a, **k)
    )
    monkeypatch.setattr(rows_module, "WORTH_PROCESSES", 1)
    torch.manual_seed(settings.seed)
    hardware = probe("cpu", settings.dtype)
    policy = load_policy(settings.policy_checkpoint, settings, hardware, chat_template=settings.chat_template)
    maker = InstructionMaker(
        policy.tokenizer,
        max_seq_len=settings.max_seq_len,
        loss_on=settings.loss_on,
        only_label=settings.only_label,
    )
    wanted = settings.eval_steps * settings.batch_size
    data = rows_module.build_rows(settings, maker, seed=settings.seed, validation_rows=wanted)
    monkeypatch.undo()
    optimizer = build_optimizer(policy.model, settings, learning_rate=1.0, weight_decay=settings.weight_decay)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    arguments = sft_stage.trainer_arguments(settings, hardware, evaluates=True).to_dict()
    adapters = [str(c.to_dict()) for c in getattr(policy.model, "peft_config", {}).values()]
    named = [(name, str(p.dtype), tuple(p.shape), p.requires_grad) for name, p in policy.model.named_parameters()]
    return {
        "weights": hashlib.sha256(b"".join(str(p.detach()).encode() for p in policy.model.parameters())).hexdigest(),
        "names": str(named),
        "adapters": str(adapters),
        "template": policy.tokenizer.chat_template,
        "train": str(data.train[:]),
        "validation": str(None if data.validation is None else data.validation[:]),
        "cache": str(folders),
        "workers": str(workers),
        "optimizer": str((type(optimizer), groups)),
        "arguments": str({key: value for key, value in arguments.items() if key != "logging_dir"}),
        "rhythm": str(vars(Rhythm(best_only=settings.save_best_only, evaluates=True, save_every=settings.save_every))),
        "kept": str(vars(WholeCheckpoints(None, settings.save_total_limit))),
    }


# these are read in `sft` itself or only decide whether it refuses: test_sft, test_instructions and test_resume show it
OF_SFT_ITSELF = ("device", "compile", "allow_dropped", "allow_truncated", "tf32", "save_total_limit")


@pytest.mark.parametrize(
    "setting", [s for s in fields_of(SFTSettings) if s.key not in OF_SFT_ITSELF], ids=lambda setting: setting.key
)
def test_each_fine_tuning_setting_has_an_effect(
    setting, sft_settings, chat_file, base_folder, wide_base_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("llmlab.hardware._supports_bf16", lambda device: (True, "for this test"))
    template = tmp_path / "other.jinja"
    template.write_text((base_folder / "chat_template.jinja").read_text().replace("\n", " "))
    (tmp_path / "more.jsonl").write_text(chat_file.read_text().replace("The", "That"))
    turns = [{"role": role, "content": "Moo."} for role in ("user", "assistant", "user", "assistant")]
    both = tmp_path / "both.jsonl"
    labels = [{"label": k % 3 == 0} if setting.key == "only_label" else {} for k in range(60)]
    both.write_text("".join(json.dumps({"messages": turns, "k": k, **labels[k]}) + "\n" for k in range(60)))
    changes = {"save_every": {"save_best_only": False}, "only_label": {"only_label": False}}.get(setting.key, {})
    conditions = {mark.field: mark.values[-1] for mark in setting.info.metadata if isinstance(mark, When)}
    if setting.key == "lora_target_modules":
        conditions = {"use_lora": True, "lora_preset": "custom"}
        changes = {"lora_target_modules": ["q_proj"]}
    before = sft_settings(datasets=[{"name": str(both)}], **{**conditions, **changes})
    value = other_value(
        setting,
        tmp_path,
        chat_file,
        datasets=[{"name": str(chat_file)}],
        validation_datasets=[{"name": str(tmp_path / "more.jsonl")}],
        policy_checkpoint=str(wide_base_folder),
        lora_preset="all",
        lora_target_modules=["k_proj"],
        modules_to_save=["norm"],
        lora_bias="all",
        chat_template=str(template),
        max_seq_len=40,
        loss_on="completion",
        only_label=True,
        epochs=2.0,
        validation_fraction=0.5,
        eval_steps=1,
        num_proc=2,
        dataloader_num_workers=1,
    )
    given = {name: getattr(before, name) for name in before.model_fields_set}
    if setting.key == "epochs":
        del given["max_steps"]
    first = digest_sft(SFTSettings(**given | fresh(tmp_path, 1, setting)), pytest.MonkeyPatch())
    given |= fresh(tmp_path, 2, setting)
    second = digest_sft(SFTSettings(**{**given, setting.name: value}), pytest.MonkeyPatch())
    check_differs(first, second, setting, value)


def fresh(folder, number, setting) -> dict[str, str]:
    """A cache of its own where rendering itself is watched, and not what it leaves."""
    return {"cache_dir": str(folder / f"cache-{number}")} if setting.key == "num_proc" else {}


def check_differs(first, second, setting, value):
    differing = {name for name in first if first[name] != second[name]}
    assert differing & {"workers"} if setting.key == "num_proc" else differing, f"{setting.key} = {value}: no effect"


def digest_preference(settings, monkeypatch) -> dict[str, str]:
    """The same for the stages that learn from pairs."""
    folders, workers = [], []
    original, render = rows_module.cache_folder, Dataset.map
    monkeypatch.setattr(rows_module, "cache_folder", lambda folder: folders.append(folder) or original(folder))
    monkeypatch.setattr(
        Dataset, "map", lambda self, *a, num_proc=None, **k: workers.append(num_proc) or render(self, *a, **k)
    )
    monkeypatch.setattr(rows_module, "WORTH_PROCESSES", 1)
    torch.manual_seed(settings.seed)
    hardware = probe("cpu", settings.dtype)
    run = SimpleNamespace(
        settings=settings,
        hardware=hardware,
        process=SimpleNamespace(num_processes=1, main_process_first=nullcontext),
        reading=nullcontext,
        extent=lambda rows_per_step: {},
    )
    if isinstance(settings, RewardModelSettings):
        policy, config = load_scorer(settings, run), RewardConfig
    else:
        policy = load_policy(settings.policy_checkpoint, settings, hardware, chat_template=settings.chat_template)
        config = DPOConfig if isinstance(settings, DPOSettings) else ORPOConfig
    data = read_pairs(run, policy, max_prompt_length=settings.max_prompt_length)
    reference = load_reference(settings, policy)[1] if isinstance(settings, DPOSettings) else None
    monkeypatch.undo()
    optimizer = build_optimizer(policy.model, settings, learning_rate=1.0, weight_decay=settings.weight_decay)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    arguments = preference_arguments(config, settings, hardware, evaluates=True, processes=1).to_dict()
    named = [(name, str(p.dtype), tuple(p.shape), p.requires_grad) for name, p in policy.model.named_parameters()]
    return {
        "weights": hashlib.sha256(b"".join(str(p.detach()).encode() for p in policy.model.parameters())).hexdigest(),
        "names": str(named),
        "adapters": str([str(c.to_dict()) for c in getattr(policy.model, "peft_config", {}).values()]),
        "template": policy.tokenizer.chat_template,
        "reference": str(reference),
        "train": str(data.train[:]),
        "validation": str(None if data.validation is None else data.validation[:]),
        "cache": str(folders),
        "workers": str(workers),
        "optimizer": str((type(optimizer), groups)),
        "arguments": str({key: value for key, value in arguments.items() if key != "logging_dir"}),
        "rhythm": str(vars(Rhythm(best_only=settings.save_best_only, evaluates=True, save_every=settings.save_every))),
        "kept": str(vars(WholeCheckpoints(None, settings.save_total_limit))),
    }


PREFERENCE = [
    pytest.param(kind, setting, id=f"{kind.__name__}-{setting.key}")
    for kind in (DPOSettings, ORPOSettings, RewardModelSettings)
    for setting in fields_of(kind)
    # what the stages share is shown once
    if setting.key not in OF_SFT_ITSELF and (kind is DPOSettings or setting.owner is not PreferenceSettings)
    if kind is DPOSettings or setting.key in ("beta", "batch_size", "mini_batch_size", "epochs", "max_steps")
]


@pytest.mark.parametrize(("kind", "setting"), PREFERENCE)
def test_each_preference_setting_has_an_effect(
    kind, setting, preference_settings, pairs_file, base_folder, wide_base_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("llmlab.hardware._supports_bf16", lambda device: (True, "for this test"))
    template = tmp_path / "other.jinja"
    template.write_text((base_folder / "chat_template.jinja").read_text().replace("\n", " "))
    more = tmp_path / "more.jsonl"
    more.write_text(pairs_file.read_text().replace("The", "That"))
    conditions = {mark.field: mark.values[-1] for mark in setting.info.metadata if isinstance(mark, When)}
    changes = {}
    if setting.key == "lora_target_modules":
        conditions, changes = {"use_lora": True, "lora_preset": "custom"}, {"lora_target_modules": ["q_proj"]}
    before = preference_settings(kind, **conditions, **changes)
    value = other_value(
        setting,
        tmp_path,
        pairs_file,
        datasets=[{"name": str(more)}],
        validation_datasets=[{"name": str(more)}],
        policy_checkpoint=str(wide_base_folder),
        reference_checkpoint=str(wide_base_folder),
        lora_preset="all",
        lora_target_modules=["k_proj"],
        modules_to_save=["norm"],
        lora_bias="all",
        chat_template=str(template),
        batch_size=16,
        mini_batch_size=8,
        gradient_accumulation_steps=6,
        max_length=70,
        max_prompt_length=20,
        max_samples=11,
        epochs=2.0,
        validation_fraction=0.5,
        eval_batches=1,
        num_proc=2,
        dataloader_num_workers=1,
        label_smoothing=0.2,
    )
    given = {name: getattr(before, name) for name in before.model_fields_set}
    for name in {"epochs": ["max_steps"], "gradient_accumulation_steps": ["batch_size"]}.get(setting.key, []):
        del given[name]
    first = digest_preference(kind(**given | fresh(tmp_path, 1, setting)), pytest.MonkeyPatch())
    given |= fresh(tmp_path, 2, setting)
    second = digest_preference(kind(**{**given, setting.name: value}), pytest.MonkeyPatch())
    check_differs(first, second, setting, value)


# test_grpo shows their effects: they are read by the trainer and its callbacks, or only let a run start
OF_GRPO_ITSELF = (
    *("baseline_mode", "kl_penalty", "adaptive_kl", "target_kl", "kl_horizon", "stop_patience", "allow_code"),
)


def digest_online(settings, monkeypatch) -> dict[str, str]:
    """The same for the stages that learn from their own completions."""
    folders, workers = [], []
    original, render = rows_module.cache_folder, Dataset.map
    monkeypatch.setattr(rows_module, "cache_folder", lambda folder: folders.append(folder) or original(folder))
    monkeypatch.setattr(
        Dataset, "map", lambda self, *a, num_proc=None, **k: workers.append(num_proc) or render(self, *a, **k)
    )
    monkeypatch.setattr(rows_module, "WORTH_PROCESSES", 1)
    torch.manual_seed(settings.seed)
    settings = settings.in_steps(1)
    hardware = probe("cpu", settings.dtype)
    run = SimpleNamespace(
        settings=settings,
        hardware=hardware,
        process=SimpleNamespace(num_processes=1, main_process_first=nullcontext),
        reading=nullcontext,
        extent=lambda rows_per_step: {},
        resolved=Resolved(settings, {}),
    )
    policy = load_policy(settings.policy_checkpoint, settings, hardware, chat_template=settings.chat_template)
    reference = load_reference(settings, policy)[1]
    data = read_prompts(run, policy)
    reward = make_reward(run)
    monkeypatch.undo()
    optimizer = build_optimizer(policy.model, settings, learning_rate=1.0, weight_decay=settings.weight_decay)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    arguments = online_arguments(GRPOConfig, settings, hardware, evaluates=True, processes=1).to_dict()
    named = [(name, str(p.dtype), tuple(p.shape), p.requires_grad) for name, p in policy.model.named_parameters()]
    return {
        "weights": hashlib.sha256(b"".join(str(p.detach()).encode() for p in policy.model.parameters())).hexdigest(),
        "names": str(named),
        "adapters": str([str(c.to_dict()) for c in getattr(policy.model, "peft_config", {}).values()]),
        "template": policy.tokenizer.chat_template,
        "reference": str(reference),
        "train": str(data.train[:]),
        "validation": str(None if data.validation is None else data.validation[:]),
        "tokens": str([report.counts for report in data.reports]),
        "rewards": str([(name, part.weight) for name, part in reward.components.items()] + [reward.normalize]),
        "cache": str(folders),
        "workers": str(workers),
        "optimizer": str((type(optimizer), groups)),
        "arguments": str({key: value for key, value in arguments.items() if key != "logging_dir"}),
        "rhythm": str(vars(Rhythm(best_only=settings.save_best_only, evaluates=True, save_every=settings.save_every))),
        "kept": str(vars(WholeCheckpoints(None, settings.save_total_limit))),
    }


@pytest.mark.parametrize(
    "setting",
    [s for s in fields_of(GRPOSettings) if s.key not in (*OF_SFT_ITSELF, *OF_GRPO_ITSELF)],
    ids=lambda setting: setting.key,
)
def test_each_grpo_setting_has_an_effect(
    setting, chat_file, base_folder, wide_base_folder, tmp_path, monkeypatch, request
):
    monkeypatch.setattr("llmlab.hardware._supports_bf16", lambda device: (True, "for this test"))
    if setting.key == "reward_model":  # made where it is needed: a folder that is one
        from llmlab.model import load_classifier

        load_classifier(base_folder).save_pretrained(tmp_path / "scorer")
        request.getfixturevalue("tokenizer_folder")
        for path in request.getfixturevalue("tokenizer_folder").iterdir():
            (tmp_path / "scorer" / path.name).write_bytes(path.read_bytes())
    template = tmp_path / "other.jinja"
    template.write_text((base_folder / "chat_template.jinja").read_text().replace("\n", " "))
    more = tmp_path / "more.jsonl"
    more.write_text(chat_file.read_text().replace("How", "Why"))
    uneven = tmp_path / "uneven.jsonl"
    uneven.write_text(chat_file.read_text() + '{"question": "' + "Why? " * 30 + '", "answer": ""}\n')
    conditions = {mark.field: mark.values[-1] for mark in setting.info.metadata if isinstance(mark, When)}
    if setting.key == "lora_target_modules":
        conditions = {"use_lora": True, "lora_preset": "custom", "lora_target_modules": ["q_proj"]}
    given = {
        "policy_checkpoint": str(base_folder),
        "datasets": [{"name": str(uneven)}],
        "output_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path.parent / "cache"),
        "num_proc": 1,
        "validation_fraction": 0.1,
        "rewards": ["json_valid"],
        "batch_size": 8,
        "mini_batch_size": 8,
        "eval_batches": 2,
        "dtype": "fp32",
        **conditions,
    }
    value = other_value(
        setting,
        tmp_path,
        chat_file,
        datasets=[{"name": str(more)}],
        validation_datasets=[{"name": str(more)}],
        policy_checkpoint=str(wide_base_folder),
        reference_checkpoint=str(wide_base_folder),
        lora_preset="all",
        lora_target_modules=["k_proj"],
        modules_to_save=["norm"],
        lora_bias="all",
        chat_template=str(template),
        rewards=["length"],
        reward_model=str(tmp_path / "scorer"),
        batch_size=16,
        mini_batch_size=16,
        gradient_accumulation_steps=2,
        max_prompt_length=100,
        max_samples=11,
        num_episodes=640,
        epochs=2.0,
        max_seq_len=228,
        log_interval=64,
        save_interval=64,
        eval_interval=64,
        validation_fraction=0.5,
        eval_batches=1,
        num_proc=2,
        dataloader_num_workers=1,
        group_size=8,
        top_p=0.5,
    )
    first = digest_online(GRPOSettings(**given | fresh(tmp_path, 1, setting)), pytest.MonkeyPatch())
    given |= fresh(tmp_path, 2, setting)
    second = digest_online(GRPOSettings(**{**given, setting.name: value}), pytest.MonkeyPatch())
    check_differs(first, second, setting, value)


def test_tf32_reaches_the_trainer_on_cuda_alone(sft_settings, monkeypatch):
    monkeypatch.setattr("llmlab.runs.arguments.checked_trainer_args", lambda config, settings: {})
    seen = []
    hardware = probe("cpu", "fp32")
    for device in ("cpu", "cuda"):
        build_arguments(
            lambda **values: seen.append(values["tf32"]), sft_settings(tf32=True), replace(hardware, device=device)
        )
    assert seen == [None, True]

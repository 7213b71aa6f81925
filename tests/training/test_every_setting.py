"""An option that is accepted has an effect: each setting is flipped, and something that is built must differ."""

import hashlib
import shutil

import pytest
import torch

from llmlab.data import build_corpus, load_tokenizer
from llmlab.data import corpus as corpus_module
from llmlab.data.mixture import Mixture
from llmlab.hardware import probe
from llmlab.model import build_config, new_model
from llmlab.optim.build import build_optimizer
from llmlab.settings.base import Setting, When, fields_of
from llmlab.settings.pretrain import PretrainSettings
from llmlab.training import pretrain as stage
from llmlab.training.callbacks import Rhythm
from llmlab.training.compile import decide_compile

SETTINGS = fields_of(PretrainSettings)


def other_value(setting: Setting, folder, corpus_file):
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
        "rhythm": str(vars(rhythm)),
        "compile": str(compiled),
        "tokenizer": tokenizer.name_or_path,
    }


def iter_rows(train):
    if isinstance(train, Mixture):
        return (train[index] for index in range(len(train)))
    return iter(train)


# device and init_from choose what is built at all, and have tests of their own in test_hardware and test_pretrain
@pytest.mark.parametrize(
    "setting", [s for s in SETTINGS if s.key not in ("device", "init_from")], ids=lambda setting: setting.key
)
def test_each_setting_has_an_effect(setting, settings, corpus_file, tokenizer_folder, tmp_path, monkeypatch):
    shutil.copytree(tokenizer_folder, tmp_path / "copy")
    monkeypatch.setattr("llmlab.training.compile.missing_tool", lambda device_type: None)
    monkeypatch.setattr("llmlab.hardware._supports_bf16", lambda device, name: (True, "for this test"))
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

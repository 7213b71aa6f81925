"""One process that sees several GPUs uses one, and says so: Trainer alone would wrap the model in nn.DataParallel."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import Trainer, TrainingArguments

from llmlab.hardware import probe
from llmlab.runs import start
from llmlab.runs._trl import use_one_gpu
from llmlab.runs.run import Run
from llmlab.settings.sources import as_resolved


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_the_model_is_not_replicated(two_gpus, tmp_path, monkeypatch):
    monkeypatch.setattr(nn.DataParallel, "__init__", lambda *arguments: pytest.fail("replicated"))
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, report_to="none", bf16=False)
    assert arguments.n_gpu == 2 and arguments.train_batch_size == 8  # what Transformers makes of it
    use_one_gpu(arguments)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 4
    model = nn.Linear(2, 2)
    trainer = Trainer(model, arguments)
    assert trainer._wrap_model(trainer.model_wrapped, training=True) is model


def test_a_cpu_run_stays_without_gpus(two_gpus, tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", bf16=False)
    use_one_gpu(arguments)
    assert arguments.n_gpu == 0


@pytest.mark.parametrize(("variable", "said"), [(None, True), ("ACCELERATE_DYNAMO_MODE", False)])
def test_gpus_that_stay_idle_are_named(variable, said, two_gpus, settings, monkeypatch):
    if variable:
        monkeypatch.setenv(variable, "default")
    monkeypatch.setattr(start, "probe", lambda *choice: replace(probe("cpu", "fp32"), device="cuda"))
    console = Console(record=True, width=200, file=io.StringIO())
    begun = start.begin(
        Run,
        "pretrain",
        as_resolved(settings()),
        resume=None,
        load_optimizer=True,
        allow_changed_data=False,
        console=console,
    )
    with begun:
        text = console.export_text()
    assert ("2 GPUs are visible, and this run uses one of them: llmlab pretrain --accelerate ddp" in text) == said


def test_a_launch_on_the_cpu_trains_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert probe("auto", "fp32").device == "cpu"

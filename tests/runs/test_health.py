"""Faults are put into runs of the real stages: each is caught in time, and those that can be cured end as a clean run."""

import math

import pytest
import torch

from llmlab.runs.history import open_run
from llmlab.runs.optimizers import StageTrainer
from llmlab.runs.record import read_events, read_metrics, read_record
from llmlab.stages import STAGES


@pytest.fixture
def train(tiny_settings, tmp_path, quiet):
    def run(stage="pretrain", name="run", **changes):
        settings = tiny_settings(stage, tmp_path / name, **changes)
        return STAGES[stage].function(settings, console=quiet)

    return run


def change_loss(monkeypatch, change):
    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super(StageTrainer, self).compute_loss(model, inputs, *args, **kwargs)
        return change(self.state.global_step + 1, loss) if model.training else loss

    monkeypatch.setattr(StageTrainer, "compute_loss", compute_loss, raising=False)


def test_nan_batch(train, monkeypatch):
    clean = train(name="clean", max_steps=60, eval_every=10, save_best_only=False)
    change_loss(monkeypatch, lambda step, loss: loss * math.nan if step == 25 else loss)
    result = train(max_steps=60, eval_every=10, save_best_only=False, on_critical="rollback")
    print(read_events(result.folder), read_record(result.folder)["rollbacks"], read_record(result.folder)["settings"]["lr"])
    print([(l["step"], l.get("loss"), l.get("learning_rate")) for l in read_metrics(result.folder)])
    print(clean.metrics, result.metrics)
    assert 0

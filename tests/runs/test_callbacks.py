"""Callbacks that every stage shares, where no other test sees their effect."""

import math
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerControl

from llmlab.hardware import probe
from llmlab.runs import run as run_module
from llmlab.runs.callbacks import SaveSchedule
from llmlab.runs.failures import record_failures
from llmlab.runs.record import read_record
from llmlab.stages import STAGES
from llmlab.training.sft import sft


def test_mps_gives_memory_back_between_epochs(sft_settings, quiet, monkeypatch):
    machine, emptied = probe("cpu", "fp32"), []
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append(1))
    settings = sft_settings(max_samples=8, epochs=2, max_steps=...)
    sft(settings, console=quiet)
    assert not emptied
    monkeypatch.setattr("llmlab.runs.start.probe", lambda *wishes: replace(machine, device="mps"))
    sft(settings.model_copy(update={"output_dir": f"{settings.output_dir}-2"}), console=quiet)
    assert len(emptied) == 2


def test_a_signal_while_processes_gather_is_heard_at_the_next_step(monkeypatch):
    """And the launcher's own signal, which reaches this process after the other's was gathered, does not end it."""
    schedule, others = SaveSchedule(save_every=None), [0]
    args = SimpleNamespace(world_size=2, device="cpu", eval_strategy="no")
    state = SimpleNamespace(global_step=1, max_steps=10)

    def gather(number):
        if not schedule.received:
            signal.raise_signal(signal.SIGINT)
        return torch.stack([number, torch.tensor(others[0])])

    def step():
        control = TrainerControl()
        schedule.on_step_end(args, state, control)
        return control.should_training_stop, control.should_save

    monkeypatch.setattr("llmlab.runs.callbacks.gather", gather)
    with schedule.listen(lambda text: None):
        assert [step(), step()] == [(False, False), (True, True)]
    schedule = SaveSchedule(save_every=None)
    others[0] = int(signal.SIGINT)
    with schedule.listen(lambda text: None):
        assert step() == (True, True)
        with pytest.raises(KeyboardInterrupt):
            schedule.end_if_interrupted(args)


@pytest.mark.parametrize("where", ["save_policy", "last_metrics"])
def test_a_signal_while_the_whole_run_is_saved(where, tiny_settings, quiet, tmp_path, monkeypatch):
    """The run is finished, and what follows it, such as a pipeline's next stage, does not begin."""
    original = getattr(run_module, where)

    def signalled(*arguments):
        signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(run_module, where, signalled)
    with pytest.raises(KeyboardInterrupt):
        STAGES["pretrain"].function(tiny_settings("pretrain", tmp_path / "run", max_steps=2), console=quiet)
    assert read_record(tmp_path / "run")["status"] == "finished" and (tmp_path / "run" / "model.safetensors").is_file()


def test_a_signal_in_a_step_that_is_rolled_back(tiny_settings, quiet, tmp_path, monkeypatch):
    """It ends the run, which would begin again at the last checkpoint."""
    step, folder = Trainer.training_step, tmp_path / "run"

    def diverged(self, *arguments, **options):
        loss = step(self, *arguments, **options)
        if self.state.global_step < 7:
            return loss
        signal.raise_signal(signal.SIGINT)
        return loss * math.nan

    monkeypatch.setattr(Trainer, "training_step", diverged)
    health = {"on_warning": "rollback", "on_critical": "rollback"}
    schedule = {"max_steps": 12, "lr": 0.02, "eval_every": 5, "save_best_only": False}
    with pytest.raises(KeyboardInterrupt):
        STAGES["pretrain"].function(tiny_settings("pretrain", folder, **schedule, **health), console=quiet)
    assert read_record(folder)["status"] == "interrupted" and (folder / "checkpoint-5").is_dir()


def test_a_signal_while_a_failure_is_recorded_comes_after_it(tmp_path):
    """A launcher's SIGTERM follows the loss of a process, which the record has to name."""
    written = []

    def finish(status, **results):
        signal.raise_signal(signal.SIGTERM)
        written.append(status)

    record, progress = SimpleNamespace(finish=finish), SimpleNamespace(stop=lambda: None)
    with pytest.raises(SystemExit) as ended, record_failures("pretrain", tmp_path, record, progress):
        raise RuntimeError("a process is gone")
    assert written == ["failed"] and ended.value.code == 143 and isinstance(ended.value.__context__, RuntimeError)

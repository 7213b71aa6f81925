"""Callbacks that every stage shares, where no other test sees their effect."""

import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from llmlab.hardware import probe
from llmlab.runs.callbacks import SaveSchedule
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

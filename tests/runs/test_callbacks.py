"""Callbacks that every stage shares, where no other test sees their effect."""

from dataclasses import replace

import torch

from llmlab.hardware import probe
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

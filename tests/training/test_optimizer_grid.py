"""Every optimizer in every stage: what is trained moves, and stays finite."""

from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from llmlab.model import load_classifier, load_model
from llmlab.optim.sophia import Sophia
from llmlab.runs.record import read_metrics
from llmlab.settings.optimizer import OptimizerSettings
from llmlab.stages import STAGES
from llmlab.training.online.critic import FILE

OPTIMIZERS = ["adamw", "adafactor", "lion", "sophia", "muon"]
KINDS = {  # name: stage, and what makes it that
    "pretrain": ("pretrain", {"model": {"max_seq_len": 32}}),
    "sft": ("sft", {}),
    "sft with LoRA": ("sft", {"use_lora": True, "lora_preset": "all"}),
    "dpo": ("dpo", {}),
    "orpo": ("orpo", {}),
    "reward": ("reward", {}),
    "grpo": ("grpo", {}),
    "ppo": ("ppo", {"early_stop": False}),
    "ppo with a shared critic": ("ppo", {"early_stop": False, "value_model": "shared"}),
}
# every stage makes its optimizer in one place; what estimates or sorts parameters meets each stage's own
GRID = [(kind, optimizer) for kind in KINDS for optimizer in ("adamw", "sophia", "muon")]
GRID += [(kind, optimizer) for kind in ("pretrain", "sft with LoRA", "ppo") for optimizer in ("adafactor", "lion")]


def test_the_grid_is_whole():
    every = get_args(OptimizerSettings.model_fields["optimizer"].annotation)
    assert {optimizer for _, optimizer in GRID} == set(OPTIMIZERS)
    assert set(OPTIMIZERS) == {name for name in every if "bit" not in name}  # these are bitsandbytes' own


@pytest.mark.parametrize(("kind", "optimizer"), GRID)
def test_what_is_trained_moves(kind, optimizer, tiny_settings, base_folder, tmp_path, quiet, monkeypatch):
    estimates = []
    original = Sophia.update_hessian
    monkeypatch.setattr(Sophia, "update_hessian", lambda self: (original(self), estimates.append(self))[0])
    stage, changes = KINDS[kind]
    few = {"max_steps": 2, "warmup_steps": 0, "validation_fraction": 0, "scheduler": "none"}
    few |= {"init_from": str(base_folder)} if stage == "pretrain" else {}
    settings = tiny_settings(stage, tmp_path / "run", optimizer=optimizer, **few, **changes)
    folder = STAGES[stage].function(settings, console=quiet).folder
    assert all(torch.tensor(line["loss"]).isfinite() for line in read_metrics(folder) if "loss" in line)
    if kind == "sft with LoRA":
        weights = load_file(folder / "adapter_model.safetensors")
        moved = [weight.any() for name, weight in weights.items() if "lora_B" in name]
    else:
        load = load_classifier if stage == "reward" else load_model
        before, weights = load_model(base_folder).state_dict(), load(folder).state_dict()
        moved = [not torch.equal(weight, weights[name]) for name, weight in before.items() if name in weights]
    assert moved and all(moved) and all(weight.isfinite().all() for weight in weights.values())
    if stage == "ppo":
        assert load_file(folder / "checkpoint-2" / FILE)["head.weight"].any()
    assert len(estimates) == (optimizer == "sophia")
    for sophia in estimates:
        diagonals = [sophia.state[p]["hessian"] for group in sophia.param_groups for p in group["params"]]
        assert sum(diagonal.any() for diagonal in diagonals) >= len(moved) / 2

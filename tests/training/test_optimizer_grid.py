"""Every optimizer in every stage: what is trained moves, and stays finite."""

from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from llmlab.model import load_classifier, load_model
from llmlab.optim.sophia import Sophia
from llmlab.rewards import Reward
from llmlab.runs.record import read_metrics
from llmlab.settings.dpo import DPOSettings
from llmlab.settings.grpo import GRPOSettings
from llmlab.settings.model import ModelSettings
from llmlab.settings.optimizer import OptimizerSettings
from llmlab.settings.orpo import ORPOSettings
from llmlab.settings.ppo import PPOSettings
from llmlab.settings.reward import RewardModelSettings
from llmlab.training.online.critic import FILE
from llmlab.training.online.grpo import grpo
from llmlab.training.online.ppo import ppo
from llmlab.training.preference.dpo import dpo
from llmlab.training.preference.orpo import orpo
from llmlab.training.preference.reward import reward
from llmlab.training.pretrain import pretrain
from llmlab.training.sft import sft

OPTIMIZERS = ["adamw", "adafactor", "lion", "sophia", "muon"]
STAGES = ["pretrain", "sft", "sft with LoRA", "dpo", "orpo", "reward", "grpo", "ppo", "ppo with a shared critic"]


def share(completions, completion_ids, **columns):
    """The share of tokens that are in the first third of the vocabulary."""
    return [sum(token < 100 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture
def run(settings, sft_settings, preference_settings, base_folder, chat_file, tmp_path, quiet):
    """Returns a function that runs two steps of a stage with an optimizer, and returns the run folder."""

    def start(stage, optimizer):
        few = {
            "optimizer": optimizer,
            "max_steps": 2,
            "warmup_steps": 0,
            "validation_fraction": 0,
            "scheduler": "none",
        }
        of_pairs = {"dpo": (dpo, DPOSettings), "orpo": (orpo, ORPOSettings), "reward": (reward, RewardModelSettings)}
        sampling = {"grpo": (grpo, GRPOSettings, {}), "ppo": (ppo, PPOSettings, {"early_stop": False})}
        sampling["ppo with a shared critic"] = (ppo, PPOSettings, {"early_stop": False, "value_model": "shared"})
        if stage == "pretrain":
            start = {"init_from": str(base_folder), "model": ModelSettings(max_seq_len=32)}
            return pretrain(settings(**few).model_copy(update=start), console=quiet)
        if stage.startswith("sft"):
            lora = {"use_lora": True, "lora_preset": "all"} if "LoRA" in stage else {}
            return sft(sft_settings(**few, **lora), console=quiet)
        if stage in of_pairs:
            function, kind = of_pairs[stage]
            return function(preference_settings(kind, **few), console=quiet)
        function, kind, more = sampling[stage]
        sizes = {"batch_size": 4, "mini_batch_size": 4, "ppo_epochs": 1, "max_new_tokens": 4}
        return function(
            kind(
                policy_checkpoint=str(base_folder),
                datasets=[str(chat_file)],
                output_dir=str(tmp_path / "run"),
                cache_dir=str(tmp_path.parent / "cache"),
                learning_rate=1e-3,
                dtype="fp32",
                **sizes,
                **few,
                **more,
            ),
            console=quiet,
            rewards=[Reward(share, low=0, high=1)],
        )

    return lambda *args: start(*args).folder


def test_the_grid_is_whole():
    every = get_args(OptimizerSettings.model_fields["optimizer"].annotation)
    assert set(OPTIMIZERS) == {name for name in every if "bit" not in name}  # these are bitsandbytes' own


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_trained_moves(stage, optimizer, run, base_folder, monkeypatch):
    estimates = []
    original = Sophia.update_hessian
    monkeypatch.setattr(Sophia, "update_hessian", lambda self: (original(self), estimates.append(self))[0])
    folder = run(stage, optimizer)
    assert all(torch.tensor(line["loss"]).isfinite() for line in read_metrics(folder) if "loss" in line)
    if stage == "sft with LoRA":
        weights = load_file(folder / "adapter_model.safetensors")
        moved = [weight.any() for name, weight in weights.items() if "lora_B" in name]
    else:
        load = load_classifier if stage == "reward" else load_model
        before, weights = load_model(base_folder).state_dict(), load(folder).state_dict()
        moved = [not torch.equal(weight, weights[name]) for name, weight in before.items() if name in weights]
    assert moved and all(moved) and all(weight.isfinite().all() for weight in weights.values())
    if stage.startswith("ppo"):
        assert load_file(folder / "checkpoint-2" / FILE)["head.weight"].any()
    assert len(estimates) == (optimizer == "sophia")
    for sophia in estimates:
        diagonals = [sophia.state[p]["hessian"] for group in sophia.param_groups for p in group["params"]]
        assert sum(diagonal.any() for diagonal in diagonals) >= len(moved) / 2

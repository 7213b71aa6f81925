"""Two processes on this machine: they learn what one does, and what is saved is gathered from both."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from llmlab.runs.record import read_metrics
from llmlab.settings.orpo import ORPOSettings
from llmlab.training.preference.orpo import orpo

ORPO = """
import json, sys
from accelerate import PartialState
from llmlab.settings.orpo import ORPOSettings
from llmlab.training.preference.orpo import orpo

orpo(ORPOSettings(**json.load(open(sys.argv[1]))))
assert PartialState().num_processes == 2, PartialState()
"""

# Accelerate leaves CPUs out of FSDP, which torch does not
SHARDED = """
import json, sys
import torch
from accelerate import state
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

original = state.AcceleratorState.__init__

def with_cpu(self, *args, fsdp_plugin=None, **kwargs):
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = state.PartialState._shared_state["distributed_type"] = state.DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin

state.AcceleratorState.__init__ = with_cpu

from llmlab.settings.sft import SFTSettings
from llmlab.training.sft import InstructionTrainer, sft

class Mark(TrainerCallback):
    def on_train_end(self, args, state, control, model, **kwargs):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained and all(isinstance(p, DTensor) and len(p.to_local()) == len(p) / 2 for p in trained)
        for p in trained:
            p.detach().to_local().fill_(torch.distributed.get_rank() + 1.0)

init = InstructionTrainer.__init__

def marked(self, *args, **kwargs):
    init(self, *args, **kwargs)
    self.add_callback(Mark())

InstructionTrainer.__init__ = marked
sft(SFTSettings(**json.load(open(sys.argv[1]))))
"""


@pytest.fixture
def together(tmp_path):
    """Returns a function that runs a script in two processes, with settings; it returns their run folder."""

    def run(script, settings, **environment):
        (tmp_path / "script.py").write_text(script)
        folder = tmp_path / "together"
        folder.mkdir()  # else both may make and remove it at once
        (tmp_path / "settings.json").write_text(json.dumps(settings.recorded() | {"output_dir": str(folder)}))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*torchrun, tmp_path / "script.py", tmp_path / "settings.json"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
        assert done.returncode == 0, done.stderr
        return folder

    return run


def test_orpo_learns_what_one_process_does(preference_settings, together, tmp_path, quiet):
    """Answers of very different lengths: a mean of the processes' means would be another loss."""
    answers = [("The cat meows. " * (1 + n * n % 5), "The dog. " * (1 + n % 4)) for n in range(24)]
    rows = [{"prompt": f"How {n}?", "chosen": better, "rejected": worse} for n, (better, worse) in enumerate(answers)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"datasets": [str(tmp_path / "pairs.jsonl")], "validation_fraction": 0, "max_steps": 3}
    alone = orpo(preference_settings(ORPOSettings, **values, mini_batch_size=8), console=quiet).folder
    folder = together(ORPO, preference_settings(ORPOSettings, **values, mini_batch_size=2))
    for name in ("loss", "grad_norm", "nll_loss", "log_odds_ratio"):
        ours, theirs = ([line[name] for line in read_metrics(run) if name in line] for run in (folder, alone))
        assert len(ours) == 3 and ours == pytest.approx(theirs, abs=1e-5), name


def test_adapters_are_gathered_from_both(sft_settings, together, tmp_path):
    """Each process fills its half of every adapter with a number of its own: the saved tensors hold both."""
    settings = sft_settings(use_lora=True, lora_preset="all", max_steps=1, validation_fraction=0, output_dir="there")
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    folder = together(SHARDED, settings, **fsdp, FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT")
    for place in (folder, folder / "best_lora_adapters"):
        weights = load_file(place / "adapter_model.safetensors")
        assert len(weights) == 2 * 7 * 2
        for name, weight in weights.items():
            first, second = weight.chunk(2)
            assert (first == 1).all() and (second == 2).all(), name

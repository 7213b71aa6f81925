"""A run goes on with other processes, sharded or not, and with another split of its batch, as if nothing had changed.

Dropout is 0: processes draw their own random numbers, so no two splits could drop the same activations.
"""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llmlab.runs.record import read_metrics, read_record

PAIR = runpy.run_path(str(Path(__file__).with_name("test_several_processes.py")))
RANKS = runpy.run_path(str(PAIR["RANKS"]))
plain, LORA = PAIR["plain"], PAIR["LORA"]

# 21 rows in steps of 8: the third step of each epoch has 5, which no split shares equally, as it does not 10 in 4s
ROWS = {"max_samples": 21, "save_every": 2, "validation_fraction": 0.1}
FAMILIES = {
    "pretrain": ("pretrain", {"validation_fraction": 0.01}),
    "sft": ("sft", ROWS),
    "sft with LoRA": ("sft", {**ROWS, **LORA}),
}
LEGS = {  # name: what it goes on from, after which step, up to which, and on what: one process, a pair, or its shards
    "pair": ("whole", 2, 4, "MULTI_CPU"),
    "shards": ("whole", 2, 4, "FSDP"),
    "pair, one": ("pair", 4, 6, "NO"),
    "pair, shards": ("pair", 4, 6, "FSDP"),
    "shards, pair": ("shards", 4, 6, "MULTI_CPU"),
    "shards, one": ("shards", 4, 6, "NO"),
    "one, wider": ("whole", 2, 6, "NO"),
}


def values_for(changes, steps):
    """Settings that are the same on any number of processes, as one configuration file would have them."""
    values = {"max_steps": steps, "warmup_steps": 0, "scheduler": "none", "save_total_limit": None, "eval_every": 2}
    values |= {"batch_size": 2, "gradient_accumulation_steps": 4, "eval_steps": 5, "save_best_only": False}
    return {**values, **changes}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_settings):
    """The folder with each family's whole run on one process and its legs, and what was seen in each."""
    folder = tmp_path_factory.mktemp("elastic")
    seen, jobs = {}, {"NO": {}, "pair": {}}
    for family, (stage, changes) in FAMILIES.items():
        whole = plain(tiny_settings(stage, folder / family / "whole", **values_for(changes, 6)))
        seen[family, "whole"] = [RANKS["train"](stage, whole)]
        for leg, (start, step, end, kind) in LEGS.items():
            wider = {"batch_size": 4} if leg == "one, wider" else {}
            settings = plain(tiny_settings(stage, folder / family / leg, **values_for({**changes, **wider}, end)))
            job = {"stage": stage, "settings": settings, "whole": str(folder / family / start), "step": step}
            jobs["NO" if kind == "NO" else "pair"][family, leg] = {**job, "sharded": kind == "FSDP"}
    process = PAIR["start"](folder, [{"do": "resume", **job} for job in jobs["pair"].values()])
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, (output, *(PAIR["printed"](folder, rank, "stderr") for rank in (0, 1)))
    said = [json.loads((folder / f"said-{rank}.json").read_text())["said"] for rank in (0, 1)]
    seen |= dict(zip(jobs["pair"], zip(*said, strict=True), strict=True))
    seen |= {name: [RANKS["resume"](**job)] for name, job in jobs["NO"].items()}
    return folder, seen


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_goes_on_with_the_same_rows_and_losses(family, leg, runs):
    folder, seen = runs
    _, step, end, kind = LEGS[leg]
    processes, size = 1 if kind == "NO" else 2, 4 if leg == "one, wider" else 2
    mine, whole = seen[family, leg], seen[family, "whole"][0]["rows"]
    assert [(each["type"], each["processes"]) for each in mine] == [(kind, processes)] * processes
    assert [int(number) for number in mine[0]["rows"]] == list(range(step + 1, end + 1))
    for number in mine[0]["rows"]:
        passes = list(zip(*(each["rows"][number] for each in mine), strict=True))
        rows = [row for each in passes for share in each for row in share]
        assert rows == [row for share in whole[number] for row in share]
        assert len(rows) == (5 if family != "pretrain" and int(number) % 3 == 0 else 8)
        assert len(passes) == math.ceil(len(rows) / size / processes)
    expected, got = values_of(folder / family / "whole"), values_of(folder / family / leg)
    assert got == {key: pytest.approx(expected[key], abs=1e-5) for key in expected if key[0] <= end}
    assert len(got) == 2 * end + end // 2
    for ours, theirs in zip(seen[family, leg][0]["logits"][0], seen[family, "whole"][0]["logits"][0], strict=True):
        assert end < 6 or ours == pytest.approx(theirs, abs=1e-4)


def values_of(run):
    """Returns the losses and gradient norms of a run by step."""
    names = ("loss", "grad_norm", "eval_loss")
    return {(line["step"], name): line[name] for line in read_metrics(run) for name in names if name in line}


@pytest.mark.parametrize("leg", LEGS)
def test_the_record_keeps_the_batch(leg, runs):
    """8 rows, and 10 rows of an evaluation, as the configuration says on one process."""
    record = read_record(runs[0] / "sft" / leg)
    given = {"batch_size": 4 if leg == "one, wider" else 2, "gradient_accumulation_steps": 4, "eval_steps": 5}
    assert record["batch"] == {"rows": 8, "validation_rows": 10, "settings": given}
    settings, processes = record["settings"], record["hardware"]["processes"]
    assert settings["batch_size"] * settings["gradient_accumulation_steps"] * processes == 8
    assert settings["eval_steps"] == math.ceil(10 / settings["batch_size"] / processes)
    assert record["data"]["validation_rows"] == 10


@pytest.mark.parametrize("leg", LEGS)
def test_checkpoints_are_whole_and_alike_and_those_of_adapters_hold_no_base(leg, runs):
    """The two AdamW states of each trained number, and the number: 12 bytes; of the frozen ones nothing."""
    for family in ("sft", "sft with LoRA"):
        checkpoint = runs[0] / family / leg / f"checkpoint-{LEGS[leg][2]}"
        weights = checkpoint / ("adapter_model.safetensors" if "LoRA" in family else "model.safetensors")
        with safe_open(weights, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        trained = sum(map(math.prod, shapes.values()))
        states = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
        counts = [value.numel() for state in states.values() for name, value in state.items() if name != "step"]
        assert sum(counts) == 2 * trained
        assert all("lora_" in name for name in shapes) == ("LoRA" in family)
        large = {path.name for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size > 4 * trained}
        assert large <= {"optimizer.pt", weights.name, "tokenizer.json"}, large

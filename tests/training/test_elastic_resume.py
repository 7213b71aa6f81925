"""A run goes on with other processes, sharded or not, and with another split of its batch, as if nothing had changed.

Dropout is 0: processes draw their own random numbers, so no two splits could drop the same activations.
"""

import json
import runpy
import shutil
from pathlib import Path

import pytest

from llmlab.runs.checkpoints import checkpoints
from llmlab.runs.record import read_metrics, read_record

pytestmark = pytest.mark.xdist_group("elastic")
PAIR = runpy.run_path(str(Path(__file__).with_name("test_several_processes.py")))
RANKS = runpy.run_path(str(PAIR["RANKS"]))
LORA, plain = PAIR["LORA"], PAIR["plain"]
# 21 rows in steps of 8: each epoch ends with a step of 5, which no split shares equally
ROWS = {"max_samples": 21, "save_every": 2, "validation_fraction": 0.1}
FAMILIES = {
    "pretrain": ("pretrain", {"save_best_only": False, "eval_every": 2, "validation_fraction": 0.01}),
    "sft": ("sft", ROWS),
    "sft with LoRA": ("sft", {**ROWS, **LORA}),
}
ROUTES = {  # how the steps 3 and 4, and then 5 and 6, are trained; None is one process
    "1 -> 2 -> 1": ("ddp", None),
    "1 -> FSDP2 -> DDP": ("fsdp2", "ddp"),
    "1 -> DDP -> FSDP2": ("ddp", "fsdp2"),
    "1 -> FSDP2 -> 1": ("fsdp2", None),
}


def values_for(changes, steps):
    values = {"max_steps": steps, "warmup_steps": 0, "scheduler": "none", "save_total_limit": None, "eval_every": 2}
    values |= {"batch_size": 2, "gradient_accumulation_steps": 4, "eval_steps": 5, "save_best_only": False}
    return {**values, **changes}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_settings):
    """The folder with each family's whole run of one process, and with each route through two; and what was said."""
    folder = tmp_path_factory.mktemp("elastic")
    jobs, rows = [], {}
    for name, (stage, changes) in FAMILIES.items():
        settings = plain(tiny_settings(stage, folder / name, **values_for(changes, 6)))
        rows[name] = RANKS["train"](stage, settings)["rows"]
        for route, kinds in ROUTES.items():
            start = name
            for step, kind in zip((2, 4), kinds, strict=True):
                place = f"{name} {route} {step}"
                again = plain(tiny_settings(stage, folder / place, **values_for(changes, step + 2)))
                job = {"do": "resume", "stage": stage, "settings": again, "whole": str(folder / start), "step": step}
                if kind is not None:
                    jobs.append({**job, "sharded": kind == "fsdp2"})
                start = place
    process = PAIR["start"](folder, jobs)
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, (
        output,
        PAIR["printed"](folder, 0, "stderr"),
        PAIR["printed"](folder, 1, "stderr"),
    )
    said = [json.loads((folder / f"said-{rank}.json").read_text())["said"] for rank in (0, 1)]
    return folder, rows, jobs, said


@pytest.mark.parametrize("name", FAMILIES)
def test_x(runs, name):
    folder, rows, jobs, said = runs

    def table(run):
        return {
            (l["step"], k): l[k]
            for l in read_metrics(folder / run)
            for k in ("loss", "grad_norm", "eval_loss", "tokens")
            if k in l
        }

    whole = table(name)
    for job, a, b in zip(jobs, *said):
        place = Path(job["settings"]["output_dir"]).name
        if not place.startswith(name + " 1"):
            continue
        mine = table(place)
        print(place, a["type"], b["processes"])
        for key in whole:
            if key in mine:
                print("  ", key, whole[key], mine[key], "" if abs(whole[key] - mine[key]) < 1e-5 else "<<<<<")
        for step in rows[name]:
            s = str(step)
            if s in a["rows"]:
                joined = [r for x, y in zip(a["rows"][s], b["rows"][s]) for r in x + y]
                print("   rows", step, joined == [r for x in rows[name][step] for r in x])

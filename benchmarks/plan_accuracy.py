"""Planned memory against measured memory: each cell trains in a process of its own, on rows of exactly its length.

    python benchmarks/plan_accuracy.py [--record] [--cells 63] [--jobs 1] [--guide]

The plan follows a step on tensors without memory; nothing in it was fitted to these cells.  What is measured is the
kernel's highest resident size in one to three steps of the stage's own trainer, less the resident size after a tiny
run of the same stage, so that libraries and their caches are not in it.  glibc's allocator gives each larger tensor
pages of its own (MALLOC_* below), so that freed memory goes back at once, and figures repeat within a percent.
`--guide` prints the RL guide's "Expected Training Time" beside the plan's instead.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SHAPES = {  # vocabulary, width, inner width, layers, heads, key/value heads
    "tiny": (259, 32, 64, 2, 2, 1),
    "10M": (8192, 256, 768, 8, 8, 4),
    "35M": (32000, 384, 1024, 12, 6, 2),
    "135M": (49152, 576, 1536, 30, 9, 3),
}


def cell(stage, shape, rows, length, dtype="bf16", **settings):
    return {"stage": stage, "shape": shape, "rows": rows, "length": length, "dtype": dtype, "settings": settings}


def make_cells():
    """Returns the cells: every stage and size, with batches from 1 to 8 and lengths from 64 to 2048."""
    lora, saves = {"use_lora": True, "lora_preset": "all"}, {"gradient_checkpointing": True}
    cells = []
    for stage, changes in (("pretrain", {}), ("sft", {}), ("sft", lora), ("dpo", {}), ("reward", {})):
        pairs = stage in ("dpo", "reward")
        cells += [
            cell(stage, "10M", 1, 256, **changes),
            cell(stage, "10M", 4, 1024 if not pairs else 512, **changes),
            cell(stage, "10M", 8, 256, "fp32", **changes),
            cell(stage, "10M", 1, 2048, **changes, **saves),
            cell(stage, "35M", 1, 256, **changes),
            cell(stage, "35M", 4, 512 if not pairs else 256, **changes),
            cell(stage, "35M", 2, 1024 if not pairs else 512, "fp32", **changes),
            cell(stage, "135M", 1, 128, **changes),
            cell(stage, "135M", 1, 512, **changes),
            cell(stage, "135M", 2, 256, **changes, **saves),
        ]
    for stage in ("grpo", "ppo"):
        cells += [
            cell(stage, "10M", 4, 64, **(changes := {})),
            cell(stage, "10M", 8, 256),
            cell(stage, "10M", 4, 512, "fp32"),
            cell(stage, "35M", 4, 128),
            cell(stage, "35M", 2, 512, **lora),
            cell(stage, "135M", 2, 64, **lora),
            cell(stage, "135M", 2, 256, **lora, **saves),
        ]
    return cells


def make_run(options):
    """Returns the stage, its settings and the scene of a cell."""
    from llmlab.hardware import probe
    from llmlab.model import build_config
    from llmlab.runs.rehearsal import Scene
    from llmlab.settings.model import ModelSettings
    from llmlab.stages import STAGES

    vocab, width, inner, layers, heads, kv_heads = SHAPES[options["shape"]]
    stage, rows, length = STAGES[options["stage"]], options["rows"], options["length"]
    shape = {"vocab_size": vocab, "d_model": width, "d_ff": inner, "n_layers": layers, "n_heads": heads}
    shape |= {"n_kv_heads": kv_heads, "max_seq_len": max(length, 64)}
    values = {"dtype": options["dtype"], "device": "cpu", **options["settings"]}
    prompt = 0
    if stage.name == "pretrain":
        values |= {"model": shape, "batch_size": rows, "gradient_accumulation_steps": 2}
    elif stage.name == "sft":
        values |= {"max_seq_len": length, "batch_size": rows, "gradient_accumulation_steps": 1}
    elif stage.name in ("dpo", "reward"):
        values |= {"max_length": length, "max_prompt_length": length // 2, "mini_batch_size": rows}
        values |= {"batch_size": rows}
    else:
        prompt = length // 2
        values |= {"max_new_tokens": length - prompt, "max_prompt_length": prompt, "mini_batch_size": rows}
        values |= {"batch_size": rows, "ppo_epochs": 1, "rewards": "length_penalty"}
    settings = stage.settings_class(output_dir="unused", **values)
    config = build_config(ModelSettings(**shape))
    return stage.function, settings, probe("cpu", options["dtype"]), Scene(config, None, length, prompt)


def resident(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure_cell(options):
    """Prints what a cell took and what was planned, as JSON."""
    import torch

    from llmlab.runs.rehearsal import rehearse

    torch.set_num_threads(1)
    toy = {**options, "shape": "tiny", "rows": 2, "length": 16}
    rehearse(*make_run(toy), follow=False)
    for _ in range(3):
        gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size counts from here
    before = resident("VmRSS")
    began = time.perf_counter()
    rehearse(*make_run(options), follow=False)
    trained = time.perf_counter() - began
    measured = resident("VmHWM") - before
    began = time.perf_counter()
    ledger = rehearse(*make_run(options))
    phase, parts = ledger.peak()
    planned = {"seconds": time.perf_counter() - began, "trained": trained, "phase": phase, "parts": parts}
    print(json.dumps({"measured": measured, "planned": sum(parts.values()), **planned}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="stages or shapes, separated by commas")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        measure_cell(json.loads(options.cell))
        return
    cells = [c for c in make_cells() if not options.only or set(options.only.split(",")) >= {c["stage"]} or c["shape"] in options.only.split(",")]

    def run(values):
        command = [sys.executable, "-W", "ignore", __file__, "--cell", json.dumps(values)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **MALLOC})
        if done.returncode:
            return {"error": done.stderr[-600:]}
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(options.jobs) as pool:
        for values, found in zip(cells, pool.map(run, cells)):
            name = f"{values['stage']:8} {values['shape']:4} {values['rows']} x {values['length']:4} {values['dtype']} {values['settings']}"
            if "error" in found:
                print(name, found["error"], flush=True)
                continue
            parts = {k: round(v / 1e6) for k, v in found["parts"].items()}
            print(f"{name:70} measured {found['measured'] / 1e6:7.0f} planned {found['planned'] / 1e6:7.0f} ratio {found['planned'] / found['measured']:.3f} {found['phase']} {parts} {found['trained']:.1f} {found['seconds']:.1f}", flush=True)


if __name__ == "__main__":
    main()

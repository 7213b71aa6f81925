"""Planned memory against measured memory: each cell trains in a process of its own, on rows of exactly its length.

    python benchmarks/plan_accuracy.py [--record] [--only sft,10M] [--guide]

The plan follows a step on tensors without memory; its margin of 3 % on a CPU was chosen by these
cells.  What is measured is the kernel's highest resident size in one to three steps of the stage's own trainer, less
the resident size after a tiny
run of the same stage, so that libraries and their caches are not in it.  glibc's allocator gives each larger tensor
pages of its own (MALLOC_* below), so that freed memory goes back at once, and figures repeat within a percent.
`--guide` prints the RL guide's "Expected Training Time" beside the plan's instead.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
# the RL guide's tables: stage, settings, amounts, and for each machine batch, passes and hours from and to
GUIDE = (
    (
        "orpo",
        {"epochs": 3, "max_length": 4096, "max_prompt_length": 2048},
        (500, 1500),
        (
            ("m1_max_64gb", (1, 16), ((3, 4), (8, 10))),
            ("rtx_4090", (2, 8), ((1.5, 2), (4, 5))),
            ("a100_40gb", (4, 4), ((1, 1), (2.5, 3))),
            ("a100_80gb", (8, 2), ((0.75, 0.75), (1.5, 2))),
        ),
    ),
    (
        "sft",
        {"epochs": 2, "max_seq_len": 1024},
        (5000, 20000),
        (
            ("m1_max_64gb", (2, 8), ((4, 6), (12, 16))),
            ("rtx_4090", (4, 4), ((2, 3), (6, 8))),
            ("a100_40gb", (8, 2), ((1, 1.5), (3, 4))),
        ),
    ),
    (
        "grpo",
        {"batch_size": 16, "max_new_tokens": 256, "max_prompt_length": 1024, "rewards": "length_penalty"},
        (10000, 50000),
        (
            ("m1_max_64gb", (1, 16), ((36, 48), (120, 168))),
            ("rtx_4090", (2, 8), ((12, 18), (60, 84))),
            ("a100_40gb", (4, 4), ((6, 10), (36, 48))),
            ("a100_80gb", (8, 2), ((4, 6), (24, 36))),
        ),
    ),
)
SHAPES = {  # vocabulary, width, inner width, layers, heads, key/value heads
    "tiny": (259, 32, 64, 2, 2, 1),
    "10M": (8192, 256, 768, 8, 8, 4),
    "35M": (32000, 384, 1024, 12, 6, 2),
    "60M": (49152, 512, 1536, 12, 8, 4),
}


def cell(stage, shape, rows, length, dtype="bf16", **settings):
    return {"stage": stage, "shape": shape, "rows": rows, "length": length, "dtype": dtype, "settings": settings}


def make_cells():
    """Returns the cells: every stage and size, batches from 1 to 8 and lengths from 64 to 1024."""
    lora, saves = {"use_lora": True, "lora_preset": "all"}, {"gradient_checkpointing": True}
    cells = []
    for stage, changes in (("pretrain", {}), ("sft", {}), ("sft", lora), ("dpo", {}), ("reward", {})):
        cells += [
            cell(stage, "10M", 1, 256, **changes),
            cell(stage, "10M", 4, 256, "fp32", **changes),
            cell(stage, "10M", 1, 1024, **changes),
            cell(stage, "10M", 2, 1024, **changes, **saves),
            cell(stage, "35M", 1, 128, **changes),
            cell(stage, "35M", 2, 256, **changes),
            cell(stage, "35M", 1, 512, "fp32", **changes),
            cell(stage, "60M", 1, 64, **changes),
            cell(stage, "60M", 1, 256, **changes),
            cell(stage, "60M", 1, 256, **changes, **saves),
        ]
    for stage in ("grpo", "ppo"):
        cells += [
            cell(stage, "10M", 4, 64),
            cell(stage, "10M", 8, 128),
            cell(stage, "10M", 4, 256, "fp32"),
            cell(stage, "35M", 2, 128),
            cell(stage, "35M", 2, 256, **lora),
            cell(stage, "60M", 2, 64, **lora),
            cell(stage, "60M", 2, 128, **lora, **saves),
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


def measure_cells(cells):
    """Prints what cells of one stage took and what was planned, a line of JSON each, from a process each."""
    import torch

    from llmlab.runs.rehearsal import rehearse

    torch.set_num_threads(1)
    toy = make_run({**cells[0], "shape": "tiny", "rows": 2, "length": 16})
    rehearse(*toy, follow=False)
    for values in cells:
        again = values["length"] == 256
        for action in (measure_cell, repeat_cell) if again else (measure_cell,):
            child = os.fork()
            if child == 0:
                rehearse(*toy, follow=False)  # a new process has none of the libraries' code in memory
                gc.collect()
                ctypes.CDLL("libc.so.6").malloc_trim(0)
                print(json.dumps(action(values)), flush=True)
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                sys.exit(f"{values}: its process failed")
        if not again:
            print("null", flush=True)


def measure_cell(values):
    """Returns what a cell took and what was planned."""
    from llmlab.runs.plan import measure_step, plan_memory
    from llmlab.runs.rehearsal import rehearse_layers

    measured, _ = measure_step(*make_run(values))
    function, settings, hardware, scene = make_run(values)
    rehearsals = rehearse_layers(function, settings, hardware, scene)
    phase, parts = plan_memory(rehearsals, settings, hardware, scene.config)
    return {"measured": measured, "planned": sum(parts.values()), "phase": phase, "parts": parts}


def repeat_cell(values):
    """Returns what another process measures."""
    from llmlab.runs.plan import measure_step

    return measure_step(*make_run(values))[0]


def run_cells(cells):
    """Yields what a process that forks for each cell prints about it; `step` is another one's measurement or None."""
    command = [sys.executable, "-W", "ignore", __file__, "--measure", json.dumps(cells)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **MALLOC}) as process:
        for line in process.stdout:
            if line.startswith("{"):
                yield {**json.loads(line), "step": json.loads(next(process.stdout))}


def describe(values):
    words = {"use_lora": "LoRA", "gradient_checkpointing": "checkpointing"}
    extras = [word for name, word in words.items() if values["settings"].get(name)]
    return [
        " ".join([values["stage"], *extras]),
        values["shape"],
        f"{values['rows']} x {values['length']}",
        values["dtype"],
    ]


def summarize(found):
    """Returns the lines below the table: how far predictions are off."""
    errors = [cell["planned"] / cell["measured"] - 1 for cell in found]
    steps = [cell["step"] / cell["measured"] - 1 for cell in found if cell["step"]] or [0.0]
    return [
        f"{len(errors)} cells: the plan is within 15 % in {sum(abs(e) <= 0.15 for e in errors)}, and at least "
        f"95 % of the measured peak in {sum(e >= -0.05 for e in errors)}; from {min(errors):+.1%} to "
        f"{max(errors):+.1%}, in the median {statistics.median(errors):+.1%}.",
        f"`--measure` is within 5 % in {sum(abs(e) <= 0.05 for e in steps)} of {len(steps)} repeated; "
        f"from {min(steps):+.1%} to {max(steps):+.1%}.",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cells of these stages or sizes, separated by commas")
    parser.add_argument("--record", action="store_true", help="append the table to RESULTS.md")
    parser.add_argument("--guide", action="store_true", help="the RL guide's training times beside the plan's")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure_cells(json.loads(options.measure))
        return
    lines = compare_times() if options.guide else compare_memory(options)
    if options.record:
        record(lines)


def compare_memory(options):
    """Runs the cells, prints each as it ends, and returns all lines."""
    chosen = set(filter(None, options.only.split(",")))
    cells = [values for values in make_cells() if not chosen or chosen & {values["stage"], values["shape"]}]
    lines = ["| run | model | rows x length | dtype | measured MB | `--measure` | plan | most |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines), flush=True)
    found = []
    for _, part in groupby(cells, lambda values: (values["stage"], "use_lora" in values["settings"])):
        part = list(part)
        for values, cell in zip(part, run_cells(part), strict=True):
            found.append(cell)
            most = max(cell["parts"], key=cell["parts"].get)
            ratios = [f"{cell[name] / cell['measured']:.3f}" if cell[name] else "" for name in ("step", "planned")]
            row = [*describe(values), f"{cell['measured'] / 1e6:.0f}", *ratios, f"{most}, {cell['phase']}"]
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
    lines += ["", *summarize(found)]
    print("\n".join(lines[-3:]))
    return lines


def compare_times():
    """Returns the guide's times beside the plan's for a 7B model with LoRA; the ratio is 1 inside the guide's range,
    and outside it the plan's time to the nearer end.

    The guide names 7B models, LoRA of rank 16 on all projections and limits of length, no mean lengths: assumed are
    Llama's 7B, pairs of half their limit of 4096 tokens in the mean, rows of 1024 tokens for SFT, and episodes of a
    prompt of 1024 tokens and 256 sampled ones.
    """
    from llmlab.hardware import describe_machine
    from llmlab.runs.plan import UTILIZATION, make_plan
    from llmlab.stages import STAGES

    lines = ["| stage | machine | batch | amount | guide, hours | plan, hours | utilization | ratio |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_7B))
        for stage, values, counts, table in GUIDE:
            for machine, (rows, passes), hours in table:
                hardware = describe_machine(machine)
                settings = guide_settings(STAGES[stage].settings_class, stage, folder, values, rows, passes)
                for amount, (low, high) in zip(counts, hours, strict=True):
                    mean = settings.max_length / 2 if stage == "orpo" else None
                    if stage == "grpo":
                        settings = settings.model_copy(update={"num_episodes": amount})
                    plan = make_plan(STAGES[stage].function, settings, hardware, rows=amount, mean=mean)
                    took = plan.seconds / 3600
                    ratio = took / low if took < low else took / high if took > high else 1.0
                    used = UTILIZATION[hardware.device]
                    row = [stage, machine, f"{rows} x {passes}", f"{amount:,}", f"{low:g} to {high:g}", f"{took:.2g}"]
                    lines.append(f"| {' | '.join([*row, f'{used:.0%}', f'{ratio:.2f}'])} |")
                    print(lines[-1], flush=True)
    return lines


def guide_settings(kind, stage, folder, values, rows, passes):
    batch = {"mini_batch_size": rows, "gradient_accumulation_steps": passes}
    if stage == "sft":
        batch = {"batch_size": rows, "gradient_accumulation_steps": passes}
    return kind(
        policy_checkpoint=folder,
        output_dir="unused",
        lora_r=16,
        lora_preset="all",
        gradient_checkpointing=True,
        **batch,
        **values,
    )


def record(lines):
    """Appends lines to RESULTS.md."""
    import torch

    head = f"\n## plan_accuracy.py, {date.today()}\n\nPython {platform.python_version()}, torch {torch.__version__}, "
    head += f"trl {version('trl')}, transformers {version('transformers')}, one thread.\n\n"
    with Path(__file__).with_name("RESULTS.md").open("a") as file:
        file.write(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""How time and memory grow with the work: a table and a plot of each axis, with slopes between its points.

    python benchmarks/scaling.py [--only sequence,corpus] [--plot scaling.png] [--record]

Each point is a process of its own, on one thread; times are seconds of CPU, which other work disturbs least.  Steps
are real ones of the stage's own trainer with random weights (`llmlab.runs.rehearsal`): the second one's time, the
better of two where they are short, and the highest resident size less what it was after a tiny run of the same
stage.  A slope is the growth of the logarithm over that of the amount between two points: 0 is constant, 1 in
proportion, 2 quadratic; where a fixed cost is small beside the rest, the last one says how an axis grows.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SMALL = {"vocab_size": 4096, "d_model": 256, "d_ff": 768, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2}
SIZES = ((192, 4, 3), (512, 8, 8), (768, 14, 12), (1024, 18, 16), (1280, 26, 20))  # width, layers, heads
SHORT = 6  # seconds of a step: shorter ones are measured twice
RECORD = {"stage": "sft", "status": "finished", "settings": {}, "sources": {}, "parents": [], "step": 100}

# axis: (amounts, what they count, how steep its time may be, and its memory)
AXES = {
    "sequence": ((512, 1024, 2048, 4096, 8192), "tokens of a row", 2, 1),
    "vocabulary": ((4096, 16384, 49152, 151936), "entries", 1, 1),
    "parameters": ((0, 1, 2, 3, 4), "million", 1, 1),
    "rank": ((4, 16, 64, 256), "of LoRA on all projections", 1, 1),
    "group": ((2, 4, 8, 16, 32), "completions of a prompt (GRPO)", 1, 1),
    "corpus": ((1, 10, 100, 1000), "MB of text", 1, 0),
    "runs": ((10, 100, 1000), "run folders listed", 1, 1),
}


def make_step(axis, amount):
    """Returns what `rehearse` takes for a step of this point, and the amount as it is shown."""
    from llmlab.hardware import probe
    from llmlab.model import build_config, measure
    from llmlab.runs.rehearsal import Scene
    from llmlab.settings.model import ModelSettings
    from llmlab.stages import STAGES

    shape, stage, length, prompt = dict(SMALL), "pretrain", 256, 0
    values = {"batch_size": 1, "gradient_accumulation_steps": 1, "device": "cpu"}
    if axis == "sequence":
        length = amount
    elif axis == "vocabulary":
        shape["vocab_size"] = amount
    elif axis == "parameters":
        width, layers, heads = SIZES[amount]
        shape |= {"vocab_size": 8192, "d_model": width, "d_ff": 3 * width, "n_layers": layers}
        shape |= {"n_heads": heads, "n_kv_heads": heads}
    elif axis == "rank":
        stage, values = "sft", {**values, "max_seq_len": length}
        values |= {"use_lora": True, "lora_preset": "all", "lora_r": amount}
    else:
        stage, length, prompt = "grpo", 128, 64
        values = {"device": "cpu", "group_size": amount, "batch_size": 1, "mini_batch_size": amount}
        values |= {"max_new_tokens": 64, "max_prompt_length": 64, "rewards": "length_penalty", "ppo_epochs": 1}
    shape["max_seq_len"] = length
    values |= {"model": shape} if stage == "pretrain" else {}
    config = build_config(ModelSettings(**shape))
    settings = STAGES[stage].settings_class(output_dir="unused", **values)
    shown = round(measure(config).total / 1e6, 1) if axis == "parameters" else amount
    return (STAGES[stage].function, settings, probe("cpu", "auto"), Scene(config, None, length, prompt)), shown


def measure_point(axis, amount):
    """Returns what one point took: amount, seconds and bytes."""
    if axis == "corpus":
        return measure_corpus(amount)
    if axis == "runs":
        return measure_runs(amount)
    from llmlab.runs import rehearsal
    from llmlab.runs.plan import measure_step

    ends = []

    class Clock(rehearsal.DefaultFlowCallback):
        def on_step_end(self, *arguments, **keywords):
            ends.append(time.process_time())
            return super().on_step_end(*arguments, **keywords)

    rehearsal.DefaultFlowCallback, before = Clock, rehearsal.DefaultFlowCallback
    try:
        step, shown = make_step(axis, amount)
        peak, _ = measure_step(*step)
        seconds = ends[1] - ends[0]
        if seconds < SHORT:
            measure_step(*step)
            seconds = min(seconds, ends[3] - ends[2])
    finally:
        rehearsal.DefaultFlowCallback = before
    return shown, seconds, peak


def measure_corpus(megabytes):
    """Returns what it takes to tokenize and open a corpus of so many MB, with a tokenizer of 1024 entries."""
    from llmlab.data.sources import Tally, load_text
    from llmlab.data.text.encoder import TextEncoder
    from llmlab.data.text.packing import PackedRows, hold_out
    from llmlab.data.text.store import open_store
    from llmlab.data.tokenizer import learn_bpe
    from llmlab.settings.data import DataSettings, DataSource

    folder = Path(tempfile.mkdtemp(prefix="llmlab-scaling-"))
    try:
        stories = DataSource(name="demo/stories", subset="1MB")
        texts = [json.dumps({"text": text}) for text in load_text(stories).texts(Tally())]
        block = ("\n".join(texts) + "\n").encode()
        with (folder / "corpus.jsonl").open("wb") as file:
            while file.tell() < megabytes * 10**6:
                file.write(block)
        encoder = TextEncoder.of(learn_bpe([stories], 1024, folder / "tokenizer", show_progress=False))
        del texts, block
        done, highest = threading.Event(), [anonymous_bytes()]
        before = highest[0]

        def watch():
            while not done.wait(0.02):
                highest[0] = max(highest[0], anonymous_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        began = time.process_time()
        source = load_text(DataSource(name=str(folder / "corpus.jsonl")))
        store = open_store(source, encoder, DataSettings(cache_dir=str(folder / "cache"), num_proc=1))
        split = hold_out(source.name, store, 0.01, seed=0, length=512)
        rows = PackedRows("corpus", store, 512, split.train)
        for number in range(0, len(rows), 100):
            rows.row(number)
        seconds = time.process_time() - began
        done.set()
        watcher.join()
    finally:
        shutil.rmtree(folder)
    return megabytes, seconds, highest[0] - before


def anonymous_bytes():
    """Returns the memory that the process holds itself; pages of files, which the kernel takes back, are not in it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def measure_runs(count):
    """Returns what `llmlab runs list` takes in a folder of so many runs, each with 100 logged lines."""
    with tempfile.TemporaryDirectory() as folder:
        lines = [{"step": k, "seconds": float(k), "tokens": 1000 * k, "loss": 5 - k / 50} for k in range(1, 101)]
        for number in range(count):
            run = Path(folder, f"run{number:04}")
            run.mkdir()
            started = f"2026-01-01T{number // 60 % 24:02}:{number % 60:02}:00+00:00"
            record = {**RECORD, "started": started, "ended": started, "metrics": {"loss": 3.0, "eval_loss": 3.1}}
            record["parents"] = [str(Path(folder, f"run{number - 1:04}"))] if number % 3 else []
            (run / "llmlab.json").write_text(json.dumps(record))
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        command = [sys.executable, "-m", "llmlab", "runs", "list", folder]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return count, seconds, after.ru_maxrss * 1024


def measure_axis(axis, amounts):
    """Prints a line of JSON for each point of an axis, from a process each."""
    if axis not in ("corpus", "runs"):
        import torch

        from llmlab.runs.rehearsal import rehearse

        torch.set_num_threads(1)
        SMALL.update(vocab_size=64, d_model=32, d_ff=64, n_layers=1, n_heads=2, n_kv_heads=1)
        toy, _ = make_step("group" if axis == "group" else "rank" if axis == "rank" else "sequence", 16)
        SMALL.update(ORIGINAL)
        rehearse(*toy, follow=False)
    for amount in amounts:
        child = os.fork()
        if child == 0:
            if axis not in ("corpus", "runs"):
                rehearse(*toy, follow=False)  # a new process has none of the libraries' code in memory
                gc.collect()
                ctypes.CDLL("libc.so.6").malloc_trim(0)
            print(json.dumps(measure_point(axis, amount)), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{axis} {amount}: its process failed")


ORIGINAL = dict(SMALL)


def run_axis(axis, amounts):
    """Yields (amount, seconds, bytes) of each point, from a process that forks for each."""
    command = [sys.executable, "-W", "ignore", __file__, "--measure", json.dumps([axis, amounts])]
    environment = {**os.environ, **MALLOC, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if line.startswith("["):
                yield tuple(json.loads(line))


def slope(first, second, column):
    """Returns the growth of a column's logarithm over that of the amount."""
    return math.log(second[column] / first[column]) / math.log(second[0] / first[0])


def draw(found, path):
    """Draws time and memory of every axis over its amounts, on logarithmic scales."""
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(2, len(found), figsize=(1.9 * len(found), 3.8), squeeze=False, sharex="col")
    for column, (name, points) in enumerate(found.items()):
        amounts, *rows = zip(*points, strict=True)
        for row, values, word, steepest in zip((0, 1), rows, ("seconds", "MB"), AXES[name][2:], strict=True):
            values = [value / 1e6 for value in values] if row else values
            axes = all_axes[row][column]
            axes.loglog(amounts, values, "o-", markersize=3, linewidth=1)
            guide = [values[-1] * (amount / amounts[-1]) ** steepest for amount in amounts]
            axes.loglog(amounts, guide, ":", color="gray", linewidth=1)
            axes.set_ylim(min(values) / 3, max(values) * 3)
            axes.minorticks_off()
            axes.set_xticks([amounts[0], amounts[-1]], [f"{round(amount):,}" for amount in (amounts[0], amounts[-1])])
            axes.tick_params(labelsize=7)
            axes.set_ylabel(word, fontsize=7)
        all_axes[0][column].set_title(name, fontsize=9)
        all_axes[1][column].set_xlabel(AXES[name][1], fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=72)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(AXES), help="axes, separated by commas")
    parser.add_argument("--plot", help="write a plot of all axes here")
    parser.add_argument("--record", action="store_true", help="append the table to RESULTS.md")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure_axis(*json.loads(options.measure))
    lines = ["| axis | amount | seconds | slope | MB | slope |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    print("\n".join(lines), flush=True)
    found = {}
    for name in options.only.split(","):
        points = found[name] = []
        for point in run_axis(name, AXES[name][0]):
            slopes = [f"{slope(points[-1], point, k):.2f}" if points else "" for k in (1, 2)]
            points.append(point)
            row = [f"{name}, {AXES[name][1]}", f"{point[0]:,}", f"{point[1]:.3g}", slopes[0]]
            lines.append(f"| {' | '.join([*row, f'{point[2] / 1e6:,.0f}', slopes[1]])} |")
            print(lines[-1], flush=True)
    if options.plot:
        draw(found, options.plot)
    if options.record:
        with Path(__file__).with_name("RESULTS.md").open("a") as file:
            file.write(f"\n## scaling.py, {date.today()}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

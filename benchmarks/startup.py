"""Seconds from Enter: to the first step of `llmlab sft`, to the first word of `llmlab chat`, to the end of each help.

    python benchmarks/startup.py MODEL ROWS [--rounds 3] [--only sft,chat,help] [--record]

Every measurement is a process of its own, in interleaved rounds, from its start to what is waited for; medians.
What cannot be avoided is a Python that imports torch, Transformers, PEFT, Datasets, Accelerate and TRL's trainer, and
does nothing.  MODEL is a chat model's folder, the smaller the better; ROWS are conversations, rendered anew each time.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from llmlab.cli.app import COMMANDS

IMPORTS = {
    "sft": "import torch, transformers, peft, datasets, accelerate; from trl import SFTTrainer; print('step')",
    "chat": "from transformers import AutoModelForCausalLM, PreTrainedModel, TextIteratorStreamer; print('word')",
}
HELP = [[], *([name] for name in COMMANDS)]
PYTHON = [sys.executable, "-W", "ignore"]
NARROW = {**os.environ, "COLUMNS": "80"}


def seconds_until(wanted, command, folder, text=""):
    """Returns the seconds of a command that reads `text` until a line begins as wanted, or until its first letter."""
    began = time.perf_counter()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": folder, "env": NARROW}
    with subprocess.Popen(command, **pipes) as process:
        process.stdin.write(text)
        process.stdin.close()
        for line in iter(process.stdout.readline if wanted else lambda: process.stdout.read(1), ""):
            if line.lstrip().startswith(wanted):
                seconds = time.perf_counter() - began
                process.kill()
                return seconds
    sys.exit(f"{' '.join(command)}: it never printed '{wanted}'")


def sft_command(model, rows, folder):
    """Returns the command of a run of two steps, whose rows are in no cache."""
    words = [f"policy_checkpoint={model}", f"datasets={rows}", "max_steps=2", "log_every=1", "batch_size=2"]
    words += ["gradient_accumulation_steps=1", f"output_dir={folder}/run", f"cache_dir={folder}/cache"]
    return [*PYTHON, "-m", "llmlab", "sft", *words, "allow_truncated=1"]


def measure_pair(name, command):
    """Returns the seconds of llmlab's command and of the imports that it cannot avoid."""
    with tempfile.TemporaryDirectory() as folder:
        own = seconds_until("step 1" if name == "sft" else "", command(folder), folder, "Hi\n" * (name == "chat"))
        return own, seconds_until("", [*PYTHON, "-c", IMPORTS[name]], folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a chat model")
    parser.add_argument("rows", type=Path, help="file of conversations")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="sft,chat,help")
    parser.add_argument("--record", action="store_true", help="append the tables to RESULTS.md")
    options = parser.parse_args()
    only, model, rows = options.only.split(","), options.model.resolve(), options.rows.resolve()
    commands = {
        "sft": lambda folder: sft_command(model, rows, folder),
        "chat": lambda folder: [*PYTHON, "-m", "llmlab", "chat", str(model), "--max-new-tokens", "8"],
    }
    lines = ["| from Enter to | llmlab, s | imports alone, s | ratio |", "| --- | ---: | ---: | ---: |"]
    words = {"sft": "the first step of `llmlab sft`", "chat": "the first word of `llmlab chat`"}
    for name, command in commands.items():
        if name in only:
            pairs = [measure_pair(name, command) for _ in range(options.rounds)]
            own, alone = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            lines.append(f"| {words[name]} | {own:.2f} | {alone:.2f} | {ratio:.2f} |")
    if "help" in only:
        times = {" ".join(["llmlab", *command, "--help"]): [] for command in HELP}
        for _ in range(options.rounds):
            for text, seconds in times.items():
                began = time.perf_counter()
                subprocess.run([*PYTHON, "-m", *text.split()], check=True, stdout=subprocess.DEVNULL, env=NARROW)
                seconds.append(time.perf_counter() - began)
        lines += ["", "| help | s |", "| --- | ---: |"]
        lines += [f"| `{text}` | {statistics.median(seconds):.2f} |" for text, seconds in times.items()]
    print("\n".join(lines))
    if options.record:
        with Path(__file__).with_name("RESULTS.md").open("a") as file:
            file.write(f"\n## startup.py, {date.today()}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

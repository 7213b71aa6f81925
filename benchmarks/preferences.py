"""Preference optimization of a real chat model on real pairs: does it come to prefer held-out better answers?

    python benchmarks/preferences.py MODEL PAIRS dpo [--rows 200] [--steps 50] [--max-length 256] [--record]
    python benchmarks/preferences.py MODEL PAIRS reward [--rows 300] [--steps 60] [--record]

A quarter of the rows is held out.  `dpo` trains LoRA adapters and reports win rate and margin before and after;
`reward` trains a reward model and reports the share of held-out pairs that it ranks right, with its standard error.
"""

import argparse
import math
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path


def run(options, folder):
    from llmlab.runs.record import read_metrics, read_record
    from llmlab.settings.preference import DPOSettings, RewardModelSettings
    from llmlab.training.preference.dpo import dpo
    from llmlab.training.preference.reward import reward

    shared = {
        "policy_checkpoint": str(options.model),
        "datasets": [{"name": str(options.pairs)}],
        "validation_fraction": 0.25,
        "max_samples": options.rows - options.rows // 4,
        "eval_batches": options.rows // 8,
        "chat_template": "chatml",
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "run"),
        "max_steps": options.steps,
        "batch_size": 4,
        "mini_batch_size": 2,
        "max_length": options.max_length,
        "max_prompt_length": options.max_length // 2,
        "allow_truncated": 0.2,
        "eval_every": max(options.steps // 3, 1),
        "lora_preset": "all",
        "lora_dropout": 0.0,
    }
    if options.stage == "dpo":
        result = dpo(DPOSettings(**shared, beta=0.1, learning_rate=1e-4))
    else:
        result = reward(RewardModelSettings(**shared, learning_rate=5e-4))
    return [line for line in read_metrics(result.folder) if "eval_loss" in line], read_record(result.folder)


def report(options, lines, record):
    """Returns the results as Markdown."""
    held = record["data"]["validation_rows"]
    title = "DPO" if options.stage == "dpo" else "Reward model"
    table = [
        f"## {title} on {options.pairs.name}, {date.today()}",
        "",
        f"{options.model.name}, LoRA on all projections, {options.steps} steps of 4 pairs of up to "
        f"{options.max_length} tokens, {held} pairs held out, {record['hardware']['dtype']}, "
        f"{lines[-1]['seconds'] / 60:.1f} minutes; trl {version('trl')}. "
        f"`python benchmarks/preferences.py MODEL PAIRS {options.stage} --record`",
        "",
        "| step | loss | win rate | margin |" + (" kl |" if options.stage == "dpo" else ""),
        "| --- | --- | --- | --- |" + (" --- |" if options.stage == "dpo" else ""),
    ]
    names = ("eval_loss", "eval_win_rate", "eval_margin", *(("eval_kl",) if options.stage == "dpo" else ()))
    for line in lines:
        table.append(f"| {line['step']} | " + " | ".join(f"{line[name]:.3f}" for name in names) + " |")
    rate = lines[-1]["eval_win_rate"]
    error = math.sqrt(rate * (1 - rate) / held)
    table += ["", f"{rate:.3f} +- {error:.3f} of the held-out pairs are ranked right; chance is 0.5."]
    return "\n".join(table) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("stage", choices=["dpo", "reward"])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/RESULTS.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = report(options, *run(options, Path(folder)))
    print(table)
    if options.record:
        path = Path(__file__).with_name("RESULTS.md")
        path.write_text(path.read_text() + "\n" + table)


if __name__ == "__main__":
    main()

"""PPO with a critic of its own, PPO with a shared one, and plain TRL GRPO on a task whose optimum is known.

    python benchmarks/ppo_learning.py [--samples 2560] [--seeds 5] [--plot ppo_learning.png] [--record]

A random decoder of two layers is rewarded with the share of one token in what it says: 1 is the optimum, and nothing
is downloaded.  All three see equally many completions, with the same rate, passes, minibatches and KL weight; PPO has
one completion of each prompt, GRPO groups of eight.  A table of mean, worst and best seed, and a plot where matplotlib
is installed.
"""

import argparse
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

WORDS, PAD, EOS, TARGET, LENGTH = 14, 14, 15, 7, 8
ROLLOUT, GROUP, PASSES, MINIBATCH = 64, 8, 2, 32
SHARED = {
    "per_device_train_batch_size": MINIBATCH,
    "generation_batch_size": ROLLOUT,
    "num_iterations": PASSES,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant",
    "max_completion_length": LENGTH,
    "beta": 0.01,
    "disable_dropout": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}
CONTENDERS = ("PPO, separate critic", "PPO, shared critic", "GRPO (TRL)")


def make_model(folder, seed):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {**{f"w{i}": i for i in range(WORDS)}, "<pad>": PAD, "<eos>": EOS}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"vocab_size": len(words), "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**shape, **special)).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder), tokenizer  # from disk, where TRL looks for the reference


def target_share(completion_ids, **columns):
    return [sum(token == TARGET for token in ids) / max(len(ids), 1) for ids in completion_ids]


def learn(contender, seed, samples, folder):
    """Returns the mean reward of each rollout."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from llmlab.settings.rl import PPOSettings
    from llmlab.training.online.ppo import PPOConfig, PPOTrainer

    model, tokenizer = make_model(folder / "model", seed)
    prompts = [{"prompt": f"w{i % WORDS} w{(i * 5 + 1) % WORDS}"} for i in range(samples)]
    updates = samples // ROLLOUT * PASSES * (ROLLOUT // MINIBATCH)
    common = {**SHARED, "output_dir": str(folder / "run"), "max_steps": updates, "seed": seed}
    if contender.startswith("GRPO"):
        kind, args, own = GRPOTrainer, GRPOConfig(**common, num_generations=GROUP), {}
    else:
        value_model = "shared" if "shared" in contender else "separate"
        kind, args = PPOTrainer, PPOConfig(**common, value_model=value_model, vf_coef=0.5)
        own = {"settings": PPOSettings(policy_checkpoint=str(folder / "model"), rewards=["length"])}  # its optimizer
    trainer = kind(
        model=model,
        args=args,
        reward_funcs=target_share,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(prompts),
        **own,
    )
    trainer.train()
    return [line["reward"] for line in trainer.state.log_history if line.get("reward") is not None]


def report(curves, options, minutes):
    lines = [
        f"## PPO and GRPO at equal samples, {date.today()}",
        "",
        f"Reward: share of one token of 16 in completions of up to {LENGTH}, optimum 1; a random decoder of 2 layers, "
        f"32 wide; rollouts of {ROLLOUT}, {PASSES} passes in minibatches of {MINIBATCH}, lr "
        f"{SHARED['learning_rate']:g}, KL weight {SHARED['beta']:g}; {options.seeds} seeds (mean, worst to best); "
        f"{minutes:.1f} minutes.",
        "",
        f"| samples | {' | '.join(CONTENDERS)} |",
        f"|{' --- |' * (len(CONTENDERS) + 1)}",
    ]
    rollouts = options.samples // ROLLOUT
    for i in sorted({*range(0, rollouts, max(rollouts // 8, 1)), rollouts - 1}):
        cells = []
        for contender in CONTENDERS:
            values = [curve[i] for curve in curves[contender]]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {(i + 1) * ROLLOUT:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(curves, path):
    try:
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    pyplot.figure(figsize=(7, 4), layout="constrained")
    for contender, runs in curves.items():
        samples = [(i + 1) * ROLLOUT for i in range(len(runs[0]))]
        steps = list(zip(*runs, strict=True))
        (line,) = pyplot.plot(samples, [statistics.mean(values) for values in steps], label=contender)
        pyplot.fill_between(
            samples, [min(v) for v in steps], [max(v) for v in steps], alpha=0.2, color=line.get_color()
        )
    pyplot.axhline(1, color="grey", linewidth=0.5)
    pyplot.xlabel("completions sampled")
    pyplot.ylabel("mean reward of a rollout")
    seeds = len(next(iter(curves.values())))
    pyplot.legend(title=f"mean of {seeds} seeds, and from worst to best")
    pyplot.savefig(path, dpi=150)
    print(f"plot: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2560, help="completions of each run, whole rollouts")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--plot", type=Path, default=Path("ppo_learning.png"))
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    options = parser.parse_args()
    from llmlab.runs.progress import quiet_libraries

    began, curves = time.monotonic(), {contender: [] for contender in CONTENDERS}
    for seed in range(options.seeds):
        for contender in CONTENDERS:
            with tempfile.TemporaryDirectory() as folder, quiet_libraries():
                curves[contender].append(learn(contender, seed, options.samples, Path(folder)))
            print(f"seed {seed}, {contender}: {curves[contender][-1][-1]:.3f}", flush=True)
    text = report(curves, options, (time.monotonic() - began) / 60)
    print(text)
    plot(curves, options.plot)
    if options.record:
        path = Path(__file__).with_name("RESULTS.md")
        path.write_text(f"{path.read_text() if path.exists() else '# Results'}\n{text}")


if __name__ == "__main__":
    main()

"""A rollout and its updates through `llmlab grpo`, `llmlab ppo` and `trl.GRPOTrainer`, at equal settings.

    python benchmarks/rl_step.py MODEL QUESTIONS.jsonl [--rollouts 6] [--max-new-tokens 64] [--lora] [--record]

All run their own real loops in one process and take turns rollout by rollout; each turn begins at the same random
state. Generation is until completions are tokens, scoring until they have log-probabilities, rewards and advantages,
and updates are the passes over them. The first rollout is a warm-up. PPO has one completion of each prompt, so as many
prompts as GRPO has completions; no other maintained PPO on this stack exists, so it is compared with TRL's GRPO too.
Peak memory is that of a process of its own for each, as in `train_step.py`.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import date
from importlib.metadata import version
from pathlib import Path

from train_step import take_turns

CONTENDERS = {
    "trl": "trl.GRPOTrainer",
    "grpo": "llmlab grpo",
    "ppo-shared": "llmlab ppo, shared critic",
    "ppo-separate": "llmlab ppo, separate critic",
}
PARTS = {"_generate": "generation", "_generate_and_score_completions": "scoring"}
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def digits(completions, **columns):
    """The share of digits in the answer: cheap, and different from completion to completion."""
    texts = [turns[-1]["content"] for turns in completions]
    return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in texts]


def make(name, callbacks, folder, options):
    """Returns a contender's trainer."""
    from datasets import Dataset

    rows = [json.loads(line)["question"] for line in options.questions.read_text().splitlines()]
    repeats = options.group if name.startswith("ppo") else 1  # as many completions, of as many rows
    rows = rows[: options.prompts * repeats * options.rollouts]
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": row}]} for row in rows])
    trainer = (_make_trl if name == "trl" else _make_ours)(name, data, callbacks, Path(folder) / name, options)
    trainer.parts = defaultdict(list)
    for method, part in PARTS.items():
        setattr(trainer, method, _timed(getattr(trainer, method), trainer.parts[part]))
    return trainer


def _timed(method, seconds):
    def call(*args, **kwargs):
        began = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - began)

    return call


def _make_trl(name, data, callbacks, folder, options):
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from llmlab.hardware import probe
    from llmlab.model import load_model

    machine = probe()
    dtype = machine.torch_dtype if options.lora else None  # weights in full training are fp32, as llmlab's
    trainer = GRPOTrainer(
        model=load_model(options.model, dtype=dtype),
        reward_funcs=digits,
        args=GRPOConfig(
            output_dir=str(folder),
            max_steps=options.rollouts * options.updates,
            generation_batch_size=options.prompts * options.group,
            num_generations=options.group,
            per_device_train_batch_size=options.micro,
            gradient_accumulation_steps=options.accumulation,
            num_iterations=options.passes,
            max_completion_length=options.max_new_tokens,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            beta=options.beta,
            bf16=machine.dtype == "bf16",
            use_cpu=machine.device == "cpu",
            gradient_checkpointing=False,
            optim="adamw_torch_fused",
            logging_steps=1,
            seed=42,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=_adapters() if options.lora else None,
        callbacks=callbacks,
    )
    return trainer


def _adapters():
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0, target_modules=NAMES)


def _make_ours(name, data, callbacks, folder, options):
    from trl import GRPOConfig

    from llmlab.hardware import probe
    from llmlab.runs.arguments import build_arguments
    from llmlab.runs.policy import load_policy, load_reference
    from llmlab.settings.rl import GRPOSettings, PPOSettings
    from llmlab.training.online.grpo import LLMLabGRPOTrainer
    from llmlab.training.online.ppo import PPOConfig, PPOTrainer

    machine, group = probe(), name == "grpo"
    own = {"group_size": options.group} if group else {"value_model": name.removeprefix("ppo-"), "temperature": 1.0}
    settings = (GRPOSettings if group else PPOSettings)(
        policy_checkpoint=str(options.model),
        rewards=[{"name": "length"}],  # not read here
        output_dir=str(folder),
        batch_size=options.prompts * (1 if group else options.group),
        mini_batch_size=options.micro,
        gradient_accumulation_steps=options.accumulation,
        ppo_epochs=options.passes,
        max_new_tokens=options.max_new_tokens,
        max_steps=options.rollouts * options.updates,
        learning_rate=1e-5,
        scheduler="none",
        warmup_steps=0,
        init_kl_coef=options.beta,
        log_every=1,
        use_lora=options.lora,
        lora_preset="all",
        lora_dropout=0.0,
        **own,
    )
    policy = load_policy(settings.policy_checkpoint, settings, machine, chat_template=None, attach=False)
    reference = load_reference(settings, policy)[0] if options.beta else None
    return (LLMLabGRPOTrainer if group else PPOTrainer)(
        settings=settings,
        model=policy.model,
        args=build_arguments(
            GRPOConfig if group else PPOConfig,
            settings,
            machine,
            generation_batch_size=options.prompts * options.group,
            save_strategy="no",
        ),
        train_dataset=data,
        processing_class=policy.tokenizer,
        callbacks=callbacks,
        reference=reference,
        reward_funcs=digits,
        peft_config=policy.new_adapters(settings),
    )


def seconds_of(options):
    """Returns the seconds of each part of each rollout by contender."""
    from transformers import TrainerCallback, set_seed

    class Seed(TrainerCallback):
        """Begins each rollout at a random state of its own, the same one for all contenders."""

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step % options.updates == 0:
                set_seed(state.global_step)

    trainers = {}

    def start(name, callbacks, folder):
        trainers[name] = make(name, [*callbacks, Seed()], folder, options)
        return trainers[name]

    whole = take_turns(options.contenders, start, every=options.updates)
    parts = {}
    for name, trainer in trainers.items():
        generation, scored = (trainer.parts[part] for part in PARTS.values())
        parts[name] = [
            {"whole": total, "generation": first, "scoring": both - first, "updates": total - both}
            for total, first, both in zip(whole[name], generation, scored, strict=True)
        ]
        logs = [line for line in trainer.state.log_history if "reward" in line]
        parts[name][0]["tokens"] = statistics.mean(line["completions/mean_length"] for line in logs)
    return parts


def peak_memory(name, options):
    """Returns the bytes that a contender's training takes at its peak, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        import torch  # noqa: F401
        import transformers  # noqa: F401
        import trl  # noqa: F401

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        make(name, [], folder, options).train()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def _memory_in_child(name, options):
    words = [*sys.argv[1:], "--rollouts", "1", "--memory-of", name]
    output = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def report(options, parts, memory):
    """Returns the results as Markdown."""
    from llmlab.hardware import probe

    size = f"{options.prompts} prompts x {options.group} completions of up to {options.max_new_tokens} tokens"
    passes = f"{options.passes} pass{'es' if options.passes > 1 else ''} in steps of {options.accumulation} x"
    lines = [
        f"## GRPO and PPO step, {date.today()}",
        "",
        f"{options.model.name}, {'LoRA on all projections (r 8)' if options.lora else 'all weights'}, {size}, "
        f"{passes} {options.micro}, KL weight {options.beta:g}, {probe().dtype}; trl {version('trl')}; median of "
        f"{options.rollouts - 1} turns. `python benchmarks/rl_step.py MODEL QUESTIONS --record`",
        "",
        "| trainer | seconds a rollout | generation | scoring | updates | TRL's seconds over its | memory, GB "
        "| tokens of a completion |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, turns in parts.items():
        turns = turns[1:]
        cells = [
            format(statistics.median(turn[part] for turn in turns), ".2f")
            for part in ("whole", "generation", "scoring", "updates")
        ]
        ratios = [theirs["whole"] / ours["whole"] for theirs, ours in zip(parts["trl"][1:], turns, strict=True)]
        held = f"{memory[name] / 1e9:.2f}" if name in memory else "-"
        lines.append(
            f"| {CONTENDERS[name]} | {' | '.join(cells)} | {statistics.median(ratios):.2f} | {held} "
            f"| {parts[name][0]['tokens']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--rollouts", type=int, default=6, help="of each; the first is warm-up")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--micro", type=int, default=8, help="completions of a forward pass")
    parser.add_argument("--accumulation", type=int, default=2, help="forward passes of an optimizer step")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--beta", type=float, default=0.05)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--no-memory", action="store_true", help="do not measure it, which trains each once more")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.updates = options.passes * options.prompts * options.group // (options.micro * options.accumulation)
    if options.memory_of:
        print(json.dumps(peak_memory(options.memory_of, options)))
        return
    from llmlab.runs.progress import quiet_libraries

    with quiet_libraries():
        parts = seconds_of(options)
    memory = {} if options.no_memory else {name: _memory_in_child(name, options) for name in options.contenders}
    table = report(options, parts, memory)
    print(table)
    if options.record:
        path = Path(__file__).with_name("RESULTS.md")
        path.write_text(path.read_text() + "\n" + table)


if __name__ == "__main__":
    main()

"""A fine-tuning step of llmlab against TRL's trainers and a bare PyTorch loop: time, peak memory and losses.

    python benchmarks/finetune_step.py MODEL ROWS.jsonl sft [--full] [--steps 8] [--record]
    python benchmarks/finetune_step.py MODEL PAIRS dpo|orpo|reward [--full] [--max-length 256] [--record]

All train on the same batches from the same weights, LoRA adapters on all projections or with `--full` everything,
with fused AdamW and the arithmetic that `dtype: auto` picks.  They take turns step by step in one process
(`train_step.py`); the bare loop is Transformers' model with full logits and its own loss.  TRL's trainers run as they
come, with gradient checkpointing, and without; llmlab's without, as `auto` has it where the step fits, and with.
Peak memory is that of three steps in a process of its own.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

from train_step import take_turns

CONTENDERS = {
    "llmlab": "llmlab {}",
    "llmlab-checkpointing": "the same with gradient checkpointing",
    "bare": "bare PyTorch loop, full logits",
    "trl": "TRL's trainer",
    "trl-plain": "the same without gradient checkpointing",
}


def stage_of(name):
    """Returns a stage's settings, llmlab's and TRL's trainer, TRL's configuration, and its maker of rows."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import trl
    from trl.experimental.orpo import ORPOConfig

    from llmlab.data.chat.makers import InstructionEncoder, PreferenceEncoder
    from llmlab.settings.preference import DPOSettings, ORPOSettings, RewardModelSettings
    from llmlab.settings.training import SFTSettings
    from llmlab.training.preference.dpo import LLMLabDPOTrainer
    from llmlab.training.preference.orpo import LLMLabORPOTrainer, ORPOTrainer
    from llmlab.training.preference.reward import LLMLabRewardTrainer
    from llmlab.training.sft import LLMLabSFTTrainer

    return {
        "sft": (SFTSettings, LLMLabSFTTrainer, trl.SFTTrainer, trl.SFTConfig, InstructionEncoder),
        "dpo": (DPOSettings, LLMLabDPOTrainer, trl.DPOTrainer, trl.DPOConfig, PreferenceEncoder),
        "orpo": (ORPOSettings, LLMLabORPOTrainer, ORPOTrainer, ORPOConfig, PreferenceEncoder),
        "reward": (RewardModelSettings, LLMLabRewardTrainer, trl.RewardTrainer, trl.RewardConfig, PreferenceEncoder),
    }[name]


def make_trainer(name, options, callbacks, folder):
    """Returns a contender's trainer, and lists its losses in `options.losses`."""
    import torch
    from transformers import PrinterCallback, TrainerCallback

    from llmlab.data.chat.rows import build_rows
    from llmlab.hardware import probe
    from llmlab.runs._trl import TokenizedORPOPairs
    from llmlab.runs.arguments import build_arguments
    from llmlab.runs.policy import choose_kernels, load_policy, load_reference
    from llmlab.training.preference.reward import join_prompts

    kind, ours, theirs, config, encoder = stage_of(options.stage)
    machine, is_sft = probe(), options.stage == "sft"
    length = {"max_seq_len": options.max_length}
    if not is_sft:
        length = {"max_length": options.max_length, "max_prompt_length": options.max_length // 2}
    settings = kind(
        policy_checkpoint=str(options.model),
        datasets=[{"name": str(options.data)}],
        validation_fraction=0,
        chat_template="chatml",
        output_dir=folder,
        cache_dir=f"{folder}/cache",
        max_steps=options.steps,
        warmup_steps=1,
        batch_size=options.batch,
        gradient_accumulation_steps=1,
        use_lora=not options.full,
        log_every=1,
        trainer_args={"train_sampling_strategy": "sequential"},
        **({} if options.full else {"lora_preset": "all", "lora_dropout": 0.0}),
        **(length if is_sft else length | {"mini_batch_size": options.batch}),
    )
    task = {"task": "SEQ_CLS"} if options.stage == "reward" else {"attach": options.stage != "dpo"}
    torch.manual_seed(0)  # of adapters and of a reward model's head
    policy = load_policy(settings.policy_checkpoint, settings, machine, chat_template="chatml", **task)
    encode, count = encoder(policy.tokenizer, stops=policy.stops, **length), options.steps * options.batch
    rows = build_rows(settings, encode, seed=0, allow_truncated=1.0, max_samples=count).train
    rows = join_prompts(rows) if options.stage == "reward" else rows
    losses = options.losses[name] = []
    if name == "bare":
        return bare_loop(policy.model, rows, settings, machine, callbacks, losses)

    class Losses(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    arguments = build_arguments(
        config,
        settings,
        machine,
        save_strategy="no",
        prediction_loss_only=True,
        gradient_checkpointing=name in ("trl", "llmlab-checkpointing"),
        **({"remove_unused_columns": False} if options.stage == "orpo" else {}),
    )
    extra, reference = {"settings": settings}, load_reference(settings, policy)[0] if options.stage == "dpo" else None
    if name.startswith("llmlab"):
        for model in filter(None, (policy.model, reference)):
            choose_kernels(model, settings, machine.device == "cpu")
    else:
        base = (TokenizedORPOPairs,) if options.stage == "orpo" else ()
        ours = type("Plain", (*base, theirs), {"_prepare_dataset": lambda self, dataset, *a, **k: dataset})
        extra, arguments.optim = {}, "adamw_torch_fused"
    if options.stage == "dpo":
        extra |= {"ref_model": reference, "peft_config": policy.new_adapters(settings)}
    torch.manual_seed(0)
    trainer = ours(
        model=policy.model,
        args=arguments,
        train_dataset=rows,
        processing_class=policy.tokenizer,
        callbacks=[Losses(), *callbacks],
        **extra,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def bare_loop(model, rows, settings, machine, callbacks, losses):
    """Returns what trains a model on instruction rows with nothing but PyTorch."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def train():
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, fused=True)
        args, state = SimpleNamespace(max_steps=settings.max_steps), SimpleNamespace(global_step=0)
        model.train()
        for step in range(settings.max_steps):
            for callback in callbacks:
                callback.on_step_begin(args, state, None)
            batch = rows[step * settings.batch_size : (step + 1) * settings.batch_size]
            pad = lambda name, value: pad_sequence(list(map(torch.tensor, batch[name])), True, value)  # noqa: B023, E731
            ids, labels = pad("input_ids", 0), pad("labels", -100)
            mask = pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in batch["input_ids"]], True, 0)
            with torch.autocast(machine.device, machine.torch_dtype, enabled=machine.dtype != "fp32"):
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            state.global_step += 1
            for callback in callbacks:
                callback.on_step_end(args, state, None)

    return SimpleNamespace(train=train)


def peak_memory(name, options):
    """Returns the bytes that three steps of a contender take at their peak, in this process."""
    import trl  # noqa: F401

    stage_of(options.stage)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options.steps = 3
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(name, options, [], folder).train()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def _memory_in_child(name):
    output = subprocess.run([sys.executable, *sys.argv, "--memory-of", name], check=True, stdout=subprocess.PIPE)
    memory = json.loads(output.stdout.splitlines()[-1])
    print(f"{name}: {memory / 1e9:.2f} GB", file=sys.stderr)
    return memory


def report(options, seconds, memory):
    """Returns the results as Markdown."""
    weights = "all weights" if options.full else "LoRA on all projections"
    unit = "rows" if options.stage == "sft" else "pairs"
    lines = [
        f"## Fine-tuning step: {options.stage}, {weights}, {date.today()}",
        "",
        f"{options.model.name}, {options.batch} {unit} of {options.data.name} a step, of up to {options.max_length} "
        f"tokens; trl {version('trl')}; median of {options.steps - 2} turns. `python benchmarks/finetune_step.py "
        f"MODEL DATA {options.stage}{' --full' * options.full} --record`",
        "",
        "| trainer | seconds a step | llmlab's speed over it | peak memory, GB | llmlab's over its "
        "| first loss off llmlab's | losses off, at most |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in seconds:
        ratio = statistics.median(t / o for t, o in zip(seconds[name][2:], seconds["llmlab"][2:], strict=True))
        gaps = [abs(t - o) for t, o in zip(options.losses[name], options.losses["llmlab"], strict=True)]
        cells = ("", "") if not memory else (f"{memory[name] / 1e9:.2f}", f"{memory['llmlab'] / memory[name]:.2f}")
        lines.append(
            f"| {CONTENDERS[name].format(options.stage)} | {statistics.median(seconds[name][2:]):.2f} | {ratio:.2f} "
            f"| {cells[0]} | {cells[1]} | {gaps[0]:.1e} | {max(gaps):.1e} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("stage", choices=["sft", "dpo", "orpo", "reward"])
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA adapters")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="steps of each; the first two are warm-up")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--only", choices=["time", "memory"], help="measure one of both")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/RESULTS.md")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.losses = {}
    if options.memory_of:
        print(json.dumps(peak_memory(options.memory_of, options)))
        return
    names = options.contenders or [name for name in CONTENDERS if name != "bare" or options.stage == "sft"]
    memory = {} if options.only == "time" else {name: _memory_in_child(name) for name in names}
    if options.only == "memory":
        return
    seconds = take_turns(
        names, lambda name, callbacks, folder: make_trainer(name, options, callbacks, tempfile.mkdtemp(dir=folder))
    )
    table = report(options, seconds, memory)
    print(table)
    if options.record:
        path = Path(__file__).with_name("RESULTS.md")
        path.write_text(path.read_text() + "\n" + table)


if __name__ == "__main__":
    main()

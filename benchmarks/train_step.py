"""A pretraining step of llmlab against Transformers' Trainer and TRL's SFTTrainer with Llama, at SmolLM2-135M's shape.

    python benchmarks/train_step.py [--record] [--steps 8] [--batch 4] [--sequence 512]

All trainers run their own real loops in one process, on the same rows, and take turns step by step, so that changes
of the machine's speed meet all of them; what is reported is the median of the ratios, turn by turn.  Peak memory is
measured in a process of its own for each: the highest resident size, less what it was before the model was made.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

SHAPE = {"vocab": 49152, "hidden": 576, "inner": 1536, "layers": 30, "heads": 9, "kv_heads": 3}
CONTENDERS = {
    "llmlab": "llmlab pretrain, compiled",
    "llmlab-eager": "llmlab pretrain, compile off",
    "trainer": "transformers.Trainer, LlamaForCausalLM",
    "sft": "trl.SFTTrainer, LlamaForCausalLM",
    "sft-plain": "the same without gradient checkpointing",
}
PEERS = ("trainer", "sft", "sft-plain")


def make_trainer(name, rows, options, callbacks, folder):
    """Returns a contender's trainer on these rows, each a dictionary of `input_ids` and `labels`."""
    from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed

    from llmlab.hardware import probe

    set_seed(0)
    machine = probe()
    shared = {
        "output_dir": folder,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "bf16": machine.dtype == "bf16",
        "use_cpu": machine.device == "cpu",
        "optim": "adamw_torch_fused",
        "learning_rate": 3e-4,
        "weight_decay": 0.1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1000,
    }
    if name.startswith("llmlab"):
        trainer = _llmlab_trainer(name, rows, options, callbacks, folder)
    else:
        config = LlamaConfig(
            vocab_size=SHAPE["vocab"],
            hidden_size=SHAPE["hidden"],
            intermediate_size=SHAPE["inner"],
            num_hidden_layers=SHAPE["layers"],
            num_attention_heads=SHAPE["heads"],
            num_key_value_heads=SHAPE["kv_heads"],
            tie_word_embeddings=True,
            max_position_embeddings=options.sequence,
        )
        model = LlamaForCausalLM(config)
        if name == "trainer":
            arguments = TrainingArguments(**shared)
            trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)
        else:
            trainer = _sft_trainer(name, model, rows, shared, options, callbacks)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _llmlab_trainer(name, rows, options, callbacks, folder):
    from transformers import default_data_collator

    from llmlab.hardware import probe
    from llmlab.model import build_config, new_model
    from llmlab.settings.pretrain import PretrainSettings
    from llmlab.training.compile import compile_layers
    from llmlab.training.pretrain import PretrainTrainer, trainer_arguments

    settings = PretrainSettings(
        model={
            "vocab_size": SHAPE["vocab"],
            "d_model": SHAPE["hidden"],
            "d_ff": SHAPE["inner"],
            "n_layers": SHAPE["layers"],
            "n_heads": SHAPE["heads"],
            "n_kv_heads": SHAPE["kv_heads"],
            "max_seq_len": options.sequence,
        },
        max_steps=options.steps,
        batch_size=options.batch,
        gradient_accumulation_steps=1,
        warmup_steps=0,
        scheduler="linear",
        output_dir=folder,
        log_every=1000,
        trainer_args={"save_strategy": "no", "logging_first_step": False},
    )
    trainer = PretrainTrainer(
        settings,
        model=new_model(build_config(settings.model)),
        args=trainer_arguments(settings, probe(), SimpleNamespace(validation=None)),
        train_dataset=rows,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )
    if name == "llmlab":
        compile_layers(trainer.model)
    return trainer


def _sft_trainer(name, model, rows, shared, options, callbacks):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "<pad>": 2}, unk_token="<unk>")),
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    checkpointing = {} if name == "sft" else {"gradient_checkpointing": False}
    return SFTTrainer(
        model=model,
        args=SFTConfig(**shared, **checkpointing, max_length=options.sequence),
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows]),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def make_rows(options):
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (options.steps * options.batch, options.sequence)
    tokens = torch.randint(3, SHAPE["vocab"], shape, generator=generator)
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens]


def take_turns(options):
    """Runs all trainers step by step in turn; returns the seconds of each step by contender."""
    from transformers import TrainerCallback

    names = list(CONTENDERS)
    turns = {name: threading.Semaphore(0) for name in names}
    seconds = {name: [] for name in names}

    class Turn(TrainerCallback):
        def __init__(self, name):
            self.name = name

        def on_step_begin(self, *args, **kwargs):
            turns[self.name].acquire()
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seconds[self.name].append(time.perf_counter() - self.began)
            turns[names[(names.index(self.name) + 1) % len(names)]].release()

    rows = make_rows(options)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make_trainer(name, rows, options, [Turn(name)], folder) for name in names}
        threads = [threading.Thread(target=trainer.train, name=name) for name, trainer in trainers.items()]
        for thread in threads:
            thread.start()
        turns[names[0]].release()
        for thread in threads:
            thread.join()
    return seconds


def peak_memory(name, options):
    """Returns the bytes that a contender's training takes at its peak, in this process."""
    rows = make_rows(options)
    with tempfile.TemporaryDirectory() as folder:
        import torch  # noqa: F401
        import transformers  # noqa: F401
        import trl  # noqa: F401

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        make_trainer(name, rows, options, [], folder).train()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="steps of each; the first two are warm-up")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(peak_memory(options.memory_of, options)))
        return

    memory = {}
    for name in CONTENDERS:
        words = [sys.executable, __file__, "--memory-of", name, "--steps", "3", "--batch", str(options.batch)]
        words += ["--sequence", str(options.sequence)]
        output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        memory[name] = json.loads(output.splitlines()[-1])
        print(f"{name}: {memory[name] / 1e9:.2f} GB", file=sys.stderr)
    seconds = take_turns(options)
    print(report(options, seconds, memory))
    if options.record:
        path = Path(__file__).with_name("RESULTS.md")
        path.write_text(
            (path.read_text() if path.exists() else "# Results\n") + "\n" + report(options, seconds, memory)
        )


def report(options, seconds, memory):
    """Returns the results as Markdown."""
    tokens = options.batch * options.sequence
    from llmlab.hardware import probe

    machine = probe()
    lines = [
        f"## Training step, {date.today()}",
        "",
        f"SmolLM2-135M's shape, {options.batch} x {options.sequence} tokens, {machine.dtype}, {machine.name}, "
        f"{platform.machine()}, torch {version('torch')}, transformers {version('transformers')}, "
        f"trl {version('trl')}; median of {options.steps - 2} turns. `python benchmarks/train_step.py --record`",
        "",
        "| trainer | tokens/s | speed of llmlab over it | peak memory, GB | llmlab's over its | first step, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    ours = seconds["llmlab"][2:]
    for name, title in CONTENDERS.items():
        theirs = seconds[name][2:]
        ratio = statistics.median(their / our for their, our in zip(theirs, ours, strict=True))
        lines.append(
            f"| {title} | {tokens / statistics.median(theirs):.0f} | {ratio:.2f} | {memory[name] / 1e9:.2f} "
            f"| {memory['llmlab'] / memory[name]:.2f} | {seconds[name][0]:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""A pretraining step of llmlab against Transformers' Trainer and TRL's SFTTrainer with Llama, at SmolLM2-135M's shape.

    python benchmarks/train_step.py [--record] [--steps 8] [--batch 4] [--sequence 512] [--layers 30]

All trainers run their own real loops in one process, on the same rows, and take turns step by step, so that changes
of the machine's speed meet all of them; what is reported is the median of the ratios, turn by turn.  Compiling starts
from an empty cache, and its time is in the first step.  Peak memory is measured in a process of its own for each: the
highest resident size, less what it was once the libraries were imported and the model was not yet made.
"""

import argparse
import json
import os
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

SHAPE = {"vocab": 49152, "hidden": 576, "inner": 1536, "heads": 9, "kv_heads": 3}
CONTENDERS = {
    "llmlab": "llmlab pretrain, compiled",
    "llmlab-eager": "llmlab pretrain, compile off",
    "trainer": "transformers.Trainer, LlamaForCausalLM",
    "sft": "trl.SFTTrainer, LlamaForCausalLM",
    "sft-plain": "the same without gradient checkpointing",
    "trainer-compiled": "transformers.Trainer, torch_compile=True",  # its warm-up takes minutes: only when asked for
}
USUAL = [name for name in CONTENDERS if name != "trainer-compiled"]


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
            num_hidden_layers=options.layers,
            num_attention_heads=SHAPE["heads"],
            num_key_value_heads=SHAPE["kv_heads"],
            tie_word_embeddings=True,
            max_position_embeddings=options.sequence,
        )
        model = LlamaForCausalLM(config)
        if name.startswith("trainer"):
            arguments = TrainingArguments(**shared, torch_compile=name == "trainer-compiled")
            trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)
        else:
            trainer = _sft_trainer(name, model, rows, shared, options, callbacks)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _llmlab_trainer(name, rows, options, callbacks, folder):
    from transformers import TrainingArguments, default_data_collator

    from llmlab.hardware import probe
    from llmlab.model import build_config, new_model
    from llmlab.runs.arguments import build_arguments
    from llmlab.runs.policy import compile_layers
    from llmlab.settings.training import PretrainSettings
    from llmlab.training.pretrain import PretrainTrainer

    settings = PretrainSettings(
        model={
            "vocab_size": SHAPE["vocab"],
            "d_model": SHAPE["hidden"],
            "d_ff": SHAPE["inner"],
            "n_layers": options.layers,
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
        trainer_args={"logging_first_step": False},
    )
    arguments = build_arguments(
        TrainingArguments,
        settings,
        probe(),
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        prediction_loss_only=True,
        save_strategy="no",  # a checkpoint is no part of a step
    )
    trainer = PretrainTrainer(
        settings,
        model=new_model(build_config(settings.model)),
        args=arguments,
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


def take_turns(names, make, every=1):
    """Runs trainers in turn.

    Args:
        names: of the contenders.
        make: returns the trainer of a name, given callbacks and an empty folder.
        every: steps of a turn.

    Returns:
        The seconds of each turn by contender.
    """
    from transformers import TrainerCallback

    turns = {name: threading.Semaphore(0) for name in names}
    ready = threading.Barrier(len(names))
    seconds = {name: [] for name in names}

    class Turn(TrainerCallback):
        """Holds a trainer between its steps, so that only one computes at a time."""

        def __init__(self, name):
            self.name = name

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                ready.wait()
                self.wait()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % every:
                return
            seconds[self.name].append(time.perf_counter() - self.began)
            turns[names[(names.index(self.name) + 1) % len(names)]].release()
            if state.global_step < args.max_steps:
                self.wait()

        def wait(self):
            turns[self.name].acquire()
            self.began = time.perf_counter()  # the next batch is fetched within the turn

    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make(name, [Turn(name)], folder) for name in names}
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
    parser.add_argument("--layers", type=int, default=30, help="fewer for a quick look")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=USUAL, metavar="NAME")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(peak_memory(options.memory_of, options)))
        return

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        memory = {name: _memory_in_child(name, options) for name in options.contenders}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        rows = make_rows(options)
        seconds = take_turns(
            options.contenders, lambda name, callbacks, folder: make_trainer(name, rows, options, callbacks, folder)
        )
    table = report(options, seconds, memory)
    print(table)
    if options.record:
        path = Path(__file__).with_name("RESULTS.md")
        path.write_text((path.read_text() if path.exists() else "# Results\n") + "\n" + table)


def _memory_in_child(name, options):
    words = [sys.executable, __file__, "--memory-of", name, "--steps", "3", "--batch", str(options.batch)]
    words += ["--sequence", str(options.sequence), "--layers", str(options.layers)]
    output = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    memory = json.loads(output.splitlines()[-1])
    print(f"{name}: {memory / 1e9:.2f} GB", file=sys.stderr)
    return memory


def report(options, seconds, memory):
    """Returns the results as Markdown."""
    tokens = options.batch * options.sequence
    from llmlab.hardware import probe

    machine = probe()
    lines = [
        f"## Training step, {date.today()}",
        "",
        f"SmolLM2-135M's shape, {options.layers} layers, {options.batch} x {options.sequence} tokens, "
        f"{machine.dtype}, {machine.name}, "
        f"{platform.machine()}, torch {version('torch')}, transformers {version('transformers')}, "
        f"trl {version('trl')}; median of {options.steps - 2} turns. `python benchmarks/train_step.py --record`",
        "",
        "| trainer | tokens/s | speed of the first over it | peak memory, GB | the first's over its | first step, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    first = options.contenders[0]
    ours = seconds[first][2:]
    for name in options.contenders:
        theirs = seconds[name][2:]
        ratio = statistics.median(their / our for their, our in zip(theirs, ours, strict=True))
        speed = tokens / statistics.median(theirs)
        lines.append(
            f"| {CONTENDERS[name]} | {speed:.0f} | {ratio:.2f} | {memory[name] / 1e9:.2f} "
            f"| {memory[first] / memory[name]:.2f} | {seconds[name][0]:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

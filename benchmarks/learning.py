"""What `llmlab pretrain` learns from a text, beside the same model in plain Transformers at equal tokens.

    python benchmarks/learning.py tinyshakespeare.txt [--steps 600] [--record]

Both read the same rows in the same order, with the same shape, rate, schedule and arithmetic.  The peer is
`transformers.Trainer` with `LlamaForCausalLM`; each runs in a process of its own, on one core, at the same time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

BATCH, SEQUENCE, RATE, WARMUP, EVALUATIONS = 16, 256, 1e-3, 50, 6


def settings_of(options, folder):
    from llmlab import PretrainSettings

    return PretrainSettings(
        model={
            "tokenizer_name": str(folder / "tokenizer"),
            "d_model": 256,
            "n_layers": 6,
            "n_heads": 4,
            "n_kv_heads": 2,
            "d_ff": 704,
            "max_seq_len": SEQUENCE,
        },
        datasets=[options.text],
        validation_fraction=0.1,
        output_dir=str(folder / "llmlab"),
        max_steps=options.steps,
        batch_size=BATCH,
        gradient_accumulation_steps=1,
        lr=RATE,
        warmup_steps=WARMUP,
        eval_every=options.steps // EVALUATIONS,
        eval_steps=20,
        log_every=options.steps // EVALUATIONS,
        save_best_only=False,
        num_proc=1,
        compile=False,
    )


def run_llmlab(options, folder):
    """Returns validation loss by step, its baseline, and the text that the model writes."""
    import llmlab
    from llmlab.runs.record import read_metrics

    settings = settings_of(options, folder)
    result = llmlab.pretrain(settings)
    curve = {line["step"]: line["eval_loss"] for line in read_metrics(result.folder) if "eval_loss" in line}
    return {"curve": curve, "entropy": result.metrics["unigram_entropy"]}


def run_peer(options, folder):
    """Returns validation loss by step of transformers.Trainer with LlamaForCausalLM on the same rows."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed

    from llmlab.data.text.corpus import build_corpus
    from llmlab.data.tokenizer import load_tokenizer
    from llmlab.hardware import probe

    settings, machine = settings_of(options, folder), probe()
    tokenizer = load_tokenizer(settings.model.tokenizer_name)
    corpus = build_corpus(
        settings, tokenizer, max_seq_len=SEQUENCE, rows_needed=options.steps * BATCH, validation_rows=20 * BATCH
    )
    set_seed(settings.seed)
    shape = settings.model
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.d_model,
            intermediate_size=shape.d_ff,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads,
            max_position_embeddings=SEQUENCE,
            tie_word_embeddings=True,
        )
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "peer"),
            max_steps=options.steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=RATE,
            weight_decay=settings.weight_decay,
            adam_beta2=settings.adamw_beta2,
            warmup_steps=WARMUP,
            lr_scheduler_type="cosine",
            max_grad_norm=settings.grad_clip,
            bf16=machine.dtype == "bf16",
            use_cpu=machine.device == "cpu",
            eval_strategy="steps",
            eval_steps=options.steps // EVALUATIONS,
            prediction_loss_only=True,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=corpus.train,
        eval_dataset=corpus.validation,
        data_collator=default_data_collator,
    )
    trainer.train()
    return {"curve": {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a text file, such as tinyshakespeare.txt")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    parser.add_argument("--only", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        name, folder = options.only[0], Path(options.only[1])
        result = {"llmlab": run_llmlab, "peer": run_peer}[name](options, folder)
        (folder / f"{name}.json").write_text(json.dumps(result))
        return

    from llmlab.data.tokenizer import learn_bpe
    from llmlab.settings.data import DataSource

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        learn_bpe([DataSource(name=options.text)], options.vocab_size, folder / "tokenizer", show_progress=False)
        began = time.monotonic()
        words = [options.text, "--steps", str(options.steps)]
        processes = [start([*words, "--only", which, name]) for which in ("llmlab", "peer")]
        assert [process.wait() for process in processes] == [0, 0]
        minutes = (time.monotonic() - began) / 60
        ours, theirs = (json.loads((folder / f"{which}.json").read_text()) for which in ("llmlab", "peer"))
    text = report(options, ours, theirs, minutes)
    print(text)
    if options.record:
        path = Path(__file__).with_name("RESULTS.md")
        path.write_text(f"{path.read_text() if path.exists() else '# Results'}\n{text}")


def start(words):
    """Starts this script with other words, in a process and on a core of its own."""
    return subprocess.Popen([sys.executable, __file__, *words], env={**os.environ, "OMP_NUM_THREADS": "1"})


def report(options, ours, theirs, minutes):
    lines = [
        f"## Learning, {date.today()}",
        "",
        f"{Path(options.text).name}, byte-level BPE of {options.vocab_size}, a decoder of 6 layers and 256 wide, "
        f"{BATCH} x {SEQUENCE} tokens a step, lr {RATE:g}; {minutes:.1f} minutes on one core each. Validation loss in "
        f"nats per token; knowing only how often each token comes: {ours['entropy']:.3f}.",
        "",
        "| step | tokens | llmlab pretrain | transformers.Trainer, LlamaForCausalLM |",
        "| --- | --- | --- | --- |",
    ]
    for step, loss in ours["curve"].items():
        tokens = int(step) * BATCH * SEQUENCE
        lines.append(f"| {step} | {tokens:,} | {loss:.4f} | {theirs['curve'][step]:.4f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

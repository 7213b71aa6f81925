"""Fine-tuning with llmlab against TRL's SFTTrainer run directly: the same losses, and what is learned.

    python benchmarks/finetune.py MODEL ROWS.jsonl [--rows 600] [--steps 60] [--held-out 40] [--record]

MODEL is a chat model with ChatML tokens, ROWS are questions with answers in GSM8K's form (`... #### 42`).  LoRA
adapters are trained on the first rows through both, one after the other, the logged losses compared, the rows after
them asked greedily before and after, and the adapters merged.  What a step costs is `finetune_step.py`.
"""

import argparse
import json
import re
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

TEMPLATE = Path(__file__).parents[1] / "llmlab" / "data" / "chat_template.jinja"
FORM = re.compile(r"#### ?-?[\d,.]+\s*$")


def make_settings(options, folder, **changes):
    from llmlab.settings.training import SFTSettings

    values = {
        "policy_checkpoint": str(options.model),
        "datasets": [{"name": str(options.train)}],
        "validation_fraction": 0,
        "chat_template": "chatml",
        "output_dir": str(folder),
        "cache_dir": str(options.folder / "cache"),
        "max_steps": options.steps,
        "warmup_steps": 5,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "max_seq_len": 512,
        "use_lora": True,
        "lora_preset": "all",
        "log_every": 5,
    }
    return SFTSettings(**values | changes)


def make_trl(options, folder, callbacks=(), **changes):
    """Returns TRL's own trainer as one would write it, with the settings of `make_settings`."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from llmlab.hardware import probe
    from llmlab.model import load_model

    machine = probe()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.chat_template = TEMPLATE.read_text()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    rows = [json.loads(line) for line in options.train.read_text().splitlines()]
    messages = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows
    ]
    values = {
        "output_dir": str(folder),
        "max_steps": options.steps,
        "warmup_steps": 5,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "lr_scheduler_type": "cosine",
        "max_length": 512,
        "assistant_only_loss": True,
        "optim": "adamw_torch_fused",
        "bf16": machine.dtype == "bf16",
        "use_cpu": machine.device == "cpu",
        "gradient_checkpointing": False,
        "logging_steps": 5,
        "logging_first_step": True,
        "seed": 42,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return SFTTrainer(
        model=load_model(options.model, dtype=machine.torch_dtype),
        args=SFTConfig(**values | changes),
        train_dataset=Dataset.from_dict({"messages": messages}),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=names),
        callbacks=list(callbacks),
    )


def learn(options):
    """Returns the report of one run through each, as Markdown."""
    from rich.console import Console

    from llmlab.runs.record import read_metrics, read_record
    from llmlab.settings.lora import MergeSettings
    from llmlab.training.merge import merge
    from llmlab.training.sft import sft

    run = sft(make_settings(options, options.folder / "run"))
    lines = [line for line in read_metrics(run.folder) if "loss" in line]
    trl = make_trl(options, options.folder / "trl")
    trl.train()
    theirs = {line["step"]: line["loss"] for line in trl.state.log_history if "loss" in line}
    merged = merge(MergeSettings(adapter=str(run.folder), output_dir=str(options.folder / "merged"), dtype="fp32"))
    before = answers(options, options.model)
    after, whole = answers(options, run.folder), answers(options, merged.folder)
    form = lambda texts: f"{sum(bool(FORM.search(text)) for text in texts)} of {len(texts)}"  # noqa: E731
    right = lambda texts: f"{sum(map(is_right, texts, options.answers))} of {len(texts)}"  # noqa: E731
    gap = max(abs(line["loss"] - theirs[line["step"]]) for line in lines)
    same = sum(one == other for one, other in zip(after, whole, strict=True))
    Console().print(after[0], markup=False)
    seconds = lines[-1]["seconds"]
    record = read_record(run.folder)
    table = [
        f"## Fine-tuning against TRL's SFTTrainer, {date.today()}",
        "",
        f"{options.model.name}, LoRA on all projections (r 8), {options.rows} rows of {options.data.name}, "
        f"{options.steps} steps of 4 rows, lr 1e-3, {record['hardware']['dtype']}, {seconds / 60:.1f} minutes; trl "
        f"{version('trl')}. `python benchmarks/finetune.py MODEL ROWS --record`",
        "",
        "| step | llmlab sft | trl.SFTTrainer | difference |",
        "| --- | --- | --- | --- |",
        *(
            f"| {line['step']} | {line['loss']:.5f} | {theirs[line['step']]:.5f} "
            f"| {abs(line['loss'] - theirs[line['step']]):.1e} |"
            for line in lines
        ),
        "",
        f"Largest difference {gap:.1e}. On {len(before)} held-out questions, greedily, answers in the trained form"
        f" (`#### 42`): {form(before)} before and {form(after)} after; right: {right(before)} and {right(after)}.",
        f"The merged model gives the same answer to {same} of {len(after)}; its logits are off base and adapter by at "
        f"most {merged.metrics['max_difference']:.1e}, off the base's by {merged.metrics['difference_to_base']:.1f}.",
    ]
    return "\n".join(table) + "\n"


def answers(options, source):
    """Returns greedy answers to the held-out questions, in fp32."""
    from llmlab.inference import generate_text, load_for_inference
    from llmlab.settings.generation import SamplingSettings

    model, tokenizer = load_for_inference(source, dtype="fp32")
    tokenizer.chat_template = TEMPLATE.read_text()
    prompts = [[{"role": "user", "content": question}] for question in options.questions]
    sampling = SamplingSettings(temperature=0, max_new_tokens=200)
    return [texts[0] for texts in generate_text(model, tokenizer, prompts, sampling, batch_size=20)]


def is_right(text, answer):
    number = lambda text: text.rpartition("####")[2].strip().replace(",", "").rstrip(".")  # noqa: E731
    return "####" in text and number(text) == number(answer)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/RESULTS.md")
    options = parser.parse_args()
    lines = options.data.read_text().splitlines()
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        options.train = options.folder / "train.jsonl"
        options.train.write_text("\n".join(lines[: options.rows]) + "\n")
        held_out = [json.loads(line) for line in lines[options.rows : options.rows + options.held_out]]
        options.questions = [row["question"] for row in held_out]
        options.answers = [row["answer"] for row in held_out]
        table = learn(options)
    print(table)
    if options.record:
        path = Path(__file__).with_name("RESULTS.md")
        path.write_text(path.read_text() + "\n" + table)


if __name__ == "__main__":
    main()

"""GRPO of a real chat model on real questions: the same rewards and losses as TRL's GRPOTrainer, then what is learned.

    python benchmarks/grpo.py MODEL QUESTIONS.jsonl [--rollouts 40] [--compared 3] [--max-new-tokens 96] [--record]

QUESTIONS have answers in GSM8K's form (`... #### 42`).  The shortest thousand are asked after one worked example; an
answer earns 1 for ending in a line of that form and 2 for the right number.  The first rollouts are also made with
`trl.GRPOTrainer` as one would write it, and compared.
"""

import argparse
import json
import re
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

EXAMPLE = [
    {"role": "user", "content": "Tom has 3 apples and buys 4 more. How many apples does he have?"},
    {"role": "assistant", "content": "3 + 4 = 7\n#### 7"},
]
FORM = r"\n#### -?[\d,.]+$"
PROMPTS, GROUP, RATE = 8, 4, 3e-4


def write_prompts(options, path):
    """Writes the shortest questions, the same ones in the same order each time, and returns them."""
    rows = [json.loads(line) for line in options.questions.read_text().splitlines()]
    rows = sorted(rows, key=lambda row: len(row["question"]))[:1000]
    prompts = [
        {
            "prompt": [*EXAMPLE, {"role": "user", "content": row["question"]}],
            "answer": row["answer"].rpartition("####")[2].strip(),
        }
        for row in rows
    ]
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return prompts


def run_ours(options, folder, prompts):
    """Returns the logged lines and the record of `llmlab grpo`."""
    from llmlab.runs.record import read_metrics, read_record
    from llmlab.settings.rl import GRPOSettings
    from llmlab.training.online.grpo import grpo

    result = grpo(
        GRPOSettings(
            policy_checkpoint=str(options.model),
            datasets=[{"name": str(prompts)}],
            validation_fraction=0,
            rewards=[
                {"name": "regex_match", "weight": 1, "pattern": FORM},
                {"name": "numeric_match", "weight": 2},
            ],
            output_dir=str(folder / "run"),
            cache_dir=str(folder / "cache"),
            max_steps=options.rollouts,
            batch_size=PROMPTS,
            group_size=GROUP,
            mini_batch_size=PROMPTS,
            gradient_accumulation_steps=GROUP,
            ppo_epochs=1,
            max_new_tokens=options.max_new_tokens,
            learning_rate=RATE,
            scheduler="none",
            warmup_steps=0,
            init_kl_coef=0.02,
            lora_preset="all",
            lora_dropout=0.0,
            log_every=1,
        )
    )
    return [line for line in read_metrics(result.folder) if "loss" in line], read_record(result.folder)


def run_trl(options, folder, prompts):
    """Returns the lines that TRL's own trainer logs with the same settings."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, set_seed
    from trl import GRPOConfig, GRPOTrainer

    from llmlab.hardware import probe
    from llmlab.model import load_model

    def form(completions, **columns):
        return [float(re.search(FORM, turns[-1]["content"], re.DOTALL) is not None) for turns in completions]

    def right(completions, answer, **columns):
        from llmlab.rewards import numeric_match

        return numeric_match(completions, answer=answer)

    machine = probe()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    set_seed(42)
    trainer = GRPOTrainer(
        model=load_model(options.model, dtype=machine.torch_dtype),
        reward_funcs=[form, right],
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            reward_weights=[1 / 3, 2 / 3],
            max_steps=options.compared,
            generation_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            per_device_train_batch_size=PROMPTS,
            gradient_accumulation_steps=GROUP,
            num_iterations=1,
            max_completion_length=options.max_new_tokens,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            beta=0.02,
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
        train_dataset=Dataset.from_list(prompts),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0, target_modules=names),
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "reward" in line]


def report(options, ours, theirs, record):
    """Returns the results as Markdown."""
    table = [
        f"## GRPO on {options.questions.name}, {date.today()}",
        "",
        f"{options.model.name}, LoRA on all projections (r 8), {options.rollouts} rollouts of {PROMPTS} prompts x "
        f"{GROUP} completions of up to {options.max_new_tokens} tokens, one step each, lr {RATE:g}, KL weight 0.02, "
        f"{record['hardware']['dtype']}, {ours[-1]['seconds'] / 60:.1f} minutes; trl {version('trl')}. "
        "`python benchmarks/grpo.py MODEL QUESTIONS --record`",
        "",
        "Means over rollouts; `form` and `right` are 0 or 1 for a completion, the reward is (form + 2 right) / 3.",
        "",
        "| rollouts | reward | form | right | tokens of a completion | cut off | groups all alike | kl |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    columns = {
        "reward": ".3f",
        "reward/regex_match": ".3f",
        "reward/numeric_match": ".3f",
        "completion_length": ".0f",
        "clipped_share": ".2f",
        "zero_variance_share": ".2f",
        "kl": ".4f",
    }
    piece = max(options.rollouts // 8, 1)
    for i in range(0, len(ours), piece):
        lines = ours[i : i + piece]
        cells = [format(sum(line[name] for line in lines) / len(lines), form) for name, form in columns.items()]
        table.append(f"| {i + 1} to {i + len(lines)} | {' | '.join(cells)} |")
    if theirs:
        table += ["", "The first rollouts beside `trl.GRPOTrainer` with the same settings and seed:", ""]
        table += [
            "| rollout | reward, llmlab | reward, TRL | loss, llmlab | loss, TRL |",
            "| --- | --- | --- | --- | --- |",
        ]
        for line, other in zip(ours, theirs, strict=False):
            table.append(
                f"| {line['step']} | {line['reward']:.5f} | {other['reward']:.5f} "
                f"| {line['loss']:.6f} | {other['loss']:.6f} |"
            )
    return "\n".join(table) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--compared", type=int, default=3, help="rollouts made with TRL directly as well; 0 is none")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/RESULTS.md")
    options = parser.parse_args()
    from llmlab.runs.progress import quiet_libraries

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = write_prompts(options, folder / "prompts.jsonl")
        theirs = []
        if options.compared:
            with quiet_libraries():
                theirs = run_trl(options, folder, prompts)
        ours, record = run_ours(options, folder, folder / "prompts.jsonl")
        table = report(options, ours, theirs, record)
    print(table)
    if options.record:
        path = Path(__file__).with_name("RESULTS.md")
        path.write_text(path.read_text() + "\n" + table)


if __name__ == "__main__":
    main()

"""Supervised fine-tuning: policy, data, trainer, train, save.

The loop and the loss are TRL's SFTTrainer; the rows reach it as tokens and labels that were proven before.
"""

import math
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from transformers import PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llmlab.data.instructions import Instructions, build_instructions
from llmlab.hardware import Hardware, probe
from llmlab.optim.build import check_supported
from llmlab.settings.errors import UserError
from llmlab.settings.sft import SFTSettings
from llmlab.settings.sources import Resolved
from llmlab.training import checkpoints
from llmlab.training.arguments import build_arguments, rhythm_arguments
from llmlab.training.callbacks import MetricsLog, Rhythm, ScheduleAfterResume
from llmlab.training.compile import compile_dynamic
from llmlab.training.failures import check_disk, failures_recorded
from llmlab.training.optimizers import OurOptimizers
from llmlab.training.policy import Policy, load_policy
from llmlab.training.progress import ProgressLine, print_plan, print_result, quiet_libraries
from llmlab.training.record import RunRecord, RunResult
from llmlab.training.resume import find_checkpoint

BEST_ADAPTERS = "best_lora_adapters"


class InstructionTrainer(OurOptimizers, SFTTrainer):
    """TRL's SFTTrainer with llmlab's optimizers."""


class RowsApart:
    """Packed rows as a batch of rows, for attention that has no kernel for one long row of everything.

    TRL lays packed rows end to end, which flash attention reads in linear time and every other attention in quadratic.

    Args:
        collator: the trainer's own.
    """

    def __init__(self, collator: DataCollatorForLanguageModeling):
        self.collator = replace(collator, padding_free=False, return_position_ids=True)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(examples)
        batch["labels"][batch["position_ids"] == 0] = -100  # no conversation predicts the first token of the next
        del batch["attention_mask"]  # the positions tell where each begins, and models look at them only without it
        return batch


def sft(
    settings: SFTSettings | Resolved[SFTSettings],
    *,
    resume: str | Path | None = None,
    load_optimizer: bool = True,
    console: Console | None = None,
) -> RunResult:
    """Teaches a model to follow instructions, whole or through LoRA adapters, and writes its run folder.

    Args:
        settings: which model, what data, for how long.
        resume: a run folder of this stage to continue from its last checkpoint.
        load_optimizer: with `resume`, whether to restore the optimizer's state; without, only weights and step count.
        console: where to print; None is the terminal.

    Returns:
        The run folder and its last metrics: `loss` and `eval_loss` in nats per trained token,
        `mean_token_accuracy`, `entropy`, ...

    Raises:
        UserError: anything that the settings, the model, the data, the machine or the disk make impossible, most of
            all rows whose trained tokens are not what they should be.
        KeyboardInterrupt: after an interrupted run was saved.

    Source: seed, LLM-Lab document, "Supervised Fine-Tuning (SFT)" and "LoRA for SFT".
    """
    resolved = settings if isinstance(settings, Resolved) else Resolved(settings, {})
    settings = resolved.settings
    hardware = probe(settings.device, settings.dtype)
    process = PartialState(cpu=hardware.device == "cpu")
    console = console or Console(quiet=not process.is_main_process)
    check_supported(settings.optimizer, process.distributed_type)

    folder = checkpoints.claim(settings.output_dir, resume=resume is not None)
    checkpoint = find_checkpoint(folder, settings, load_optimizer=load_optimizer) if resume is not None else None
    done = checkpoints.saved_step(checkpoint) if checkpoint else 0
    set_seed(settings.seed)
    with quiet_libraries():
        policy = load_policy(settings.policy_checkpoint, settings, hardware, chat_template=settings.chat_template)
    bars = nullcontext() if console.is_terminal else quiet_libraries()
    with process.main_process_first(), bars:
        data = build_instructions(
            settings,
            policy.tokenizer,
            max_seq_len=settings.max_seq_len,
            loss_on=settings.loss_on,
            allow_truncated=settings.allow_truncated,
            seed=settings.seed,
            stops=policy.stops,
            validation_rows=settings.eval_steps * settings.batch_size * process.num_processes,
        )
    if settings.compile is True:
        compile_dynamic(policy.model, hardware.device)
    rows_per_step = settings.batch_size * settings.gradient_accumulation_steps * process.num_processes
    evaluates = data.validation is not None
    rhythm = Rhythm(best_only=settings.save_best_only, evaluates=evaluates, save_every=settings.save_every)
    progress = ProgressLine(console, tokens_per_step=None, flops_per_token=None, peak_flops=None)
    with quiet_libraries():
        trainer = InstructionTrainer(
            settings,
            load_optimizer=load_optimizer,
            model=policy.model,
            args=trainer_arguments(settings, hardware, evaluates=evaluates),
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=policy.tokenizer,
            callbacks=[rhythm, progress],
        )
    trainer.remove_callback(PrinterCallback)  # the progress line tells the same
    if settings.packing and "flash" not in policy.model.config._attn_implementation:
        trainer.data_collator = RowsApart(trainer.data_collator)
        # the trainer would count one row of each batch
        lengths = sum(map(len, trainer.train_dataset["input_ids"])) / len(trainer.train_dataset)
        progress.tokens_per_step = round(rows_per_step * lengths)
    steps = total_steps(settings, len(trainer.train_dataset), process.num_processes)
    if done >= steps:
        raise UserError(f"--resume {folder}: it already is at step {done}; give more epochs to extend it")
    for report in data.reports:
        report.passes = round(steps * rows_per_step / len(trainer.train_dataset), 3)
    record = None
    if process.is_main_process:
        trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
        check_disk(folder, needed=(3 * 4 + 2 * 8) * trained)
        record = _new_record(folder, resolved, hardware, policy, data)
        record.start(done if checkpoint else None)
        trainer.add_callback(MetricsLog(record, progress.tokens_per_step))
    if checkpoint is not None:
        trainer.add_callback(ScheduleAfterResume(done))
    print_plan(console, f"Fine-tuning into {folder}", _plan(settings, policy, data, hardware, steps, rows_per_step))
    with quiet_libraries(), failures_recorded("sft", folder, record, progress), rhythm.listen(progress.say):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.accelerator.wait_for_everyone()
        if rhythm.interrupted:
            raise KeyboardInterrupt
        checkpoints.publish(folder, lambda temporary: save_policy(trainer, temporary))
    metrics = last_metrics(trainer)
    if record is not None:
        record.finish("finished", step=trainer.state.global_step, metrics=metrics)
    print_result(console, folder, metrics)
    return RunResult(folder, metrics)


def trainer_arguments(settings: SFTSettings, hardware: Hardware, *, evaluates: bool) -> SFTConfig:
    """Returns the arguments of TRL's SFTTrainer for these settings on this machine."""
    return build_arguments(
        SFTConfig,
        settings,
        hardware,
        per_device_eval_batch_size=settings.batch_size,
        prediction_loss_only=True,
        **({} if settings.epochs is None else {"max_steps": -1}),
        **rhythm_arguments(settings, evaluates=evaluates),
    )


def total_steps(settings: SFTSettings, rows: int, processes: int) -> int:
    """Returns the optimizer updates of a run over so many rows, as the trainer counts them."""
    if settings.epochs is None:
        return settings.max_steps
    batches = math.ceil(rows / (settings.batch_size * processes))
    return math.ceil(settings.epochs * max(math.ceil(batches / settings.gradient_accumulation_steps), 1))


def save_policy(trainer: SFTTrainer, folder: Path) -> None:
    """Writes weights (or adapters, and these in `best_lora_adapters/` too), tokenizer and where generation stops."""
    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel):
        model.get_base_model().generation_config.save_pretrained(folder)
        files = [path for path in folder.iterdir() if path.name != "README.md"]
        (folder / BEST_ADAPTERS).mkdir()
        for path in files:
            shutil.copy2(path, folder / BEST_ADAPTERS)


def last_metrics(trainer: SFTTrainer) -> dict[str, float]:
    """Returns the last value of each metric; `eval_loss` is that of the weights that were kept."""
    metrics: dict[str, float] = {}
    for line in trainer.state.log_history:
        metrics.update({name: value for name, value in line.items() if isinstance(value, (int, float))})
    if trainer.args.load_best_model_at_end and trainer.state.best_metric is not None:
        metrics["eval_loss"] = trainer.state.best_metric
    return metrics


def _plan(
    settings: SFTSettings, policy: Policy, data: Instructions, hardware: Hardware, steps: int, rows_per_step: int
) -> list[tuple[str, str]]:
    passes = data.reports[0].passes
    schedule = f"{settings.scheduler} after {settings.warmup_steps} steps of warmup"
    if settings.warmup_steps >= steps:
        schedule += " [yellow](as long as the run: the peak is never reached)[/yellow]"
    return [
        *policy.rows(),
        ("data", data.summary()),
        (
            "trained on",
            {"assistant": "every turn of the assistant", "completion": "its last turn"}.get(
                settings.loss_on, "all tokens"
            ),
        ),
        ("steps", f"{steps:,} ({passes:.2g} passes over the training rows)"),
        (
            "batch",
            f"{rows_per_step} rows of up to {settings.max_seq_len} tokens{', packed' if settings.packing else ''}",
        ),
        (
            "optimizer",
            f"{settings.optimizer}, lr {settings.learning_rate:g}, {schedule}",
        ),
        ("device", f"{hardware.name} ({hardware.device})"),
        ("dtype", f"{hardware.dtype}: {hardware.reason}"),
    ]


def _new_record(
    folder: Path, resolved: Resolved[SFTSettings], hardware: Hardware, policy: Policy, data: Instructions
) -> RunRecord:
    settings = resolved.settings
    record = RunRecord(
        folder,
        stage="sft",
        # beside epochs, max_steps would contradict them when the run is resumed
        settings=settings.model_dump(mode="json", exclude=set() if settings.epochs is None else {"max_steps"}),
        sources=resolved.sources,
        parents=policy.parents,
        hardware=hardware.record(),
    )
    record.values["data"] = data.record()
    return record

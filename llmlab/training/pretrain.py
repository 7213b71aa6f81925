"""Pretraining: tokenizer, model, data, trainer, train, save.

The loop is Transformers' Trainer; here it gets our rows in their own order, our optimizers, and a loss that never
holds all logits.  Instruction data and adapters are later stages' business.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import (
    Trainer,
    default_data_collator,
    set_seed,
)

from llmlab import hardware as machine
from llmlab.data import build_corpus, load_tokenizer
from llmlab.model import measure
from llmlab.optim import build_optimizer, check_supported, estimate_hessian
from llmlab.settings.pretrain import PretrainSettings
from llmlab.settings.sources import Resolved
from llmlab.training import checkpoints
from llmlab.training._trl import SwitchableOptimizer
from llmlab.training.callbacks import MetricsLog, Rhythm, ScheduleAfterResume, StreamPosition
from llmlab.training.compile import decide_compile
from llmlab.training.progress import ProgressLine, print_plan
from llmlab.training.record import RunResult

MAY_CHANGE_ON_RESUME = {
    *("max_steps", "output_dir", "log_every", "eval_every", "eval_steps", "save_best_only", "save_total_limit"),
    *("device", "dtype", "compile", "gradient_checkpointing", "dataloader_num_workers", "num_proc", "cache_dir"),
    *("trainer_args", "allow_dropped"),
}
BELONGS_TO_OPTIMIZER = {"lr", "weight_decay", "warmup_steps", "grad_clip"}


class PretrainTrainer(SwitchableOptimizer, Trainer):
    """Transformers' Trainer with llmlab's optimizers and a loss without full logits."""

    def __init__(self, settings: PretrainSettings, load_optimizer: bool = True, **kwargs: Any):
        self.settings = settings
        self.load_optimizer = load_optimizer
        super().__init__(**kwargs)
        # the estimate's sampled labels have a generator of their own, so that dropout draws what it would without
        self._hessian_generator = torch.Generator(device=self.args.device).manual_seed(settings.seed)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = build_optimizer(
                model or self.model,
                self.settings,
                learning_rate=self.settings.lr,
                weight_decay=self.settings.weight_decay,
            )
        return self.optimizer

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs, "return_logits": False}, *args, **kwargs)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        every = self.settings.sophia_update_every
        due = self.settings.optimizer == "sophia" and self.state.global_step % every == 0
        if due and self.state.global_step != self._hessian_step:
            self._hessian_step = self.state.global_step
            estimate_hessian(model, self._prepare_inputs(inputs), self.optimizer, self._hessian_generator)
        return super().training_step(model, inputs, num_items_in_batch)

    _hessian_step = -1


def pretrain(
    settings: PretrainSettings | Resolved[PretrainSettings],
    *,
    resume: str | Path | None = None,
    load_optimizer: bool = True,
    console: Console | None = None,
) -> RunResult:
    """Trains a decoder on plain text and writes its run folder.

    Args:
        settings: what to train, on what, for how long.
        resume: a run folder of this stage to continue from its last checkpoint.
        load_optimizer: with `resume`, whether to restore the optimizer's state; without, only weights and step count.
        console: where to print; None is the terminal.

    Returns:
        The run folder and its last metrics: `eval_loss` (nats per token), `unigram_entropy` (the same unit), ...

    Raises:
        UserError: anything that the settings, the data, the machine or the disk make impossible.
        KeyboardInterrupt: after an interrupted run was saved.

    Source: seed, LLM-Lab document, "Base Training (Pretraining)" and "Checkpointing and Resuming".
    """
    resolved = settings if isinstance(settings, Resolved) else Resolved(settings, {})
    settings = resolved.settings
    hardware = machine.probe(settings.device, settings.dtype)
    process = PartialState(cpu=hardware.device == "cpu")
    console = console or Console(quiet=not process.is_main_process)
    check_supported(settings.optimizer, process.distributed_type)

    folder = checkpoints.claim(settings.output_dir, resume=resume is not None)
    checkpoint = _check_resume(folder, settings, load_optimizer) if resume is not None else None
    set_seed(settings.seed)
    tokenizer = load_tokenizer(settings.init_from or settings.model.tokenizer_name)
    model, settings = _build_model(settings, tokenizer)
    rows_per_step = settings.batch_size * settings.gradient_accumulation_steps
    sequence = settings.model.max_seq_len
    with process.main_process_first():
        corpus = build_corpus(
            settings,
            tokenizer,
            max_seq_len=sequence,
            rows_needed=settings.max_steps * rows_per_step * process.num_processes,
            rank=process.process_index,
            world_size=process.num_processes,
        )
    tokens_per_step = rows_per_step * process.num_processes * sequence
    size = measure(model.config)
    compiled, compile_reason = decide_compile(
        settings.compile,
        device_type=hardware.device,
        steps=settings.max_steps - (checkpoints.saved_step(checkpoint) if checkpoint else 0),
        tokens_per_step=tokens_per_step // process.num_processes,
        parameters=size.total,
    )
    arguments = _arguments(settings, hardware, corpus, compiled)
    rhythm = Rhythm(best_only=settings.save_best_only, evaluates=corpus.validation is not None)
    progress = ProgressLine(
        console,
        tokens_per_step=tokens_per_step,
        flops_per_token=size.training_flops_per_token(sequence),
        peak_flops=hardware.peak_flops and hardware.peak_flops * process.num_processes,
    )
    trainer = PretrainTrainer(
        settings,
        load_optimizer,
        model=model,
        args=arguments,
        train_dataset=corpus.train,
        eval_dataset=corpus.validation_rows(settings.eval_steps * settings.batch_size * process.num_processes),
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[rhythm, progress],
    )
    record = None
    if process.is_main_process:
        record = _start_record(folder, resolved, settings, hardware, corpus, checkpoint)
        trainer.add_callback(MetricsLog(record, tokens_per_step))
    if settings.streaming:
        position = StreamPosition(corpus.train, rows_per_step, process.process_index)
        trainer.add_callback(position)
        if checkpoint is not None:
            position.restore(checkpoint)
    if checkpoint is not None:
        trainer.add_callback(ScheduleAfterResume(checkpoints.saved_step(checkpoint)))
    _check_disk(folder, size.total, settings)
    print_plan(
        console,
        f"Pretraining into {folder}",
        _plan(settings, size, corpus, hardware, process.num_processes, compile_reason, checkpoint),
    )
    with _recorded_failures(folder, record, progress), rhythm.listen(progress.say):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.accelerator.wait_for_everyone()
        if not rhythm.interrupted:
            _save(trainer, folder, tokenizer)
    return _finish(trainer, rhythm, folder, record, corpus, console)

"""Pretraining: tokenizer, model, data, trainer, train, save.

The loop is Transformers' Trainer; here it gets our rows in their own order, our optimizers, and a loss that never
holds all logits.  Instruction data and adapters are later stages' business.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers import default_data_collator as stack_rows

from llmlab.data import Corpus, build_corpus, load_tokenizer, stop_token_ids
from llmlab.hardware import Hardware
from llmlab.model import (
    LLMLabForCausalLM,
    ModelSize,
    build_config,
    load_config,
    load_model,
    measure,
    new_model,
    to_llmlab,
)
from llmlab.runs import checkpoints
from llmlab.runs.arguments import build_arguments, rhythm_arguments
from llmlab.runs.callbacks import (
    MetricsLog,
    Perplexity,
    Rhythm,
    ScheduleAfterResume,
    StreamPosition,
    WholeCheckpoints,
)
from llmlab.runs.compile import compile_layers, decide_compile
from llmlab.runs.failures import check_disk, check_memory, failures_recorded
from llmlab.runs.optimizers import OurOptimizers
from llmlab.runs.progress import ProgressLine, human, print_plan, print_result, quiet_libraries
from llmlab.runs.record import RunRecord, RunResult
from llmlab.runs.run import describe_evaluation, describe_optimizer, last_metrics, save_policy
from llmlab.runs.start import Start, begin
from llmlab.settings.errors import UserError
from llmlab.settings.pretrain import PretrainSettings
from llmlab.settings.sources import Resolved, as_resolved
from llmlab.settings.trust import destinations, takes_trust


class PretrainTrainer(OurOptimizers, Trainer):
    """Transformers' Trainer with llmlab's optimizers and a loss without full logits."""

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs, "return_logits": False}, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        if not self.settings.streaming:
            return super().get_train_dataloader()
        # each process has its own part of a stream already: Accelerate's sharding would drop the rest of it
        return DataLoader(
            self.train_dataset,
            batch_size=self.settings.batch_size,
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # else starting to iterate draws from the state that resuming just restored
        )


@takes_trust
def pretrain(
    settings: PretrainSettings | Resolved[PretrainSettings],
    *,
    resume: str | Path | None = None,
    load_optimizer: bool = True,
    allow_changed_data: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Trains a decoder on plain text and writes its run folder.

    Args:
        settings: what to train, on what, for how long.
        resume: a run folder of this stage to continue from its last checkpoint, or a checkpoint in it.
        load_optimizer: with `resume`, whether to restore the optimizer's state; without, only weights and step count.
        allow_changed_data: with `resume`, go on although data files changed since the run began.
        console: where to print; None is the terminal.

    Returns:
        The run folder and its last metrics: `eval_loss` and `unigram_entropy` in nats per token, `loss`, ...

    Raises:
        UserError: anything that the settings, the data, the machine or the disk make impossible.
        KeyboardInterrupt: after an interrupted run was saved.

    Source: seed, LLM-Lab document, "Base Training (Pretraining)" and "Checkpointing and Resuming".
    """
    resolved = as_resolved(settings)
    tokenizer = load_tokenizer(resolved.settings.init_from or resolved.settings.model.tokenizer_name)
    resolved = replace(resolved, settings=complete_shape(resolved.settings, tokenizer))
    with begin(
        resolved,
        resume=resume,
        load_optimizer=load_optimizer,
        allow_changed_data=allow_changed_data,
        console=console,
    ) as start:
        return _pretrain(start, tokenizer, load_optimizer)


def _pretrain(start: Start[PretrainSettings], tokenizer: PreTrainedTokenizerBase, load_optimizer: bool) -> RunResult:
    settings, folder, checkpoint = start.resolved.settings, start.folder, start.checkpoint
    hardware, process, console = start.hardware, start.process, start.console
    set_seed(settings.seed)
    if settings.init_from:
        model = load_model(settings.init_from)
        if not isinstance(model, LLMLabForCausalLM):
            model = to_llmlab(model)
    else:
        shape = build_config(settings.model, tokenizer)
        batch_tokens = settings.batch_size * settings.model.max_seq_len
        check_memory(measure(shape).total, batch_tokens=batch_tokens, width=settings.model.d_model)
        model = new_model(shape)
        model.generation_config.eos_token_id = stop_token_ids(tokenizer)
    sequence = settings.model.max_seq_len
    rows_per_step = settings.batch_size * settings.gradient_accumulation_steps  # on this process
    tokens_per_step = rows_per_step * process.num_processes * sequence
    with process.main_process_first():
        corpus = build_corpus(
            settings,
            tokenizer,
            max_seq_len=sequence,
            rows_needed=settings.max_steps * rows_per_step * process.num_processes,
            validation_rows=settings.eval_steps * settings.batch_size * process.num_processes,
            rank=process.process_index,
            world_size=process.num_processes,
        )
    size = measure(model.config)
    compiled, compile_reason = decide_compile(
        settings.compile,
        device_type=hardware.device,
        steps=settings.max_steps - start.done,
        tokens_per_step=tokens_per_step // process.num_processes,
        parameters=size.total,
    )
    evaluates = corpus.validation is not None
    rhythm = Rhythm(
        best_only=settings.save_best_only, evaluates=evaluates, save_every=None if evaluates else settings.eval_every
    )
    progress = ProgressLine(
        console,
        tokens_per_step=tokens_per_step,
        flops_per_token=size.training_flops_per_token(sequence),
        peak_flops=hardware.peak_flops and hardware.peak_flops * process.num_processes,
    )
    trainer = PretrainTrainer(
        settings,
        load_optimizer=load_optimizer,
        model=model,
        args=trainer_arguments(settings, hardware, corpus),
        train_dataset=corpus.train,
        eval_dataset=corpus.validation,
        data_collator=stack_rows,
        processing_class=tokenizer,
        callbacks=[Perplexity(), rhythm, progress],
    )
    trainer.has_all_steps = start.has_all_steps(settings.max_steps)
    trainer.remove_callback(PrinterCallback)  # the progress line tells the same
    if compiled:
        compile_layers(model)
    record = None
    if process.is_main_process:
        check_disk(folder, needed=3 * 4 * size.total + 2 * size.optimizer_bytes(settings.optimizer))
        record = _new_record(start, corpus)
        record.start(start.resumed_step)
        trainer.add_callback(MetricsLog(record, tokens_per_step))
    if settings.streaming:
        position = StreamPosition(corpus.train, rows_per_step, process.process_index)
        trainer.add_callback(position)
        if checkpoint is not None:
            position.restore(checkpoint)
    if checkpoint is not None:
        trainer.add_callback(ScheduleAfterResume(start.done))
    whole = WholeCheckpoints(trainer, settings.save_total_limit)
    trainer.add_callback(whole)  # the last to be called
    plan = _plan(settings, size, corpus, hardware, process.num_processes, compile_reason, checkpoint)
    with (
        quiet_libraries(),
        failures_recorded("pretrain", folder, record, progress, settings),
        rhythm.listen(progress.say),
    ):
        print_plan(console, f"Pretraining into {folder}", plan)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.accelerator.wait_for_everyone()
        rhythm.end_if_interrupted()
        checkpoints.publish(folder, lambda temporary: save_policy(trainer, temporary))
    metrics = last_metrics(trainer)
    if corpus.report.unigram_entropy is not None:
        metrics["unigram_entropy"] = corpus.report.unigram_entropy
    if record is not None:
        record.finish("finished", step=trainer.state.global_step, metrics=metrics)
        whole.rotate(trainer.args, trainer.state)
    print_result(console, folder, metrics)
    return RunResult(folder, metrics)


def complete_shape(settings: PretrainSettings, tokenizer: PreTrainedTokenizerBase) -> PretrainSettings:
    """Returns the settings with the vocabulary and the sequence length that the model really has.

    Raises:
        UserError: the vocabulary is smaller than the tokenizer's, or architecture settings stand beside `init_from`.
    """
    shape, length = settings.model, settings.model.max_seq_len
    chosen = shape.model_fields_set
    if settings.init_from:
        beside = sorted(chosen - {"max_seq_len", "tokenizer_name"})
        if beside:
            raise UserError(
                f"model.{beside[0]}: the architecture comes from init_from = {settings.init_from}; leave one out"
            )
        config = load_config(settings.init_from)
        longest, vocabulary = config.max_position_embeddings, config.vocab_size
        if length > longest and "max_seq_len" in chosen:
            raise UserError(f"max_seq_len = {length}: {settings.init_from} was made for at most {longest} tokens")
        length = min(length, longest)
        changes = {"max_seq_len": length}
    else:
        follows = "vocab_size" not in chosen and "tokenizer_name" in chosen
        vocabulary = len(tokenizer) if follows else shape.vocab_size
        changes = {"vocab_size": vocabulary}
    if vocabulary < len(tokenizer):
        raise UserError(
            f"vocab_size = {vocabulary}: the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens; "
            f"expected at least {len(tokenizer)}"
        )
    return settings.model_copy(update={"model": shape.model_copy(update=changes)})


def trainer_arguments(settings: PretrainSettings, hardware: Hardware, corpus: Corpus) -> TrainingArguments:
    """Returns the arguments of Transformers' Trainer for these settings on this machine."""
    return build_arguments(
        TrainingArguments,
        settings,
        hardware,
        per_device_eval_batch_size=settings.batch_size,
        train_sampling_strategy="sequential",  # the rows come in the mixture's own order
        ignore_data_skip=settings.streaming,  # a stream goes on from its saved position
        remove_unused_columns=False,
        prediction_loss_only=True,
        **rhythm_arguments(settings, evaluates=corpus.validation is not None),
    )


def _plan(
    settings: PretrainSettings,
    size: ModelSize,
    corpus: Corpus,
    hardware: Hardware,
    processes: int,
    compile_reason: str,
    checkpoint: Path | None,
) -> list[tuple[str, str]]:
    sequence = settings.model.max_seq_len
    batch = settings.batch_size * settings.gradient_accumulation_steps * processes
    memory = size.training_memory(
        settings.optimizer,
        rows=settings.batch_size,
        sequence=sequence,
        dtype=hardware.dtype,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    return [
        ("model", f"{human(size.total)} parameters ({human(size.non_embedding)} without embeddings)"),
        ("data", corpus.report.summary()),
        ("steps", f"{settings.max_steps:,}" + (f", going on from {checkpoint.name}" if checkpoint else "")),
        (
            "batch",
            f"{batch} sequences of {sequence} = {batch * sequence:,} tokens"
            f" ({settings.batch_size} x {settings.gradient_accumulation_steps} x {processes})",
        ),
        ("tokens", human(settings.max_steps * batch * sequence)),
        describe_evaluation(settings, settings.eval_steps, evaluates=corpus.validation is not None),
        describe_optimizer(settings, settings.max_steps),
        ("memory", f"about {human(memory.total, 'B')} of {human(hardware.memory, 'B')}"),
        *hardware.rows(),
        ("compile", compile_reason),
        *destinations(settings.trainer_args, settings.output_dir),
    ]


def _new_record(start: Start[PretrainSettings], corpus: Corpus) -> RunRecord:
    settings = start.resolved.settings
    record = RunRecord(
        start.folder,
        stage="pretrain",
        # beside init_from, a shape would contradict the model's own when the run is resumed
        settings=settings.recorded()
        | ({"model": {"max_seq_len": settings.model.max_seq_len}} if settings.init_from else {}),
        sources=start.resolved.sources,
        parents=[settings.init_from or settings.model.tokenizer_name],
        hardware=start.hardware.record(),
    )
    record.values |= {"data": corpus.report.record(), "data_files": start.data_files}
    return record

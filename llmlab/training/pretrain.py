"""Pretraining: tokenizer, model, packed rows, trainer. The loop is Transformers' Trainer; llmlab adds packed rows in
mixture order and a chunked loss that never materializes all logits. Instruction data and adapters are later stages'
business."""

from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers import default_data_collator as stack_rows

from llmlab.data.text.corpus import Corpus, build_corpus
from llmlab.data.tokenizer import load_tokenizer, stop_token_ids
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
from llmlab.runs.callbacks import ProcessState, StageMetrics
from llmlab.runs.failures import check_memory
from llmlab.runs.progress import human
from llmlab.runs.record import RunResult
from llmlab.runs.run import Run, training_stage
from llmlab.runs.start import S
from llmlab.runs.trainer import StageTrainer, TokenMeanEvaluation
from llmlab.settings.errors import UserError
from llmlab.settings.sources import Resolved
from llmlab.settings.training import PretrainSettings


class PretrainTrainer(TokenMeanEvaluation, StageTrainer, Trainer):
    """Transformers' Trainer with llmlab's optimizers and the chunked loss."""

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs, "return_logits": False}, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        if not self.settings.streaming:
            return super().get_train_dataloader()
        # each process already streams its own shard: Accelerate would shard again and drop rows
        return DataLoader(
            self.train_dataset,
            batch_size=self.settings.batch_size,
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # so that making the iterator does not consume the restored random state
        )


def resolve_architecture(resolved: Resolved[PretrainSettings]) -> Resolved[PretrainSettings]:
    """Returns the settings with the vocabulary size and the sequence length that the model really has."""
    settings = resolved.settings
    shape, length = settings.model, settings.model.max_seq_len
    tokenizer = load_tokenizer(settings.init_from or shape.tokenizer_name)
    chosen = shape.model_fields_set
    if settings.init_from:
        if beside := sorted(chosen - {"max_seq_len", "tokenizer_name"}):
            where = f"the architecture comes from init_from = {settings.init_from}"
            raise UserError(f"model.{beside[0]}: {where}; leave one out")
        config = load_config(settings.init_from)
        longest, vocabulary = config.max_position_embeddings, config.vocab_size
        if length > longest and "max_seq_len" in chosen:
            raise UserError(f"max_seq_len = {length}: {settings.init_from} was made for at most {longest} tokens")
        changes = {"max_seq_len": min(length, longest)}
    else:
        follows = "vocab_size" not in chosen and "tokenizer_name" in chosen
        vocabulary = len(tokenizer) if follows else shape.vocab_size
        changes = {"vocab_size": vocabulary}
    if vocabulary < len(tokenizer):
        problem = f"the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens"
        raise UserError(f"vocab_size = {vocabulary}: {problem}; expected at least {len(tokenizer)}")
    return replace(resolved, settings=settings.model_copy(update={"model": shape.model_copy(update=changes)}))


class PretrainRun(Run[S]):
    """A run of pretraining: its tokenizer, model and corpus."""

    def load_model(self) -> tuple[PreTrainedTokenizerBase, LLMLabForCausalLM]:
        """Returns the tokenizer, and a new model of the settings' architecture or the one in `init_from`."""
        tokenizer = load_tokenizer(self.settings.init_from or self.settings.model.tokenizer_name)
        return tokenizer, build_model(self.settings, tokenizer)

    def build_corpus(self, tokenizer: PreTrainedTokenizerBase, sequence: int) -> Corpus:
        """Returns this process's packed rows of the settings' sources."""
        settings, process = self.settings, self.process
        with process.main_process_first():
            return build_corpus(
                settings,
                tokenizer,
                max_seq_len=sequence,
                rows_needed=settings.max_steps * self.batch.rows,
                validation_rows=self.batch.validation_rows,
                rank=process.process_index,
                world_size=process.num_processes,
            )


@training_stage(PretrainRun, prepare=resolve_architecture)
def pretrain(run: PretrainRun[PretrainSettings]) -> RunResult:
    """Trains a decoder on plain text and writes its run folder.

    Args:
        settings: `PretrainSettings`: what to train, on what, for how long.

    Returns:
        The run folder and its last metrics: `eval_loss` and `unigram_entropy` in nats per token, `loss`, ...

    Source: seed, LLM-Lab document, "Base Training (Pretraining)" and "Checkpointing and Resuming".
    """
    settings, processes, sequence = run.settings, run.process.num_processes, run.settings.model.max_seq_len
    tokenizer, model = run.load_model()
    size = measure(model.config)
    corpus = run.build_corpus(tokenizer, sequence)
    arguments = {
        "per_device_eval_batch_size": settings.batch_size,
        "train_sampling_strategy": "sequential",  # rows are already in mixture order
        "ignore_data_skip": settings.streaming,  # streams restore their own position
        "remove_unused_columns": False,
        "prediction_loss_only": True,
    }
    progress = {
        "tokens_per_step": run.batch.rows * sequence,
        "flops_per_token": size.training_flops_per_token(sequence),
        "peak_flops": run.hardware.peak_flops and run.hardware.peak_flops * processes,
    }
    options = {"arguments": arguments, "progress": progress, "data_collator": stack_rows}
    trainer = run.make_trainer(PretrainTrainer, TrainingArguments, model, tokenizer, corpus, **options)
    if corpus.validation is not None:
        trainer.origins = corpus.validation.origins
    callbacks: list[TrainerCallback] = [StageMetrics()]
    if settings.streaming:
        stream, rows_per_step = corpus.train, run.batch.rows // processes
        state = (lambda step: stream.state_at(step * rows_per_step), stream.load_state_dict)
        callbacks.append(ProcessState("stream.pt", run.checkpoint, *state))
    entropy = corpus.unigram_entropy
    return run.train(
        trainer,
        steps=settings.max_steps,
        plan=describe(run, size, corpus),
        parents=[settings.init_from or settings.model.tokenizer_name],
        data=corpus.record(),
        callbacks=callbacks,
        optimizer_bytes=size.optimizer_bytes(settings.optimizer),
        fixed_length=True,
        results={} if entropy is None else {"unigram_entropy": entropy},
    )


def build_model(settings: PretrainSettings, tokenizer: PreTrainedTokenizerBase) -> LLMLabForCausalLM:
    """Returns a new model with the settings' architecture, or the one in `init_from`."""
    if settings.init_from:
        model = load_model(settings.init_from)
        return model if isinstance(model, LLMLabForCausalLM) else to_llmlab(model)
    shape = build_config(settings.model, tokenizer)
    batch_tokens = settings.batch_size * settings.model.max_seq_len
    check_memory(measure(shape).total, batch_tokens=batch_tokens, width=settings.model.d_model)
    model = new_model(shape)
    model.generation_config.eos_token_id = stop_token_ids(tokenizer)
    return model


def describe(run: Run[PretrainSettings], size: ModelSize, corpus: Corpus) -> list[tuple[str, Any]]:
    """Returns the lines of the plan."""
    settings, batch, sequence = run.settings, run.batch.rows, run.settings.model.max_seq_len
    split = f"{settings.batch_size} x {settings.gradient_accumulation_steps} x {run.process.num_processes}"
    return [
        ("model", f"{human(size.total)} parameters ({human(size.non_embedding)} without embeddings)"),
        ("data", corpus.summary()),
        ("steps", f"{settings.max_steps:,}" + (f", resuming from {run.checkpoint.name}" if run.checkpoint else "")),
        ("batch", f"{batch} sequences of {sequence} = {batch * sequence:,} tokens ({split})"),
        ("tokens", human(settings.max_steps * batch * sequence)),
    ]

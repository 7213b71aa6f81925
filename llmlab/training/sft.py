"""Supervised fine-tuning: policy, instruction data, trainer. The loop and the loss are TRL's SFTTrainer; rows arrive
as token ids and labels, already checked."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llmlab.data.chat.makers import InstructionEncoder
from llmlab.runs._trl import chunked_head
from llmlab.runs.callbacks import StageMetrics
from llmlab.runs.record import RunResult
from llmlab.runs.run import Run, training_stage
from llmlab.runs.trainer import StageTrainer, TokenMeanEvaluation
from llmlab.settings.errors import UserError
from llmlab.settings.training import SFTSettings

SHORT_CONVERSATION = 128  # tokens, to guess how many are packed into a row
TRAINED_ON = {"assistant": "every turn of the assistant", "completion": "its last turn", "all": "all tokens"}


class LLMLabSFTTrainer(TokenMeanEvaluation, StageTrainer, SFTTrainer):
    """TRL's SFTTrainer with llmlab's optimizers and chunked loss, and a validation loss that does not depend on
    `batch_size`."""

    equal_weights = True  # of a step's tokens in the loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with chunked_head(equal=self.equal_weights, enabled=self.on_cpu):
            return super().compute_loss(*args, **kwargs)


def collate_packed(
    collator: DataCollatorForLanguageModeling, examples: list[dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """Collates packed rows as a batch, (rows, time), without predictions across conversations. TRL's padding-free
    batches concatenate all rows, which only flash attention handles in linear time."""
    batch = collator(examples)
    batch["labels"][batch["position_ids"] == 0] = -100
    del batch["attention_mask"]  # without it models see the boundaries in position_ids
    return batch


@training_stage(Run)
def sft(run: Run[SFTSettings]) -> RunResult:
    """Fine-tunes a model on conversations (all weights or LoRA) and writes its run folder.

    Args:
        settings: `SFTSettings`: which model, what data, for how long.

    Returns:
        The run folder and its last metrics: `loss` and `eval_loss` in nats per trained token,
        `mean_token_accuracy`, `entropy`, ...

    Source: seed, LLM-Lab document, "Supervised Fine-Tuning (SFT)" and "LoRA for SFT".
    """
    settings = run.settings
    policy = run.load_policy()
    length = policy.cap_length(settings.max_seq_len)
    rows_per_step = run.batch.rows
    encoder = InstructionEncoder(policy.tokenizer, length, settings.loss_on, policy.stops, settings.only_label)
    packed = max(1, length // SHORT_CONVERSATION) if settings.packing else 1
    data = run.build_rows(encoder, rows_per_step=rows_per_step * packed)
    shuffles = settings.trainer_args.get("shuffle_dataset", False)
    arguments = {
        "per_device_eval_batch_size": settings.batch_size,
        "prediction_loss_only": True,
        "max_length": length,
        "dataset_kwargs": {"skip_prepare_dataset": not (settings.packing or shuffles)},  # rows are checked
        **({} if settings.epochs is None else {"max_steps": -1}),  # then epochs decide
    }
    model, tokenizer = policy.model, policy.tokenizer
    trainer = run.make_trainer(LLMLabSFTTrainer, SFTConfig, model, tokenizer, data, arguments=arguments)
    trainer.origins = data.origins
    rows = len(trainer.train_dataset)
    flattened = settings.packing and "flash" in policy.model.config._attn_implementation
    if flattened and settings.auto_batch:
        problem = "not supported with packing under flash attention, whose batches are one long row"
        raise UserError(f"auto_batch = true: {problem}; set packing=false or attn_implementation=sdpa")
    if settings.packing and not flattened:
        collator = replace(trainer.data_collator, padding_free=False, return_position_ids=True)
        trainer.data_collator = partial(collate_packed, collator)
        # SFTTrainer counts tokens of flattened batches only
        run.progress.tokens_per_step = round(sum(map(len, trainer.train_dataset["input_ids"])) / rows * rows_per_step)
    batch = f"{rows_per_step} rows of up to {length} tokens{', packed' * settings.packing}"
    plan = [("trained on", TRAINED_ON[settings.loss_on])]
    return run.train_rows(trainer, policy, data, batch=batch, plan=plan, callbacks=[StageMetrics()])

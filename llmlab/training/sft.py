"""Supervised fine-tuning: policy, data, trainer, train, save.

The loop and the loss are TRL's SFTTrainer; the rows reach it as tokens and labels that were proven before.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llmlab.data.chat.makers import InstructionMaker
from llmlab.data.chat.rows import build_rows
from llmlab.hardware import Hardware
from llmlab.runs.arguments import build_arguments, rhythm_arguments
from llmlab.runs.callbacks import Perplexity
from llmlab.runs.optimizers import OurOptimizers
from llmlab.runs.policy import load_policy
from llmlab.runs.progress import quiet_libraries
from llmlab.runs.record import RunResult
from llmlab.runs.run import Run, describe_evaluation, describe_optimizer, total_steps
from llmlab.runs.start import begin
from llmlab.settings.sft import SFTSettings
from llmlab.settings.sources import Resolved
from llmlab.settings.trust import takes_trust

SHORTEST = 128  # tokens of a conversation, to guess how many are packed into a row
TRAINED_ON = {"assistant": "every turn of the assistant", "completion": "its last turn", "all": "all tokens"}


class InstructionTrainer(OurOptimizers, SFTTrainer):
    """TRL's SFTTrainer with llmlab's optimizers, and a validation loss that does not depend on `batch_size`."""

    evaluated: torch.Tensor  # the sum of the losses of this evaluation's tokens, and their number

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tokens = (inputs["labels"][..., 1:] != -100).sum()
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not model.training:
            self.evaluated += torch.stack([loss * tokens, tokens])
        return loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.evaluated = torch.zeros(2, device=self.args.device)
        output = super().evaluation_loop(*args, **kwargs)
        total, tokens = self.accelerator.reduce(self.evaluated, reduction="sum").tolist()
        output.metrics["eval_loss"] = total / max(tokens, 1)  # the trainer's is a mean over rows
        return output


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


@takes_trust
def sft(
    settings: SFTSettings | Resolved[SFTSettings],
    *,
    resume: str | Path | None = None,
    load_optimizer: bool = True,
    allow_changed_data: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Teaches a model to follow instructions, whole or through LoRA adapters, and writes its run folder.

    Args:
        settings: which model, what data, for how long.
        resume: a run folder of this stage to continue from its last checkpoint, or a checkpoint in it.
        load_optimizer: with `resume`, whether to restore the optimizer's state; without, only weights and step count.
        allow_changed_data: with `resume`, go on although data files changed since the run began.
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
    with begin(
        settings,
        resume=resume,
        load_optimizer=load_optimizer,
        allow_changed_data=allow_changed_data,
        console=console,
    ) as start:
        return _fine_tune(Run("sft", start), load_optimizer)


def _fine_tune(run: Run[SFTSettings], load_optimizer: bool) -> RunResult:
    settings = run.settings
    with quiet_libraries():
        policy = load_policy(settings.policy_checkpoint, settings, run.hardware, chat_template=settings.chat_template)
    length = policy.fit(settings.max_seq_len)
    rows_per_batch = settings.batch_size * run.process.num_processes
    rows_per_step = rows_per_batch * settings.gradient_accumulation_steps
    with run.process.main_process_first(), run.reading():
        maker = InstructionMaker(
            policy.tokenizer,
            max_seq_len=length,
            loss_on=settings.loss_on,
            stops=policy.stops,
            only_label=settings.only_label,
        )
        data = build_rows(
            settings,
            maker,
            seed=settings.seed,
            allow_truncated=settings.allow_truncated,
            validation_rows=settings.eval_steps * settings.batch_size * run.process.num_processes,
            max_samples=settings.max_samples,
            **run.extent(rows_per_step * max(1, length // SHORTEST) if settings.packing else rows_per_step),
        )
    evaluates = data.validation is not None
    with quiet_libraries():
        trainer = InstructionTrainer(
            settings,
            load_optimizer=load_optimizer,
            model=policy.model,
            args=trainer_arguments(settings, run.hardware, evaluates=evaluates, max_length=length),
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=policy.tokenizer,
            callbacks=run.callbacks(evaluates=evaluates),
        )
    rows = len(trainer.train_dataset)
    if settings.packing and "flash" not in policy.model.config._attn_implementation:
        trainer.data_collator = RowsApart(trainer.data_collator)
        # the trainer would count one row of each batch
        run.progress.tokens_per_step = round(sum(map(len, trainer.train_dataset["input_ids"])) / rows * rows_per_step)
    accumulation = settings.gradient_accumulation_steps
    steps = total_steps(settings, rows, rows_per_batch=rows_per_batch, accumulation=accumulation)
    passes = steps * rows_per_step / rows
    data.set_epochs(passes)
    plan = [
        *policy.rows(),
        ("data", data.summary()),
        ("trained on", TRAINED_ON[settings.loss_on]),
        ("steps", f"{steps:,} ({passes:.2g} passes over the training rows)"),
        ("batch", f"{rows_per_step} rows of up to {length} tokens{', packed' * settings.packing}"),
        describe_evaluation(settings, settings.eval_steps, evaluates=evaluates),
        describe_optimizer(settings, steps),
        *run.hardware.rows(),
    ]
    return run.train(
        trainer, steps=steps, plan=plan, parents=policy.parents, data=data.record(), callbacks=[Perplexity()]
    )


def trainer_arguments(settings: SFTSettings, hardware: Hardware, *, evaluates: bool, **fixed: Any) -> SFTConfig:
    """Returns the arguments of TRL's SFTTrainer for these settings on this machine."""
    return build_arguments(
        SFTConfig,
        settings,
        hardware,
        per_device_eval_batch_size=settings.batch_size,
        prediction_loss_only=True,
        **({} if settings.epochs is None else {"max_steps": -1}),
        **rhythm_arguments(settings, evaluates=evaluates),
        **fixed,
    )

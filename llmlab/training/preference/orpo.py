"""Odds-ratio preference optimization: policy, pairs, trainer, train, save.

The loop and the loss are TRL's ORPOTrainer, which TRL calls experimental; the pairs reach it as tokens.
"""

import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # read when it is imported
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from llmlab.runs._trl import AnswerTokens
from llmlab.runs.optimizers import OurOptimizers
from llmlab.runs.policy import load_policy
from llmlab.runs.progress import quiet_libraries
from llmlab.runs.record import RunResult
from llmlab.runs.run import Run
from llmlab.runs.start import begin
from llmlab.settings.orpo import ORPOSettings
from llmlab.settings.sources import Resolved
from llmlab.settings.trust import takes_trust
from llmlab.training.preference.run import (
    PreferenceMetrics,
    WholeBatches,
    count_steps,
    preference_arguments,
    read_pairs,
)


class OddsTrainer(OurOptimizers, AnswerTokens, WholeBatches, ORPOTrainer):
    """TRL's ORPOTrainer with llmlab's optimizers, on pairs that are tokens already.

    The likelihood term is a mean over the tokens of an update (TRL: of a forward pass), the odds-ratio term over its
    pairs, so that neither depends on `mini_batch_size` or on the number of processes.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.eval_dataset is not None:
            masks = self.eval_dataset["chosen_attention_mask"]
            self.eval_sizes = torch.tensor([len(masks), sum(len(mask) - 1 for mask in masks)], device=self.args.device)

    def measure(self, batch: dict[str, Any]) -> list[int]:
        """Returns the number of pairs, and of tokens that the better answers' rows predict."""
        mask = batch["chosen_attention_mask"]  # (pairs, time)
        return [len(mask), int(mask[:, 1:].sum())]

    def concatenated_forward(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Any, ...]:
        *results, nll = (outputs := super().concatenated_forward(model, batch))[:5]
        pairs, tokens = self.measure(batch)
        mean_pairs, mean_tokens = self.sizes if model.training else self.eval_sizes
        return *results, nll * (tokens / pairs) * (mean_pairs / mean_tokens), *outputs[5:]

    def estimated_from(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Returns the better answers' rows, which the likelihood term is about."""
        return self._prepare_inputs({name: batch[f"chosen_{name}"] for name in ("input_ids", "attention_mask")})


@takes_trust
def orpo(
    settings: ORPOSettings | Resolved[ORPOSettings],
    *,
    resume: str | Path | None = None,
    load_optimizer: bool = True,
    allow_changed_data: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Fine-tunes on the better of two answers and away from the worse at once, and writes the run folder.

    Args:
        settings: which model, what pairs, for how long.
        resume: a run folder of this stage to continue from its last checkpoint, or a checkpoint in it.
        load_optimizer: with `resume`, whether to restore the optimizer's state; without, only weights and step count.
        allow_changed_data: with `resume`, go on although data files changed since the run began.
        console: where to print; None is the terminal.

    Returns:
        The run folder and its last metrics: `loss`, `nll_loss`, `log_odds_ratio`, `win_rate`, `margin`, ...

    Raises:
        UserError: anything that the settings, the model, the pairs, the machine or the disk make impossible.
        KeyboardInterrupt: after an interrupted run was saved.

    Source: seed, RL guide, section 2, "ORPO Configuration"; arXiv:2403.07691.
    """
    with begin(
        settings,
        resume=resume,
        load_optimizer=load_optimizer,
        allow_changed_data=allow_changed_data,
        console=console,
    ) as start:
        return _optimize(Run("orpo", start), load_optimizer)


def _optimize(run: Run[ORPOSettings], load_optimizer: bool) -> RunResult:
    settings = run.settings
    with quiet_libraries():
        policy = load_policy(settings.policy_checkpoint, settings, run.hardware, chat_template=settings.chat_template)
    data = read_pairs(run, policy, max_prompt_length=settings.max_prompt_length)
    evaluates = data.validation is not None
    with quiet_libraries():
        trainer = OddsTrainer(
            settings,
            load_optimizer=load_optimizer,
            model=policy.model,
            args=preference_arguments(
                ORPOConfig,
                settings,
                run.hardware,
                evaluates=evaluates,
                processes=run.process.num_processes,
                eval_on_start=evaluates and run.checkpoint is None,
                remove_unused_columns=False,  # its collator wants columns that the model does not
            ),
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=policy.tokenizer,
            callbacks=run.callbacks(evaluates=evaluates),
        )
    steps, rows = count_steps(run, data, trainer.train_dataset)
    # this trainer counts no tokens
    tokens = sum(report.counts["tokens"] for report in data.reports) / sum(r.trained_rows for r in data.reports)
    per_step = settings.mini_batch_size * trainer.args.gradient_accumulation_steps * run.process.num_processes
    run.progress.tokens_per_step = round(tokens * per_step)
    return run.train(
        trainer,
        steps=steps,
        plan=[*policy.rows(), *rows],
        parents=policy.parents,
        data=data.record(),
        callbacks=[PreferenceMetrics(run.progress, beta=None)],
    )

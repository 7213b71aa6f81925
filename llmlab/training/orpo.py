"""Odds-ratio preference optimization: policy, pairs, trainer, train, save.

The loop and the loss are TRL's ORPOTrainer, which TRL calls experimental; the pairs reach it as tokens.
"""

import os
from pathlib import Path

from rich.console import Console

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # read when it is imported
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from llmlab.settings.orpo import ORPOSettings
from llmlab.settings.sources import Resolved
from llmlab.training._trl import AnswerTokens
from llmlab.training.optimizers import OurOptimizers
from llmlab.training.policy import load_policy
from llmlab.training.preference import PreferenceMetrics, count_steps, preference_arguments, read_pairs
from llmlab.training.progress import quiet_libraries
from llmlab.training.record import RunResult
from llmlab.training.running import Run


class OddsTrainer(OurOptimizers, AnswerTokens, ORPOTrainer):
    """TRL's ORPOTrainer with llmlab's optimizers, on pairs that are tokens already."""


def orpo(
    settings: ORPOSettings | Resolved[ORPOSettings],
    *,
    resume: str | Path | None = None,
    load_optimizer: bool = True,
    console: Console | None = None,
) -> RunResult:
    """Fine-tunes on the better of two answers and away from the worse at once, and writes the run folder.

    Args:
        settings: which model, what pairs, for how long.
        resume: a run folder of this stage to continue from its last checkpoint.
        load_optimizer: with `resume`, whether to restore the optimizer's state; without, only weights and step count.
        console: where to print; None is the terminal.

    Returns:
        The run folder and its last metrics: `loss`, `nll_loss`, `log_odds_ratio`, `win_rate`, `margin`, ...

    Raises:
        UserError: anything that the settings, the model, the pairs, the machine or the disk make impossible.
        KeyboardInterrupt: after an interrupted run was saved.

    Source: seed, RL guide, section 2, "ORPO Configuration"; arXiv:2403.07691.
    """
    run = Run("orpo", settings, resume=resume, load_optimizer=load_optimizer, console=console)
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

"""Direct preference optimization: policy and reference, pairs, trainer, train, save.

The loop and the loss are TRL's DPOTrainer; the pairs reach it as tokens, prompts already cut.
"""

import copy
import os
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer

from llmlab.data import load_tokenizer
from llmlab.model import fit_vocabulary, load_model
from llmlab.runs._trl import PairsReady, show_head_bias
from llmlab.runs.optimizers import OurOptimizers
from llmlab.runs.policy import Policy, load_policy
from llmlab.runs.progress import quiet_libraries
from llmlab.runs.record import RunResult
from llmlab.runs.run import Run
from llmlab.runs.start import begin
from llmlab.settings.dpo import DPOSettings
from llmlab.settings.errors import UserError
from llmlab.settings.sources import Resolved
from llmlab.settings.trust import takes_trust
from llmlab.training.preference.run import (
    PreferenceMetrics,
    WholeBatches,
    count_steps,
    preference_arguments,
    read_pairs,
)


class PairTrainer(OurOptimizers, PairsReady, WholeBatches, DPOTrainer):
    """TRL's DPOTrainer with llmlab's optimizers, on pairs that are tokens already."""


@takes_trust
def dpo(
    settings: DPOSettings | Resolved[DPOSettings],
    *,
    resume: str | Path | None = None,
    load_optimizer: bool = True,
    allow_changed_data: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Makes a model prefer the better of two answers, and writes its run folder.

    Args:
        settings: which model, what pairs, for how long.
        resume: a run folder of this stage to continue from its last checkpoint, or a checkpoint in it.
        load_optimizer: with `resume`, whether to restore the optimizer's state; without, only weights and step count.
        allow_changed_data: with `resume`, go on although data files changed since the run began.
        console: where to print; None is the terminal.

    Returns:
        The run folder and its last metrics: `loss`, `win_rate`, `margin`, `kl`, `chosen_logp`, `rejected_logp`, and
        the same of the validation pairs with `eval_` before them.

    Raises:
        UserError: anything that the settings, the models, the pairs, the machine or the disk make impossible.
        KeyboardInterrupt: after an interrupted run was saved.

    Source: seed, LLM-Lab document, "DPO" and "LoRA for RLHF"; arXiv:2305.18290.
    """
    with begin(
        settings,
        resume=resume,
        load_optimizer=load_optimizer,
        allow_changed_data=allow_changed_data,
        console=console,
    ) as start:
        return _optimize(Run("dpo", start), load_optimizer)


def _optimize(run: Run[DPOSettings], load_optimizer: bool) -> RunResult:
    settings = run.settings
    with quiet_libraries():
        policy = load_policy(
            settings.policy_checkpoint, settings, run.hardware, chat_template=settings.chat_template, attach=False
        )
        reference, held = load_reference(settings, policy)
    data = read_pairs(run, policy, max_prompt_length=settings.max_prompt_length)
    evaluates = data.validation is not None
    with quiet_libraries():
        trainer = PairTrainer(
            settings,
            load_optimizer=load_optimizer,
            model=policy.model,
            ref_model=reference,
            args=preference_arguments(
                DPOConfig,
                settings,
                run.hardware,
                evaluates=evaluates,
                processes=run.process.num_processes,
                eval_on_start=evaluates and run.checkpoint is None,
            ),
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=policy.tokenizer,
            peft_config=policy.new_adapters(settings),
            callbacks=run.callbacks(evaluates=evaluates),
        )
    if isinstance(trainer.model, PeftModel):
        show_head_bias(trainer.model)
    steps, rows = count_steps(run, data, trainer.train_dataset)
    return run.train(
        trainer,
        steps=steps,
        plan=[*policy.rows(trainer.model), ("reference", held), *rows],
        parents=policy.parents,
        data=data.record(),
        callbacks=[PreferenceMetrics(run.progress, beta=settings.beta)],
    )


def load_reference(settings: DPOSettings, policy: Policy) -> tuple[PreTrainedModel | None, str]:
    """Returns the reference model, and what it is; None where the policy serves, its adapters off or as they began.

    Raises:
        UserError: there is no such model, or it has another vocabulary.
    """
    named = settings.reference_checkpoint
    same = [named is not None and os.path.abspath(named) == os.path.abspath(parent) for parent in policy.parents]
    if named is None or same[0]:
        if policy.continues_adapter:
            return None, "the adapters as they begin, a frozen copy"
        if settings.use_lora:
            return None, "the policy with its adapters off"
        return copy.deepcopy(policy.model), "the starting policy, a frozen copy"
    if policy.continues_adapter and same[1]:
        raise UserError(
            f"reference_checkpoint = {named}: not supported with the adapters of {policy.parents[0]}, which began "
            "there; leave it out (the adapters as they begin), or merge them first: llmlab merge"
        )
    tokenizer = load_tokenizer(named)
    if tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise UserError(
            f"reference_checkpoint = {named}: it has another vocabulary ({len(tokenizer):,} tokens) than the policy "
            f"({len(policy.tokenizer):,}), so their probabilities cannot be compared"
        )
    reference = load_model(named, dtype=next(policy.model.parameters()).dtype if settings.use_lora else torch.float32)
    fit_vocabulary(reference, policy.tokenizer)
    return reference, named

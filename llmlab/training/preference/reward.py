"""Reward models: a policy with a head of one number, pairs, trainer, train, save.

The loop and the loss (Bradley and Terry's) are TRL's RewardTrainer; scoring with what comes out is `llmlab.rewards`.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from rich.console import Console
from torch import Tensor, nn
from trl import RewardConfig, RewardTrainer

from llmlab.adapters import lora_config
from llmlab.data import load_tokenizer
from llmlab.data.chat.rendering import add_chat_template
from llmlab.model import fit_vocabulary, load_classifier, read_adapter
from llmlab.runs.optimizers import OurOptimizers
from llmlab.runs.policy import Policy, prepare_quantized, quantization_of
from llmlab.runs.progress import quiet_libraries
from llmlab.runs.record import RunResult
from llmlab.runs.run import Run
from llmlab.runs.start import begin
from llmlab.settings.errors import UserError
from llmlab.settings.reward import RewardModelSettings
from llmlab.settings.sources import Resolved
from llmlab.settings.trust import takes_trust
from llmlab.training.preference.run import (
    PreferenceMetrics,
    WholeBatches,
    count_steps,
    preference_arguments,
    read_pairs,
)


class ScoreTrainer(OurOptimizers, WholeBatches, RewardTrainer):
    """TRL's RewardTrainer with llmlab's optimizers."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name, parameter in self.model.named_parameters():
            if "modules_to_save" in name:  # TRL turns the head on 4-bit weights into bf16, which fp32 cannot meet
                parameter.data = parameter.data.float()

    @staticmethod
    def predict(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Returns the scores of both answers, (pairs, 2): Bradley and Terry's model is their softmax."""
        scores = model(**batch, use_cache=False).logits.squeeze(-1)  # (2 * pairs,): the better answers come first
        return torch.stack(scores.chunk(2), dim=1)


@takes_trust
def reward(
    settings: RewardModelSettings | Resolved[RewardModelSettings],
    *,
    resume: str | Path | None = None,
    load_optimizer: bool = True,
    allow_changed_data: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Trains a model that scores the better of two answers higher, and writes its run folder.

    Args:
        settings: which model to start from, what pairs, for how long.
        resume: a run folder of this stage to continue from its last checkpoint, or a checkpoint in it.
        load_optimizer: with `resume`, whether to restore the optimizer's state; without, only weights and step count.
        allow_changed_data: with `resume`, go on although data files changed since the run began.
        console: where to print; None is the terminal.

    Returns:
        The run folder, an ordinary sequence-classification one, and its last metrics: `loss`, `win_rate` (pairs ranked
        right), `margin`, `mean_reward`, ...

    Raises:
        UserError: anything that the settings, the model, the pairs, the machine or the disk make impossible.
        KeyboardInterrupt: after an interrupted run was saved.

    Source: Stiennon et al. 2020 (arXiv:2009.01325); seed, LLM-Lab document, "PPO-Specific Parameters".
    """
    with begin(
        settings,
        resume=resume,
        load_optimizer=load_optimizer,
        allow_changed_data=allow_changed_data,
        console=console,
    ) as start:
        return _fit(Run("reward", start), load_optimizer)


def _fit(run: Run[RewardModelSettings], load_optimizer: bool) -> RunResult:
    settings = run.settings
    with quiet_libraries():
        policy = load_scorer(settings, run)
    data = read_pairs(run, policy, max_prompt_length=settings.max_prompt_length)
    train = whole_answers(data.train)
    evaluates = data.validation is not None
    with quiet_libraries():
        trainer = ScoreTrainer(
            settings,
            load_optimizer=load_optimizer,
            model=policy.model,
            args=preference_arguments(
                RewardConfig,
                settings,
                run.hardware,
                evaluates=evaluates,
                processes=run.process.num_processes,
                eval_on_start=evaluates and run.checkpoint is None,
            ),
            train_dataset=train,
            eval_dataset=whole_answers(data.validation) if evaluates else None,
            processing_class=policy.tokenizer,
            callbacks=run.callbacks(evaluates=evaluates),
        )
    steps, rows = count_steps(run, data, trainer.train_dataset)
    return run.train(
        trainer,
        steps=steps,
        plan=[*policy.rows(), *rows],
        parents=policy.parents,
        data=data.record(),
        callbacks=[PreferenceMetrics(run.progress, beta=None)],
    )


def load_scorer(settings: RewardModelSettings, run: Run[Any]) -> Policy:
    """Returns the model to start from with a new head of one number, and its tokenizer."""
    source = settings.policy_checkpoint
    if read_adapter(source) is not None:
        raise UserError(
            f"policy_checkpoint = {source}: a reward model starts from a whole model; merge it: llmlab merge"
        )
    dtype = run.hardware.torch_dtype if settings.use_lora else torch.float32
    quantization = quantization_of(settings, run.hardware)
    model = load_classifier(source, dtype=dtype, quantization_config=quantization)
    tokenizer = load_tokenizer(source)
    new_tokens = add_chat_template(tokenizer, settings.chat_template)
    fit_vocabulary(model, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if quantization is not None:
        model = prepare_quantized(model)
    if settings.use_lora:
        ids = tokenizer.convert_tokens_to_ids(new_tokens)
        model = get_peft_model(model, lora_config(model, settings, ids, task="SEQ_CLS"))
    return Policy(model, tokenizer, [source], (), new_tokens)


def whole_answers(pairs: Dataset) -> Dataset:
    """Returns pairs as the two whole rows that are scored."""
    return pairs.map(
        lambda row: {name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")},
        remove_columns="prompt_ids",
    )

"""The stages of the pipeline: one literal table, name -> settings class and function, both by their import path.

Importing this costs nothing; `settings_class` and `function` import what they name.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from llmlab.settings.errors import UserError, did_you_mean
from llmlab.settings.paths import check_inputs, check_output


@dataclass(frozen=True)
class Stage:
    """A stage: where its settings class and its function live, one line of help, and whether it can be resumed.

    The function takes the resolved settings (and `resume`, a run folder, where it can) and returns a `RunResult`.
    `prepares` is a function of the resolved settings that returns them complete, and raises what can be known to be
    wrong long before the stage starts.
    """

    name: str
    settings: str
    run: str
    help: str
    resumes: bool = False
    prepares: str = ""

    @property
    def settings_class(self) -> Any:
        return _import(self.settings)

    @property
    def function(self) -> Callable[..., Any]:
        return _import(self.run)

    def check(self, resolved: Any, *, resumed: bool = False) -> None:
        """Raises SettingsError for what is known to be missing or taken before anything heavy is imported."""
        check_inputs(resolved.settings, resolved.sources)
        if not resumed and os.environ.get("RANK", "0") == "0":  # the first process may have begun to write
            check_output(resolved.settings.output_dir)

    def prepare(self, resolved: Any) -> Any:
        """Returns the settings of a stage that may start much later, or raises SettingsError where it cannot work."""
        return _import(self.prepares)(resolved) if self.prepares else resolved


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "tokenizer",
            "llmlab.settings.tokenizer:TokenizerSettings",
            "llmlab.training.tokenizer:train_tokenizer",
            "Train a byte-level BPE tokenizer on text.",
        ),
        Stage(
            "pretrain",
            "llmlab.settings.pretrain:PretrainSettings",
            "llmlab.training.pretrain:pretrain",
            "Train a decoder from nothing, or further, on plain text.",
            resumes=True,
        ),
        Stage(
            "merge",
            "llmlab.settings.merge:MergeSettings",
            "llmlab.training.merge:merge",
            "Fold LoRA adapters into their base model.",
        ),
        Stage(
            "sft",
            "llmlab.settings.sft:SFTSettings",
            "llmlab.training.sft:sft",
            "Fine-tune on instructions and conversations, whole or with LoRA.",
            resumes=True,
        ),
        Stage(
            "dpo",
            "llmlab.settings.dpo:DPOSettings",
            "llmlab.training.preference.dpo:dpo",
            "Make a model prefer the better of two answers.",
            resumes=True,
        ),
        Stage(
            "orpo",
            "llmlab.settings.orpo:ORPOSettings",
            "llmlab.training.preference.orpo:orpo",
            "Fine-tune and prefer at once, without a reference model.",
            resumes=True,
        ),
        Stage(
            "reward",
            "llmlab.settings.reward:RewardModelSettings",
            "llmlab.training.preference.reward:reward",
            "Train a model that scores answers.",
            resumes=True,
        ),
        Stage(
            "grpo",
            "llmlab.settings.grpo:GRPOSettings",
            "llmlab.training.online.grpo:grpo",
            "Sample groups of completions, and make the better ones likelier.",
            resumes=True,
            prepares="llmlab.rewards.loading:check_rewards",
        ),
        Stage(
            "ppo",
            "llmlab.settings.ppo:PPOSettings",
            "llmlab.training.online.ppo:ppo",
            "Learn from rewards with a value function, held to a reference.",
            resumes=True,
            prepares="llmlab.rewards.loading:check_rewards",
        ),
        Stage(
            "generate",
            "llmlab.settings.generation:GenerateSettings",
            "llmlab.training.generate:write_samples",
            "Write completions of prompts, to see what a model learned.",
        ),
    )
}


def find_stage(name: str) -> Stage:
    """Returns the stage of that name.

    Raises:
        UserError: there is no such stage.
    """
    if name not in STAGES:
        raise UserError(f"unknown stage '{name}': expected one of {', '.join(STAGES)}{did_you_mean(name, STAGES)}")
    return STAGES[name]


def _import(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)

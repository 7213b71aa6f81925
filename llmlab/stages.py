"""The stages of the pipeline: one literal table of help and functions, which are imported when first needed."""

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from llmlab.settings import settings_class


def import_heavy(module: str) -> Any:
    """Imports a module that brings torch; without garbage collection, which finds nothing and takes a sixth of it."""
    if module in sys.modules or not gc.isenabled():
        return import_module(module)
    gc.disable()
    try:
        return import_module(module)
    finally:
        gc.freeze()  # later collections need not look at it either
        gc.enable()


@dataclass(frozen=True)
class Stage:
    """A stage: its name, one line of help, its function (`module:name` in `llmlab.training`), whether it can resume.
    The function takes the resolved settings (and `resume`, a run folder, where it can) and returns a `RunResult`."""

    name: str
    help: str
    path: str
    resumes: bool = True

    @property
    def settings_class(self) -> Any:
        return settings_class(self.name)

    @property
    def function(self) -> Callable[..., Any]:
        module, _, name = self.path.partition(":")
        return getattr(import_heavy(f"llmlab.training.{module}"), name)

    def resolve(
        self, layers: list[Any], *, below: list[Any], hardware: str | None = None, processes: int | None = 1
    ) -> Any:
        """Returns the settings of layers over those `below` them, such as a preset, and between them what a machine
        sets: a name, or `auto` for the one at hand; `processes` as in `hardware_layer`."""
        from llmlab.settings.presets import hardware_layer
        from llmlab.settings.sources import resolve

        if hardware is None:
            return resolve(self.settings_class, *below, *layers)
        if hardware == "auto":
            from llmlab.hardware import probe, recommend_preset

            hardware = recommend_preset(probe())
        machine, notes = hardware_layer(self.name, hardware, below, layers, processes=processes)
        resolved = resolve(self.settings_class, *below, machine, *layers)
        return replace(resolved, warnings=(*resolved.warnings, *notes))

    def check(self, resolved: Any, *, resumed: bool = False) -> None:
        """Raises SettingsError for inputs that are missing and folders that are taken, before heavy imports."""
        from llmlab.settings.paths import check_inputs, check_output

        check_inputs(resolved.settings, resolved.sources)
        if not resumed and os.environ.get("RANK", "0") == "0":  # the first process may have begun to write
            check_output(resolved.settings.output_dir)


STAGES = {
    stage.name: stage
    for stage in (
        Stage("tokenizer", "Train a byte-level BPE tokenizer.", "tokenizer:train_tokenizer", resumes=False),
        Stage("pretrain", "Pretrain a decoder on plain text, from scratch or further.", "pretrain:pretrain"),
        Stage("merge", "Merge LoRA adapters into their base model.", "merge:merge", resumes=False),
        Stage("sft", "Fine-tune on conversations: all weights, or LoRA.", "sft:sft"),
        Stage("dpo", "Train on preference pairs against a reference model.", "preference.dpo:dpo"),
        Stage("orpo", "Fine-tune and align on pairs, without a reference model.", "preference.orpo:orpo"),
        Stage("reward", "Train a reward model on preference pairs.", "preference.reward:reward"),
        Stage("grpo", "Train on rewards, compared within groups of completions.", "online.grpo:grpo"),
        Stage("ppo", "Train on rewards with a value function and a KL penalty.", "online.ppo:ppo"),
        Stage("rs-sft", "Fine-tune on the best of sampled completions or episodes.", "offline.rs_sft:rs_sft"),
        Stage("awr", "Fine-tune on samples, weighted by their advantage.", "offline.awr:awr"),
        Stage("sample", "Write completions of prompts into a run folder.", "sample:write_samples", resumes=False),
    )
}

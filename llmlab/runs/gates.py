"""Gates during training: scores of answers to held-out prompts, logged as `gate/NAME`, that change nothing of the run.
The main process alone generates, so that weights which are spread over processes (FSDP, ZeRO-3) are refused."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from llmlab.evaluation.gates import Gate, find_gates, load_gates, measure
from llmlab.inference import context_length
from llmlab.runs.auto_batch import random_states
from llmlab.runs.start import on_main
from llmlab.settings.errors import UserError
from llmlab.terminal import safe, short_number

SHARE = 0.1  # of the run's time, at most
FEWEST = 8  # prompts: where there is no time for these, a measurement is skipped
SLACK = 0.8  # of the prompts that there is time for, so that their number stays once it was lowered


def held_out_gates(settings: Any, model: Any, tokenizer: PreTrainedTokenizerBase, chats: bool) -> list[Gate]:
    """Returns the gates of a stage, whose prompts are none of its training data."""
    trained = [(source.name, source.subset, source.split) for source in settings.datasets]
    for gate in settings.gates:
        if gate.prompts and (gate.prompts.name, gate.prompts.subset, gate.prompts.split) in trained:
            raise UserError(f"gates: {gate.name}: prompts = {gate.prompts}: the run trains on it; name held-out ones")
    own = [settings.datasets[0].model_copy(update={"split": "validation"})]
    try:
        default, allow_code = (settings.validation_datasets or own)[0], getattr(settings, "allow_code", False)
        found = find_gates(settings.gates, default, allow_code=allow_code)
        chats = chats and tokenizer.chat_template is not None
        return load_gates(found, tokenizer, chats=chats, context=context_length(model))
    except UserError as error:
        raise UserError(f"gates: {error} (prompts of a gate, or validation_datasets, are held-out data)") from error


@dataclass(eq=False)
class GateCallback(TrainerCallback):
    """Measures gates every so many steps and at the last one, always where `best` decides about the checkpoints."""

    trainer: Trainer
    gates: list[Gate]
    every: int
    best: Gate | None
    say: Callable[[str], None]
    spent: float = 0.0  # seconds
    cost: float | None = None  # seconds a prompt

    def __post_init__(self) -> None:
        self.count = max(len(gate.examples) for gate in self.gates)
        if not has_whole_weights(self.trainer):
            where = "each process holds a part of the weights; use DDP or ZeRO-2, or llmlab evaluate afterwards"
            raise UserError(f"gate_every = {self.every}: not supported with FSDP and ZeRO-3, where {where}")

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        means = on_main(PartialState(), self.measure)
        if self.best is not None:
            self.trainer.gate_metrics = {f"eval_gate/{self.best.label}": means[self.best.label]}
        if means:
            values = ", ".join(f"{safe(name)} [bold]{short_number(value)}[/bold]" for name, value in means.items())
            self.say(f"step {state.global_step}  gates {values}")
            logs_too = control.should_log  # which a log event resets
            # not TRL's method, which would add the training metrics since the last log, and begin them again
            Trainer.log(self.trainer, {f"gate/{name}": value for name, value in means.items()})
            control.should_log = logs_too

    def measure(self) -> dict[str, float]:
        """Returns the gates' scores, on as many prompts as there is time for; none where there is time for too few."""
        fewest = min(FEWEST, self.count)
        first = self.cost is None
        means = self.measure_on(fewest) if first else {}  # the first ones say what a prompt costs
        elapsed = time.monotonic() - self.began
        affordable = (SHARE * elapsed - self.spent) / (1 - SHARE) / self.cost
        # where one decides about the checkpoint, all of its scores are of the same prompts
        if affordable < self.count and (self.count > fewest if self.best is None else first):
            lower = max(int(SLACK * affordable), fewest)
            why = f"or none where there is no time for them: at most {SHARE:.0%} of the run's"
            decides = "this gate decides about the checkpoint, so it is never skipped"
            why = why if self.best is None else f"or over {SHARE:.0%} of the time: {decides}"
            self.say(f"gates    {lower} of {self.count} prompts from now on, {why}")
            self.count = lower
        if means and (affordable < self.count or self.count == fewest):
            return means
        return self.measure_on(self.count) if affordable >= self.count or self.best is not None else {}

    def measure_on(self, count: int) -> dict[str, float]:
        """Returns the scores on so many prompts; random states and the model's mode stay as they are."""
        began = time.monotonic()
        with generating(self.trainer) as model:
            seed = self.trainer.args.seed
            scores = measure(self.gates, model, self.trainer.processing_class, seed=seed, most=count)
        self.spent += time.monotonic() - began
        self.cost = (time.monotonic() - began) / count
        return {gate.label: gate.score(scores[gate.label].mean) for gate in self.gates}


def has_whole_weights(trainer: Trainer) -> bool:
    """Whether one process can generate alone: FSDP and ZeRO-3 spread the weights over all."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    return not (trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3))


@contextmanager
def generating(trainer: Trainer) -> Iterator[Any]:
    """Yields the model in evaluation mode; random states and the model's mode stay as they are."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    training, restore = model.training, random_states(trainer.args.device)
    model.eval()
    try:
        # compiled layers would be compiled anew for each length
        with torch.compiler.set_stance("force_eager"), trainer.accelerator.autocast():
            yield model
    finally:
        model.train(training)
        restore()

"""What the model answers while it trains, which changes nothing of the run: gates, scores of answers to held-out
prompts that are logged as `gate/NAME`, and `completions.jsonl` for the report (GRPO and PPO sample anyway; other
stages complete, greedily, the beginnings of a few validation rows). The main process alone generates, so that weights
which are spread over processes (FSDP, ZeRO-3) are refused."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from llmlab.evaluation.gates import Gate, find_gates, load_gates, measure
from llmlab.inference import context_length, generate_tokens
from llmlab.runs.failures import random_states
from llmlab.runs.record import RunRecord
from llmlab.runs.start import on_main
from llmlab.settings.errors import UserError, reason_of
from llmlab.settings.generation import SamplingSettings
from llmlab.terminal import safe, short_number

COUNT = 2  # completions at a time
ROWS = 16  # of the validation data, of which those are taken whose prompts leave room for an answer
MOMENTS = 50  # of a run, at most
TEXT_TOKENS = 24  # of a text without a prompt
SAMPLING = SamplingSettings(temperature=0, max_new_tokens=48)
COMPLETIONS_SHARE = 0.02  # of the run's time, at most, but for the first and the last ones
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


@dataclass(eq=False)
class CompletionLog(TrainerCallback):
    """Records a few completions at log events of stages that sample, and at evaluations of the others."""

    record: RunRecord
    trainer: Any
    say: Callable[[str], None]
    failed: bool = False
    began: float = 0.0
    last: int | None = None  # step
    newest: list[dict[str, Any]] = field(default_factory=list)
    spent: float = 0.0  # seconds
    cost: float = 0.0  # seconds of the last ones

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs:
            self.write(state, self.trainer.newest_completions(COUNT))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        affordable = last or self.spent + self.cost <= COMPLETIONS_SHARE * (time.monotonic() - self.began)
        if self.failed or self.is_near(state) or not (affordable and has_whole_weights(self.trainer)):
            return
        if self.trainer.newest_completions(1):
            return
        try:
            self.sample(state)
        except Exception as error:  # memory, or a model's own code: no reason to end a run that trains
            self.failed = True
            self.say(f"note: no more completions for the report: {safe(reason_of(error))}")

    def sample(self, state: Any) -> None:
        """Completes and records the beginnings of a few validation rows."""
        rows = (self.trainer.eval_dataset[index] for index in range(min(ROWS, len(self.trainer.eval_dataset))))
        room = (context_length(self.trainer.model) or math.inf) - SAMPLING.max_new_tokens
        prompts = [prompt for prompt in map(prompt_ids, rows) if 0 < len(prompt) <= room][:COUNT]
        began = time.monotonic()
        with generating(self.trainer) as model:
            if not prompts or not model.can_generate():
                return
            answers = generate_tokens(model, self.trainer.processing_class, prompts, SAMPLING)
        self.cost = time.monotonic() - began
        self.spent += self.cost
        texts = map(self.trainer.processing_class.batch_decode, (prompts, answers))
        self.write(state, [{"prompt": prompt, "completion": answer} for prompt, answer in zip(*texts, strict=True)])

    def write(self, state: Any, completions: list[dict[str, Any]]) -> None:
        """Records completions, unless these or others were recorded a moment ago."""
        if self.is_near(state) or not completions or completions == self.newest:
            return
        self.last, self.newest = state.global_step, completions
        for values in completions:
            self.record.log_completion(state.global_step, **values)

    def is_near(self, state: Any) -> bool:
        """Whether completions were recorded a moment ago; the last ones of a run are recorded all the same."""
        near = self.last is not None and state.global_step - self.last < state.max_steps / MOMENTS
        return near and state.global_step < state.max_steps


def prompt_ids(row: dict[str, Any]) -> list[int]:
    """Returns the token ids of a row's prompt: before what is trained, or the beginning of a text."""
    if "prompt_ids" in row:
        return list(row["prompt_ids"])
    pairs = zip(row.get("input_ids", ()), row.get("labels", ()), strict=False)
    prompt = [int(token) for token, _ in takewhile(lambda pair: pair[1] == -100, pairs)]
    return prompt or [int(token) for token in row.get("input_ids", ())[:TEXT_TOKENS]]

"""What the model answers while it trains, for the report: `completions.jsonl`, which changes nothing of the run. GRPO
and PPO sample anyway. Other stages complete, greedily, the beginnings of a few validation rows after their
evaluations, for a small share of the run's time; scores of answers are `gates`."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from transformers import TrainerCallback

from llmlab.inference import context_length, generate_tokens
from llmlab.runs.gates import generating, has_whole_weights
from llmlab.runs.record import RunRecord
from llmlab.settings.errors import reason_of
from llmlab.settings.generation import SamplingSettings
from llmlab.terminal import safe

COUNT = 2  # completions at a time
ROWS = 16  # of the validation data, of which those are taken whose prompts leave room for an answer
MOMENTS = 50  # of a run, at most
TEXT_TOKENS = 24  # of a text without a prompt
SAMPLING = SamplingSettings(temperature=0, max_new_tokens=48)
SHARE = 0.02  # of the run's time, at most, but for the first and the last ones


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
        affordable = last or self.spent + self.cost <= SHARE * (time.monotonic() - self.began)
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

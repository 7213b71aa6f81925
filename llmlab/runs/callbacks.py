"""Trainer callbacks that every stage shares: when to save, how to stop, where the learning rate and the data go on.

What people see of a run is in `progress.py`.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmlab.runs import checkpoints
from llmlab.runs.record import RunRecord, read_metrics
from llmlab.runs.signals import handle_signals, interrupt
from llmlab.settings.errors import reading
from llmlab.settings.files import read_json, write_atomically

SAME_SIGNAL = 1.0  # seconds within which a launcher passes on the signal that its terminal sent to all
STREAM_STATE = "stream_state.json"
NOT_METRICS = ("epoch", "total_flos", "num_tokens", "eval_num_tokens")


class Rhythm(TrainerCallback):
    """Evaluates on the last step too, and saves each new best, every so many steps, at the end and on interrupt.

    Args:
        best_only: save at an evaluation only when it is the best yet; False, without `save_every`, saves at each.
        evaluates: whether there is validation data.
        save_every: steps between two saves beside those of new bests.
        best_is: `reward` where the best is the largest reward on the validation data, not the smallest loss.
    """

    def __init__(self, *, best_only: bool, evaluates: bool, save_every: int | None = None, best_is: str = "loss"):
        self.best_only = best_only
        self.best_is = best_is
        self.evaluates = evaluates
        self.save_every = save_every
        self.signal: int | None = None
        self.since = 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        last = state.global_step >= state.max_steps
        if last and self.evaluates:
            control.should_evaluate = True
        self.signal = largest_of_all(self.signal or 0, args.device) or None
        if self.signal:
            control.should_training_stop = True
        if last or self.signal or (self.save_every and state.global_step % self.save_every == 0):
            control.should_save = True
        return control

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> TrainerControl:
        if state.global_step == 0:  # before training: a start to compare with
            return control
        better = is_better(metrics[f"eval_{self.best_is}"], state.best_metric, self.best_is)
        if better or not (self.best_only or self.save_every):
            control.should_save = True
        return control

    @contextmanager
    def listen(self, say: Any) -> Iterator[None]:
        """Turns the first signal to stop into a save after the current step; the second one stops at once."""

        def stop(number: int) -> None:
            if self.signal and time.monotonic() - self.since > SAME_SIGNAL:
                interrupt(number)
            if not self.signal:
                self.signal, self.since = number, time.monotonic()
                say("stopping: the current step is finished and saved first; once more stops at once")

        with handle_signals(stop):
            yield

    def end_if_interrupted(self) -> None:
        """Ends a run that a signal stopped, after it was saved."""
        if self.signal:
            interrupt(self.signal)


def largest_of_all(number: int, device: torch.device) -> int:
    """Returns the largest of all processes' numbers: what one of them heard all must heed after the same step."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return number
    numbers = torch.tensor(number, device=device)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    return int(numbers)


def is_better(value: float, best: float | None, name: str) -> bool:
    """Returns whether a reward or loss on the validation data is finite and better than the best before."""
    return math.isfinite(value) and (best is None or (value > best if name == "reward" else value < best))


class Perplexity(TrainerCallback):
    """Logs the perplexity beside each validation loss, where that is the mean of tokens in nats."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if "eval_loss" in logs:
            logs["eval_perplexity"] = perplexity(logs["eval_loss"])
            state.log_history[-1]["eval_perplexity"] = logs["eval_perplexity"]  # the trainer kept a copy


def perplexity(loss: float) -> float:
    """Returns e to the power of a loss in nats a token, as far as a float goes."""
    return math.exp(min(loss, 700.0))


class ScheduleAfterResume(TrainerCallback):
    """Sets the learning rate that this run's schedule gives for the resumed step.

    The saved optimizer carries the rate of the schedule it was saved under, which is stale when `max_steps` was
    extended, and absent when the optimizer was switched.
    """

    def __init__(self, step: int):
        self.step = step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        scheduler = kwargs["lr_scheduler"]
        rates = [base * scale(self.step) for base, scale in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": self.step, "_last_lr": rates})
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


class WholeCheckpoints(TrainerCallback):
    """Declares a checkpoint whole when every process and callback has written its part, then removes worse ones.

    Args:
        trainer: whose checkpoints they are.
        keep: how many of the best stay beside the last; None keeps all.
    """

    def __init__(self, trainer: Trainer, keep: int | None):
        self.trainer, self.keep = trainer, keep

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.best_model_checkpoint:  # the run folder may have moved since
            state.best_model_checkpoint = str(Path(args.output_dir) / Path(state.best_model_checkpoint).name)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            checkpoints.complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            if state.global_step < state.max_steps:  # else after the final save
                self.rotate(args, state)

    def rotate(self, args: TrainingArguments, state: TrainerState) -> None:
        """Removes all checkpoints but the last and the best ones."""
        if self.keep is None:
            return
        metric, sign = args.metric_for_best_model, 1 if args.greater_is_better else -1
        scores = {line["step"]: sign * line[metric] for line in state.log_history if metric in line}
        checkpoints.rotate(Path(args.output_dir), self.keep, scores, best=state.best_model_checkpoint)


class ResumableStream(Protocol):
    """A stream of rows that can say where it was after so many rows, and go on from there."""

    def state_at(self, rows: int) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StreamPosition(TrainerCallback):
    """Saves with each checkpoint where a streaming source stands, so that resuming does not read it again.

    Args:
        stream: the training rows.
        rows_per_step: rows that one update consumes on this process.
    """

    def __init__(self, stream: ResumableStream, rows_per_step: int, rank: int):
        self.stream = stream
        self.rows_per_step = rows_per_step
        self.rank = rank

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        position = self.stream.state_at(state.global_step * self.rows_per_step)
        write_atomically(checkpoint / f"{self.rank}-{STREAM_STATE}", json.dumps(position))

    def restore(self, checkpoint: Path) -> None:
        """Moves the stream to where it was at a checkpoint."""
        path = checkpoint / f"{self.rank}-{STREAM_STATE}"
        with reading(path, "the position of a stream"):
            self.stream.load_state_dict(read_json(path))


class MetricsLog(TrainerCallback):
    """Writes every log event of the trainer into the run's record.

    Args:
        record: of the run.
        tokens_per_step: where every row has the same length; None takes the trainer's own count, `num_tokens`.
    """

    def __init__(self, record: RunRecord, tokens_per_step: int | None):
        self.record = record
        self.tokens_per_step = tokens_per_step
        self.tokens = 0
        self.tokens_before = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step:  # resumed: the trainer counts its tokens from nothing again
            lines = read_metrics(self.record.folder)
            self.tokens_before = self.tokens = lines[-1]["tokens"] if lines else 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        metrics = {name: value for name, value in logs.items() if name not in NOT_METRICS}
        if self.tokens_per_step is not None:
            self.tokens = state.global_step * self.tokens_per_step
        elif "num_tokens" in logs:
            self.tokens = self.tokens_before + int(logs["num_tokens"])
        if "train_runtime" not in metrics:  # the trainer's closing summary is not an event of a step
            self.record.log(state.global_step, self.tokens, metrics)

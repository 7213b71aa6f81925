"""Trainer callbacks that every stage shares: when to save, how to stop, where the learning rate and the data go on.

What people see of a run is in `progress.py`.
"""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmlab.settings.errors import reading
from llmlab.settings.files import read_json, write_atomically
from llmlab.training.record import RunRecord, read_metrics

STREAM_STATE = "stream_state.json"
NOT_METRICS = ("epoch", "total_flos", "num_tokens", "eval_num_tokens")


class Rhythm(TrainerCallback):
    """Evaluates on the last step too, and saves on improvement (or at every evaluation), at the end and on interrupt.

    Args:
        best_only: save only when the validation loss improves (the seed's `save_best_only`).
        evaluates: whether there is validation data.
        save_every: steps between two saves where it is not only the best that is saved; None saves at evaluations.
        best_is: `reward` where the best is the largest reward on the validation data, not the smallest loss.
    """

    def __init__(self, *, best_only: bool, evaluates: bool, save_every: int | None = None, best_is: str = "loss"):
        self.best_only = best_only and evaluates
        self.best_is = best_is
        self.evaluates = evaluates
        self.save_every = None if self.best_only else save_every
        self.interrupted = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        last = state.global_step >= state.max_steps
        if last and self.evaluates:
            control.should_evaluate = True
        if self.interrupted:
            control.should_training_stop = True
        if last or self.interrupted or (self.save_every and state.global_step % self.save_every == 0):
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
        value, best = metrics[f"eval_{self.best_is}"], state.best_metric
        better = best is None or (value > best if self.best_is == "reward" else value < best)
        if better if self.best_only else self.save_every is None:
            control.should_save = True
        return control

    @contextmanager
    def listen(self, say: Any) -> Iterator[None]:
        """Turns the first Ctrl+C (or SIGTERM) into a save after the current step; the second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals reach the main thread only
            return

        def stop(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            say("stopping: the current step is finished and saved first; once more stops at once")

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


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

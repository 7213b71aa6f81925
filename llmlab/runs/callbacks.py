"""Trainer callbacks that all stages share: when to save, checkpoints, resuming schedules and streams, metrics; and
trackers (`report_to`), Transformers' own callbacks, which get what `metrics.jsonl` gets, under its names."""

import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather, patch_environment
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks, rewrite_logs

from llmlab.health.symptoms import Event
from llmlab.runs import checkpoints
from llmlab.runs.record import TENSORBOARD, RunRecord, read_metrics
from llmlab.runs.signals import handle_signals, interrupt
from llmlab.settings.errors import reading

PROJECTS = {"trackio": "TRACKIO_PROJECT", "wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}
SAME_SIGNAL = 1.0  # seconds within which a second signal is the launcher passing on the first one
NOT_METRICS = ("epoch", "total_flos", "num_tokens", "eval_num_tokens")


@dataclass(eq=False)
class SaveSchedule(TrainerCallback):
    """Evaluates at the last step too, and saves a checkpoint at each new best, at the last step and on a stop signal.
    `save_every` adds one every so many steps; without it and `load_best_model_at_end` every evaluation saves one."""

    save_every: int | None
    received: int | None = None  # by this process
    received_at: float = 0.0
    signal: int | None = None  # by any process, as all know it

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        if last and args.eval_strategy != "no":
            control.should_evaluate = True
        self.agree(args)
        if self.signal:
            control.should_training_stop = True
        if last or self.signal or (self.save_every and state.global_step % self.save_every == 0):
            control.should_save = True

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 0:  # the baseline before training
            return
        value = kwargs["metrics"][args.metric_for_best_model]
        better = is_better(value, state.best_metric, args.greater_is_better)
        if better or not (args.load_best_model_at_end or self.save_every):
            control.should_save = True

    @contextmanager
    def listen(self, say: Callable[[str], None]) -> Iterator[None]:
        """Ends training after the current step, with a checkpoint, at the first stop signal; at once at a second."""

        def stop(number: int) -> None:
            if self.received and time.monotonic() - self.received_at > SAME_SIGNAL:
                interrupt(number)
            if not self.received:
                self.received, self.received_at = number, time.monotonic()
                say("stopping after the current step, with a checkpoint; a second Ctrl+C stops at once")

        with handle_signals(stop):
            yield

    def agree(self, args: Any) -> None:
        """Tells every process of a signal that one received, so that all stop at the same step."""
        self.signal = self.received
        if args.world_size > 1:  # a signal that arrives while processes gather waits for the next step
            self.signal = int(gather(torch.tensor(self.signal or 0, device=args.device)).max()) or None

    def end_if_interrupted(self, args: Any) -> None:
        """Ends a run that a signal stopped, after its checkpoint was saved."""
        self.agree(args)
        if self.signal:
            interrupt(self.signal)


def is_better(value: float, best: float | None, greater: bool) -> bool:
    """Returns whether a validation metric is finite and a new best."""
    return math.isfinite(value) and (best is None or (value > best if greater else value < best))


class StageMetrics(TrainerCallback):
    """Gives a trainer's metrics (keys of `names`) llmlab's names, and adds the perplexity of mean token losses."""

    names: ClassVar[dict[str, str]] = {}

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        for theirs, ours in self.names.items():
            if prefix + theirs in logs:
                logs[prefix + ours] = logs.pop(prefix + theirs)
        self.add_metrics(logs, prefix, state)
        state.log_history[-1] = {**logs, "step": state.global_step}  # the trainer kept a copy under its own names

    def add_metrics(self, logs: dict[str, Any], prefix: str, state: TrainerState) -> None:
        """Changes the metrics of one log event, whose names start with `prefix`."""
        if "eval_loss" in logs:
            logs["eval_perplexity"] = perplexity(logs["eval_loss"])


def perplexity(loss: float) -> float:
    """Returns exp(loss) of a mean token loss in nats, capped where floats overflow."""
    return math.exp(min(loss, 700.0))


class ResumedSchedule(TrainerCallback):
    """Sets the learning rate of this run's schedule at the resumed step: that of the checkpoint is wrong where
    `max_steps` was extended, and missing where the optimizer's state was not loaded."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scheduler, step = kwargs["lr_scheduler"], state.global_step
        rates = [base * scale(step) for base, scale in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": step, "_last_lr": rates})
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


@dataclass(eq=False)
class CheckpointRotation(TrainerCallback):
    """Marks checkpoints as complete when every process and callback wrote its part, and rotates them."""

    trainer: Trainer
    keep: int | None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.best_model_checkpoint:  # the run folder may have moved since
            state.best_model_checkpoint = str(Path(args.output_dir) / Path(state.best_model_checkpoint).name)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            checkpoints.complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            if state.global_step < state.max_steps:  # else after the final save
                self.rotate(args, state)

    def rotate(self, args: TrainingArguments, state: TrainerState) -> None:
        """Removes all checkpoints but the last and the best ones."""
        if self.keep is not None:
            metric, sign = args.metric_for_best_model, 1 if args.greater_is_better else -1
            scores = {line["step"]: sign * line[metric] for line in state.log_history if metric in line}
            checkpoints.rotate(Path(args.output_dir), self.keep, scores, best=state.best_model_checkpoint)


class EmptyCache(TrainerCallback):
    """Returns to the system, between epochs, what MPS keeps of the memory that they share (RL guide, section 5)."""

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        torch.mps.empty_cache()


@dataclass(eq=False)
class ProcessState(TrainerCallback):
    """Saves what each process alone knows, as `state_at(step)`, with the checkpoints, and restores it. Without
    `required`, a process that has no file there (there were fewer) reads the first one's."""

    file: str
    checkpoint: Path | None
    state_at: Callable[[int], Any]
    restore: Callable[[Any], None]
    required: bool = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.checkpoint is None:
            return
        path = self.checkpoint / f"{args.process_index}-{self.file}"
        if not self.required and not path.is_file():
            path = self.checkpoint / f"0-{self.file}"
        if self.required or path.is_file():
            with reading(path, "a state of the run"):
                # the device type only: torch.load has no map_location `cpu:0`
                self.restore(torch.load(path, map_location=args.device.type))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(self.state_at(state.global_step), checkpoint / f"{args.process_index}-{self.file}")


@dataclass(eq=False)
class MetricsLog(TrainerCallback):
    """Appends log events to `metrics.jsonl`; tokens are the trainer's own count where `tokens_per_step` is None."""

    record: RunRecord
    tokens_per_step: int | None
    tokens: int = 0
    tokens_before: int = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step:  # resumed: the trainer counts its tokens from zero again
            lines = read_metrics(self.record.folder)
            self.tokens_before = self.tokens = lines[-1]["tokens"] if lines else 0

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if self.tokens_per_step is not None:
            self.tokens = state.global_step * self.tokens_per_step
        elif "num_tokens" in logs:
            self.tokens = self.tokens_before + int(logs["num_tokens"])
        if metrics := metrics_of(logs):
            self.record.log(state.global_step, self.tokens, metrics)


def metrics_of(logs: dict[str, Any]) -> dict[str, Any]:
    """Returns the metrics of a log event; the trainer's closing summary, which belongs to no step, has none."""
    return {} if "train_runtime" in logs else {name: v for name, v in logs.items() if name not in NOT_METRICS}


@contextmanager
def trackers(trainer: Trainer, record: RunRecord | None, folder: Path, done: int) -> Iterator[list[tuple[str, str]]]:
    """Puts a trainer's trackers behind all callbacks that add metrics, and ends their runs, however training ends. The
    run resumes after `done` steps; yields the rows of the plan."""
    names = list(trainer.args.report_to)
    # the folder that holds the run's, or where that is just `runs`, the one above
    project = next((up.name for up in folder.absolute().parents if up.name not in ("", "runs")), "llmlab")
    chosen = {variable: os.environ.get(variable, project) for variable in PROJECTS.values()}
    trainer.args.project = chosen["TRACKIO_PROJECT"]
    if record is not None:  # a resumed run keeps its start, a new one in its place has another
        trainer.args.run_name = f"{folder.absolute().name} {record.values['started'][:19].replace('T', ' ')}"
    callbacks = [trainer.pop_callback(kind) for kind in get_reporting_integration_callbacks(names)]
    for name, callback in zip(names, callbacks, strict=True):
        callback.on_log = feed(name, callback)
        if name == "tensorboard" and record is not None:
            from torch.utils.tensorboard import SummaryWriter

            place = callback.logging_dir or folder / TENSORBOARD  # the former is the environment's
            callback.tb_writer = SummaryWriter(str(place), purge_step=done + 1 if done else None)
        elif name == "trackio":
            for event in ("on_train_begin", "on_train_end"):
                setattr(callback, event, without_output(getattr(callback, event)))
            if record is not None:
                record.listeners.append(without_output(alert))
        trainer.add_callback(callback)
    looks = {"trackio": f"trackio show --project '{trainer.args.project}'"}
    looks["tensorboard"] = f"tensorboard --logdir {folder}"
    try:
        with patch_environment(**chosen):
            yield [("tracker", looks.get(name) or f"{name}, {chosen[PROJECTS[name]]}") for name in names]
    except BaseException:
        for callback in callbacks:
            callback.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
        raise
    finally:
        if "wandb" in names and "wandb" in sys.modules:  # else the next run here would log into this one's
            sys.modules["wandb"].finish()


def feed(name: str, callback: Any) -> Callable[..., None]:
    """Returns a callback's `on_log` that passes on what `metrics.jsonl` gets, all of it at the optimizer's step."""
    pass_on = callback.on_log

    def on_log(args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        # the callbacks call `eval_loss` eval/loss and all others train/...: a gate is an evaluation
        metrics = {f"eval_{key}" if key.startswith("gate/") else key: v for key, v in metrics_of(logs).items()}
        if name == "trackio" and metrics and state.is_world_process_zero:
            callback._trackio.log(rewrite_logs(metrics), step=state.global_step)  # it would count log events
        elif metrics:
            pass_on(args, state, control, logs=metrics, **kwargs)

    return on_log


def without_output(function: Callable[..., None]) -> Callable[..., None]:
    """Returns a function that prints nothing, of trackio: llmlab's plan and health events say the same."""

    def silent(*args: Any, **kwargs: Any) -> None:
        with redirect_stdout(io.StringIO()):
            function(*args, **kwargs)

    return silent


def alert(event: Event) -> None:
    """Forwards a health event to trackio's present run, where there is one."""
    import trackio

    level = trackio.AlertLevel.ERROR if event.severity == "critical" else trackio.AlertLevel.WARN
    if run := trackio.context_vars.current_run.get():  # `trackio.alert` would take the step of the last log event
        run.alert(event.symptom, f"{event.message} {event.action}".strip(), level, step=event.step)

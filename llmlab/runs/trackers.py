"""Trackers (`report_to`): Transformers' own callbacks, which get what `metrics.jsonl` gets, under its names.

They begin and end a tracker's run; names of projects and runs, and forwarding of health events, are here.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from accelerate.utils import patch_environment
from transformers import Trainer, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks, rewrite_logs

from llmlab.health.symptoms import Event
from llmlab.runs.callbacks import metrics_of
from llmlab.runs.record import TENSORBOARD, RunRecord

PROJECTS = {"trackio": "TRACKIO_PROJECT", "wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}


class Tracker(TrainerCallback):
    """Passes a run's events on to Transformers' callback of one tracker."""

    def __init__(self, name: str, callback: TrainerCallback, record: RunRecord | None):
        self.name, self.callback, self.running = name, callback, False
        if record is not None and name == "trackio":
            record.listeners.append(self.alert)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        with redirect_stdout(io.StringIO()):  # trackio's greeting: the plan says the same
            self.callback.on_train_begin(*args, **kwargs)
        self.running = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        # the callbacks call `eval_loss` eval/loss and all others train/...: a gate is an evaluation
        metrics = {f"eval_{name}" if name.startswith("gate/") else name: v for name, v in metrics_of(logs).items()}
        if self.name == "trackio" and metrics and state.is_world_process_zero:
            self.callback._trackio.log(rewrite_logs(metrics), step=state.global_step)  # it would count log events
        elif metrics:
            self.callback.on_log(args, state, control, logs=metrics, **kwargs)

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.callback.on_save(*args, **kwargs)

    def on_push_begin(self, *args: Any, **kwargs: Any) -> None:
        if hasattr(self.callback, "on_push_begin"):
            self.callback.on_push_begin(*args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        with redirect_stdout(io.StringIO()):
            self.callback.on_train_end(*args, **kwargs)
        self.running = False

    def alert(self, event: Event) -> None:
        """Forwards a health event to trackio, which prints it where nothing keeps it from doing so."""
        import trackio

        level = trackio.AlertLevel.ERROR if event.severity == "critical" else trackio.AlertLevel.WARN
        with redirect_stdout(io.StringIO()):
            trackio.alert(event.symptom, f"{event.message} {event.action}".strip(), level)


@contextmanager
def trackers(trainer: Trainer, record: RunRecord | None, folder: Path, done: int) -> Iterator[list[tuple[str, str]]]:
    """Puts a trainer's trackers behind all callbacks that add metrics, and ends their runs, however training ends.

    A run that resumes after `done` steps keeps its name; yields the rows of the plan.
    """
    names = [] if trainer.args.report_to in ("none", None) else list(trainer.args.report_to)
    project = project_of(folder)
    chosen = {variable: os.environ.get(variable, project) for name, variable in PROJECTS.items() if name in names}
    trainer.args.project = chosen.get("TRACKIO_PROJECT", project)
    if record is not None:
        trainer.args.run_name = run_name(folder, record.values["started"])
    attached = []
    for name, kind in zip(names, get_reporting_integration_callbacks(names), strict=True):
        callback = trainer.pop_callback(kind)
        if name == "tensorboard" and record is not None:
            from torch.utils.tensorboard import SummaryWriter

            place = callback.logging_dir or folder / TENSORBOARD
            callback.tb_writer = SummaryWriter(str(place), purge_step=done + 1 if done else None)
        attached.append(Tracker(name, callback, record))
        trainer.add_callback(attached[-1])
    try:
        with patch_environment(**chosen):
            yield [("trackers", where) for where in describe(names, chosen, folder)]
    finally:
        for tracker in (tracker for tracker in attached if tracker.running):
            tracker.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
        if "wandb" in names and "wandb" in sys.modules:  # else the next run here would log into this one's
            sys.modules["wandb"].finish()


def describe(names: list[str], projects: dict[str, str], folder: Path) -> list[str]:
    """Returns a line on each tracker: how its curves are looked at, or its project."""
    lines = {
        "trackio": f"trackio show --project {projects.get('TRACKIO_PROJECT')}",
        "tensorboard": f"tensorboard --logdir {folder}",
    }
    return [lines.get(name) or f"{name}: {projects.get(PROJECTS[name])}" for name in names]


def project_of(folder: Path) -> str:
    """Returns the name of the folder that holds a run's folder, or where that is just `runs`, of the one above."""
    parents = [parent.name for parent in folder.absolute().parents if parent.name not in ("", "runs")]
    return parents[0] if parents else "llmlab"


def run_name(folder: Path, started: str) -> str:
    """Returns a name that a run keeps when it is resumed, and that a new run in its place does not get."""
    return f"{folder.absolute().name} {started[:19].replace('T', ' ')}"

"""Trackers (`report_to`): Transformers' own callbacks, which get what `metrics.jsonl` gets, under its names. They
begin and end a tracker's run; the names of projects and runs, and forwarding of health events, are here."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from accelerate.utils import patch_environment
from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks, rewrite_logs

from llmlab.health.symptoms import Event
from llmlab.runs.callbacks import metrics_of
from llmlab.runs.record import TENSORBOARD, RunRecord

PROJECTS = {"trackio": "TRACKIO_PROJECT", "wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}


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

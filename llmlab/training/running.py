"""What the stages after pretraining share around their trainers: where a run starts, how it goes, what it leaves.

A stage makes its policy, its data and its trainer, and hands the trainer over; the loss is never looked at here.
"""

import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Generic, TypeVar

from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed

from llmlab.hardware import probe
from llmlab.optim.build import check_supported
from llmlab.settings.base import Settings
from llmlab.settings.errors import UserError
from llmlab.settings.sources import Resolved
from llmlab.training import checkpoints
from llmlab.training.callbacks import MetricsLog, Rhythm, ScheduleAfterResume
from llmlab.training.failures import check_disk, failures_recorded
from llmlab.training.progress import ProgressLine, print_plan, print_result, quiet_libraries
from llmlab.training.record import RunRecord, RunResult
from llmlab.training.resume import check_whole, find_checkpoint

BEST_ADAPTERS = "best_lora_adapters"
S = TypeVar("S", bound=Settings)


class Run(Generic[S]):
    """One run of a stage, from its settings to its folder.

    Making it checks everything that needs neither model nor data, and seeds every random state.

    Args:
        stage: the stage's name.
        settings: of the stage, resolved or plain.
        resume: a run folder of this stage to continue from its last checkpoint.
        load_optimizer: with `resume`, whether to restore the optimizer's state.
        console: where to print; None is the terminal of the main process.

    Raises:
        UserError: the folder is taken or cannot be written, the machine lacks what is asked for, or the run cannot be
            resumed with these settings.
    """

    def __init__(
        self,
        stage: str,
        settings: S | Resolved[S],
        *,
        resume: str | Path | None,
        load_optimizer: bool,
        console: Console | None,
    ):
        self.stage = stage
        self.resolved = settings if isinstance(settings, Resolved) else Resolved(settings, {})
        self.settings: Any = self.resolved.settings
        self.hardware = probe(self.settings.device, self.settings.dtype)
        self.process = PartialState(cpu=self.hardware.device == "cpu")
        self.console = console or Console(quiet=not self.process.is_main_process)
        check_supported(self.settings.optimizer, self.process.distributed_type)
        self.folder = checkpoints.claim(self.settings.output_dir, resume=resume is not None)
        self.checkpoint = None
        if resume is not None:
            self.checkpoint = find_checkpoint(self.folder, self.settings, load_optimizer=load_optimizer)
            check_whole(self.checkpoint)
        self.done = checkpoints.saved_step(self.checkpoint) if self.checkpoint else 0
        set_seed(self.settings.seed)

    def reading(self) -> AbstractContextManager[Any]:
        """Returns the context that data is read in: its progress shows on terminals alone."""
        return nullcontext() if self.console.is_terminal else quiet_libraries()

    def callbacks(self, *, evaluates: bool, best_is: str = "loss") -> list[TrainerCallback]:
        """Makes the callbacks that the trainer is built with; `best_is` as in `Rhythm`."""
        settings = self.settings
        self.rhythm = Rhythm(
            best_only=settings.save_best_only, evaluates=evaluates, save_every=settings.save_every, best_is=best_is
        )
        self.progress = ProgressLine(self.console, tokens_per_step=None, flops_per_token=None, peak_flops=None)
        return [self.rhythm, self.progress]

    def train(
        self,
        trainer: Trainer,
        *,
        steps: int,
        plan: list[tuple[str, str]],
        parents: list[str],
        data: dict[str, Any],
        callbacks: list[TrainerCallback] | None = None,
        save: Callable[[Trainer, Path], None] | None = None,
    ) -> RunResult:
        """Trains, saves the run folder and returns it with its last metrics.

        Args:
            trainer: of the stage, with the callbacks from here.
            steps: optimizer updates in all.
            plan: lines to print before the first step.
            parents: run folders or hub ids that the run starts from.
            data: plain values about the data, for the record.
            callbacks: further ones, which may add metrics: they come before those that print and record.
            save: writes the finished model into a folder; None is `save_policy`.

        Raises:
            UserError: nothing is left to do, or memory or disk ran out.
            KeyboardInterrupt: after an interrupted run was saved.
        """
        if self.done >= steps:
            raise UserError(f"--resume {self.folder}: it already is at step {self.done}; train longer to extend it")
        trainer.remove_callback(PrinterCallback)  # the progress line tells the same
        for callback in callbacks or ():
            trainer.callback_handler.callbacks.insert(0, callback)
        record = None
        if self.process.is_main_process:
            trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            check_disk(self.folder, needed=(3 * 4 + 2 * 8) * trained)
            record = self._new_record(parents, data)
            record.start(self.done if self.checkpoint else None)
            trainer.add_callback(MetricsLog(record, self.progress.tokens_per_step))
        if self.checkpoint is not None:
            trainer.add_callback(ScheduleAfterResume(self.done))
        with (
            quiet_libraries(),
            failures_recorded(self.stage, self.folder, record, self.progress),
            self.rhythm.listen(self.progress.say),
        ):
            print_plan(self.console, f"{self.stage}: into {self.folder}", plan)
            trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
            trainer.accelerator.wait_for_everyone()
            if self.rhythm.interrupted:
                raise KeyboardInterrupt
            checkpoints.publish(self.folder, lambda temporary: (save or save_policy)(trainer, temporary))
        metrics = last_metrics(trainer)
        if record is not None:
            record.finish("finished", step=trainer.state.global_step, metrics=metrics)
        print_result(self.console, self.folder, metrics, before=first_evaluation(trainer))
        return RunResult(self.folder, metrics)

    def _new_record(self, parents: list[str], data: dict[str, Any]) -> RunRecord:
        record = RunRecord(
            self.folder,
            stage=self.stage,
            settings=self.settings.recorded(),
            sources=self.resolved.sources,
            parents=parents,
            hardware=self.hardware.record(),
        )
        record.values["data"] = data
        return record


def total_steps(settings: Any, rows: int, *, rows_per_batch: int, accumulation: int) -> int:
    """Returns the optimizer updates of a run over so many rows, as the trainer counts them.

    Args:
        settings: with `epochs` and `max_steps`.
        rows: training rows of one pass.
        rows_per_batch: rows of a forward pass on all processes.
        accumulation: forward passes of an update.
    """
    if settings.epochs is None:
        return settings.max_steps
    batches = math.ceil(rows / rows_per_batch)
    return math.ceil(settings.epochs * max(math.ceil(batches / accumulation), 1))


def describe_optimizer(settings: Any, steps: int) -> tuple[str, str]:
    """Returns the plan's line about optimizer and schedule."""
    warmup = settings.warmup_steps if settings.warmup_steps >= 1 else math.ceil(settings.warmup_steps * steps)
    schedule = f"{settings.scheduler} after {warmup} steps of warmup"
    if warmup >= steps:
        schedule += " [yellow](as long as the run: the peak is never reached)[/yellow]"
    return "optimizer", f"{settings.optimizer}, lr {settings.learning_rate:g}, {schedule}"


def save_policy(trainer: Trainer, folder: Path) -> None:
    """Writes weights (or adapters, and these in `best_lora_adapters/` too), tokenizer and where generation stops."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel):
        if trainer.accelerator.is_main_process:
            # the active adapter alone: a frozen copy beside it is the reference of a preference loss
            model.save_pretrained(folder, selected_adapters=["default"])
            trainer.processing_class.save_pretrained(folder)
            if model.get_base_model().can_generate():  # a model that scores cannot
                model.get_base_model().generation_config.save_pretrained(folder)
            files = [path for path in folder.iterdir() if path.name != "README.md"]
            (folder / BEST_ADAPTERS).mkdir()
            for path in files:
                shutil.copy2(path, folder / BEST_ADAPTERS)
        return
    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)


def first_evaluation(trainer: Trainer) -> dict[str, float]:
    """Returns the metrics on the validation data before the first step; none where that was not asked."""
    return next((line for line in trainer.state.log_history if line["step"] == 0 and "eval_loss" in line), {})


def last_metrics(trainer: Trainer) -> dict[str, float]:
    """Returns the last value of each metric; what the best is chosen by is that of the weights that were kept."""
    metrics: dict[str, float] = {}
    for line in trainer.state.log_history:
        metrics.update({name: value for name, value in line.items() if isinstance(value, (int, float))})
    if trainer.args.load_best_model_at_end and trainer.state.best_metric is not None:
        metrics[trainer.args.metric_for_best_model] = trainer.state.best_metric
    return metrics

"""What the stages after pretraining share around their trainers: where a run starts, how it goes, what it leaves.

A stage makes its policy, its data and its trainer, and hands the trainer over; the loss is never looked at here.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Generic

from peft import PeftModel
from rich.text import Text
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from llmlab.model import fit_context
from llmlab.runs import checkpoints
from llmlab.runs.callbacks import MetricsLog, Rhythm, ScheduleAfterResume, WholeCheckpoints
from llmlab.runs.compile import compile_if_worth
from llmlab.runs.failures import check_disk, failures_recorded
from llmlab.runs.progress import ProgressLine, print_plan, print_result, quiet_libraries
from llmlab.runs.record import RunRecord, RunResult, read_record
from llmlab.runs.start import S, Start
from llmlab.settings.base import spellings_of
from llmlab.settings.trust import destinations

BEST_ADAPTERS = "best_lora_adapters"


class Run(Generic[S]):
    """One run of a stage, from where it starts to its folder; making it seeds every random state.

    Args:
        stage: the stage's name.
        start: what `begin` yields.
    """

    def __init__(self, stage: str, start: Start[S]):
        self.stage = stage
        self.start = start
        self.resolved = start.resolved
        self.settings: Any = start.resolved.settings
        self.hardware, self.process, self.console = start.hardware, start.process, start.console
        self.folder, self.checkpoint, self.done = start.folder, start.checkpoint, start.done
        set_seed(self.settings.seed)

    def reading(self) -> AbstractContextManager[Any]:
        """Returns the context that data is read in: its progress shows on terminals alone."""
        return nullcontext() if self.console.is_terminal else quiet_libraries()

    def extent(self, rows_per_step: float) -> dict[str, Any]:
        """Returns how far sources are read, for `build_rows`: as far as the run needs, resumed as far as it did."""
        steps = self.settings.max_steps if getattr(self.settings, "epochs", None) is None else None
        before = read_record(self.folder).get("data", {}).get("sources") if self.checkpoint else None
        return {
            "rows_needed": None if steps is None else math.ceil(steps * rows_per_step),
            "rows_before": None if before is None else [source["rows"] for source in before],
        }

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
        plan: Sequence[tuple[str, str | Text]],
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
        trainer.has_all_steps = self.start.has_all_steps(steps)
        compiled = compile_if_worth(
            trainer.model,
            self.settings.compile,
            device_type=self.hardware.device,
            steps=steps - self.done,
            tokens_per_step=self._tokens_per_step(trainer, data),
        )
        trainer.remove_callback(PrinterCallback)  # the progress line tells the same
        for callback in callbacks or ():
            trainer.callback_handler.callbacks.insert(0, callback)
        record = None
        if self.process.is_main_process:
            trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            check_disk(self.folder, needed=(3 * 4 + 2 * 8) * trained)
            record = self._new_record(parents, data)
            record.start(self.start.resumed_step)
            trainer.add_callback(MetricsLog(record, self.progress.tokens_per_step))
        if self.checkpoint is not None:
            trainer.add_callback(ScheduleAfterResume(self.done))
        if isinstance(trainer.model, PeftModel):
            trainer.add_callback(BestAdapters(trainer, self.folder))
        whole = WholeCheckpoints(trainer, self.settings.save_total_limit)
        trainer.add_callback(whole)  # the last to be called
        with (
            quiet_libraries(),
            failures_recorded(self.stage, self.folder, record, self.progress, self.settings),
            self.rhythm.listen(self.progress.say),
        ):
            sent = destinations(self.settings.trainer_args, self.settings.output_dir)
            title = f"{self.stage}: into {self.folder}"
            print_plan(self.console, title, [*plan, ("compile", compiled), *sent])
            trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
            trainer.accelerator.wait_for_everyone()
            self.rhythm.end_if_interrupted()
            trainer.check_weights()
            checkpoints.publish(self.folder, lambda temporary: (save or save_policy)(trainer, temporary))
        metrics = last_metrics(trainer)
        if record is not None:
            record.finish("finished", step=trainer.state.global_step, metrics=metrics)
            whole.rotate(trainer.args, trainer.state)
        print_result(self.console, self.folder, metrics, before=first_evaluation(trainer))
        return RunResult(self.folder, metrics)

    def _tokens_per_step(self, trainer: Trainer, data: dict[str, Any]) -> float:
        """Estimates the tokens that this process sees in an update."""
        if self.progress.tokens_per_step is not None:
            return self.progress.tokens_per_step / self.process.num_processes
        counted = sum(source["counts"]["tokens"] for source in data["sources"])
        in_a_row = counted / sum(source["trained_rows"] for source in data["sources"])
        in_a_row += getattr(self.settings, "max_new_tokens", 0)  # what is sampled comes after the prompt
        return in_a_row * trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps

    def _new_record(self, parents: list[str], data: dict[str, Any]) -> RunRecord:
        record = RunRecord(
            self.folder,
            stage=self.stage,
            settings=self.settings.recorded(),
            sources=self.resolved.sources,
            parents=parents,
            hardware=self.hardware.record(),
        )
        record.values |= {"data": data, "data_files": self.start.data_files}
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


def describe_optimizer(settings: Any, steps: int) -> tuple[str, Text]:
    """Returns the plan's line about optimizer and schedule."""
    warmup = settings.warmup_steps if settings.warmup_steps >= 1 else math.ceil(settings.warmup_steps * steps)
    schedule = f"{settings.scheduler} after {warmup} steps of warmup"
    if warmup >= steps:
        schedule += " [yellow](as long as the run: the peak is never reached)[/yellow]"
    rate = spellings_of(type(settings))["learning_rate"].of(settings)
    return "optimizer", Text.from_markup(f"{settings.optimizer}, lr {rate:g}, {schedule}")


class BestAdapters(TrainerCallback):
    """Writes the adapters of each new best evaluation into `best_lora_adapters/`."""

    def __init__(self, trainer: Trainer, folder: Path):
        self.trainer, self.folder = trainer, folder

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.best_global_step == state.global_step:
            checkpoints.publish(self.folder, lambda temporary: save_weights(self.trainer, temporary / BEST_ADAPTERS))


def describe_evaluation(settings: Any, batches: int, *, evaluates: bool) -> tuple[str, str]:
    """Returns the plan's line about the rhythm of evaluations and how many batches each takes."""
    if not evaluates:
        return "evaluation", "none: there is no validation data"
    return "evaluation", f"every {settings.eval_every:,} steps, on {batches:,} batches at most"


def save_policy(trainer: Trainer, folder: Path) -> None:
    """Writes weights or adapters, tokenizer and where generation stops; `best_lora_adapters/` too if nothing did."""
    save_weights(trainer, folder)
    best = trainer.state.best_global_step and (Path(trainer.args.output_dir) / BEST_ADAPTERS).is_dir()
    if isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel) and not best:
        save_weights(trainer, folder / BEST_ADAPTERS)


def save_weights(trainer: Trainer, folder: Path) -> None:
    """Writes weights or adapters, tokenizer and where generation stops.

    Every process calls it, since each may hold a part of the weights; the main one writes.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    fit_context(model, trainer.processing_class)
    sharding = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    of_checkpoints = sharding and sharding.state_dict_type
    if sharding:  # else the trainer saves nothing but checkpoints of shards
        sharding.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
    if sharding:
        sharding.set_state_dict_type(of_checkpoints)
    if not trainer.accelerator.is_main_process:
        return
    (folder / "training_args.bin").unlink(missing_ok=True)
    if isinstance(model, PeftModel):
        shutil.rmtree(folder / "ref", ignore_errors=True)  # a frozen copy: the reference of a preference loss
        if model.get_base_model().can_generate():  # a model that scores cannot
            model.get_base_model().generation_config.save_pretrained(folder)


def first_evaluation(trainer: Trainer) -> dict[str, float]:
    """Returns the metrics on the validation data before the first step; none where that was not asked."""
    return next((line for line in trainer.state.log_history if line["step"] == 0 and "eval_loss" in line), {})


def last_metrics(trainer: Trainer) -> dict[str, float]:
    """Returns the last value of each metric; of the validation data those of the weights that were kept."""
    metrics: dict[str, float] = {}
    for line in trainer.state.log_history:
        metrics.update({name: value for name, value in line.items() if isinstance(value, (int, float))})
    state, best_by = trainer.state, trainer.args.metric_for_best_model
    if trainer.args.load_best_model_at_end and state.best_global_step:
        kept = (line for line in state.log_history if line["step"] == state.best_global_step and best_by in line)
        metrics.update({name: value for name, value in next(kept).items() if name.startswith("eval_")})
    return metrics

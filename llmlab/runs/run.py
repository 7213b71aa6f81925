"""One run of a training stage: holds the run folder, sets seeds, builds the trainer, trains, saves. Stages provide
model, data and trainer class; losses and data order live in the trainers."""

import inspect
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, Generic, get_args

from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from rich.console import Console
from rich.text import Text
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from llmlab.data.chat.rows import Rows, build_rows
from llmlab.hardware import Hardware, reuse_freed_memory
from llmlab.health.tables import find_outside
from llmlab.model import fit_context
from llmlab.runs import checkpoints
from llmlab.runs._trl import expose_head_bias, use_one_gpu
from llmlab.runs.arguments import build_arguments
from llmlab.runs.callbacks import CheckpointRotation, EmptyCache, MetricsLog, ResumedSchedule, SaveSchedule, trackers
from llmlab.runs.failures import check_disk, explain_out_of_memory, record_failures
from llmlab.runs.gates import CompletionLog, GateCallback, held_out_gates
from llmlab.runs.health import Health, RolledBack, describe_events, steps_to_pass_over
from llmlab.runs.page import report_at_end
from llmlab.runs.plan import describe_cost, needs_checkpointing
from llmlab.runs.policy import Policy, choose_kernels, compile_if_worth, load_policy
from llmlab.runs.progress import ProgressLine, print_plan, print_result, quiet_libraries
from llmlab.runs.record import RunRecord, RunResult, read_record
from llmlab.runs.signals import interrupt
from llmlab.runs.start import Batch, S, begin, check_steps_left, rollbacks_of, split_settings
from llmlab.settings.base import spellings_of
from llmlab.settings.errors import UserError
from llmlab.settings.gates import GATE, GatesSettings
from llmlab.settings.sources import Resolved, as_resolved
from llmlab.settings.trust import destinations, takes_trust

BEST_ADAPTERS = "best_lora_adapters"
COMMON_ARGUMENTS = """
    Every stage that trains also takes:
        resume: a run folder of this stage to continue from its last checkpoint, or a checkpoint in it.
        load_optimizer: with `resume`, whether to restore the optimizer's state; without, only weights and step count.
        allow_changed_data: with `resume`, go on although data files changed since the run began.
        console: where to print; None is the terminal.
        trust_remote_code: whether code that a model brings along may run; None is as the command line says.

    Raises UserError for what settings, models, data, machine or disk make impossible, Diverged where a loss, gradient
    or weight is not finite, and KeyboardInterrupt after an interrupted run was saved.
    """


def training_stage(
    run_class: type["Run[Any]"], *, prepare: Callable[[Resolved[Any]], Resolved[Any]] = lambda r: r
) -> Callable[[Callable[..., RunResult]], Callable[..., RunResult]]:
    """Decorator: turns `function(run, **options)` into the stage's public function of `settings`. `prepare` completes
    the settings before the run folder is claimed. The function's name is the stage's, with `_` for a hyphen."""

    def decorate(function: Callable[..., RunResult]) -> Callable[..., RunResult]:
        @wraps(function, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
        def start_run(
            settings: Any,
            *,
            resume: str | Path | None = None,
            load_optimizer: bool = True,
            allow_changed_data: bool = False,
            console: Console | None = None,
            **options: Any,
        ) -> RunResult:
            inspect.signature(function).bind(None, **options)  # an unknown keyword: before the folder is claimed
            resolved, rolled_back = prepare(as_resolved(settings)), False
            without_state = -1  # the step up to which checkpoints have another optimizer's state
            while True:
                start = {"resume": resume, "load_optimizer": load_optimizer, "allow_changed_data": allow_changed_data}
                starting = begin(run_class, function.__name__.replace("_", "-"), resolved, console=console, **start)
                with suppress(RolledBack), starting as run, report_at_end(run), explain_out_of_memory(run):
                    run.function, run.rolled_back = start_run, rolled_back
                    return function(run, **options)
                # here the exception is gone, and with it the trainer
                resume, rolled_back = run.folder, True
                without_state = without_state if load_optimizer else max(run.done, without_state)
                load_optimizer = rollbacks_of(run.folder)[-1]["to"] > without_state
                clear_device_cache(garbage_collection=True)

        run, *own = inspect.signature(function).parameters.values()
        signature = inspect.signature(start_run, follow_wrapped=False)
        settings, *common, _ = signature.parameters.values()
        kind = get_args(run.annotation)[0]  # of Run[...Settings]
        parameters = [settings.replace(annotation=kind | Resolved[kind]), *common, *own]
        start_run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        start_run.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": RunResult}
        start_run.__doc__ = (function.__doc__ or "") + COMMON_ARGUMENTS
        # for its plan, and for trials
        start_run.function, start_run.run_class, start_run.prepare = function, run_class, prepare  # type: ignore[attr-defined]
        return takes_trust(start_run)

    return decorate


@dataclass
class Run(Generic[S]):
    """One run of a stage. `resumed` is the status that an earlier part of it recorded, None for a new run."""

    stage: str
    load_optimizer: bool
    resolved: Resolved[S]
    hardware: Hardware
    process: PartialState
    console: Console
    folder: Path
    resumed: str | None
    checkpoint: Path | None
    data_files: dict[str, Any]
    batch: Batch
    rolled_back = False  # in this process: the plan was printed
    on_cpu = property(lambda self: self.hardware.device == "cpu")  # a rehearsal is always, whatever it is about

    def __post_init__(self) -> None:
        self.settings: Any = self.resolved.settings
        self.done = checkpoints.saved_step(self.checkpoint) if self.checkpoint else 0  # optimizer updates
        set_seed(self.settings.seed)

    def load_policy(self, **options: Any) -> Policy:
        """Loads the policy; `options` are those of `llmlab.runs.policy.load_policy`."""
        settings = self.settings
        options["chat_template"] = settings.chat_template
        with quiet_libraries():
            return load_policy(settings.policy_checkpoint, settings, self.hardware, **options)

    def build_rows(self, maker: Any, *, rows_per_step: float) -> Rows:
        """Returns the rows of the stage's sources, read as far as the run needs; a resumed run reads the same ones."""
        settings = self.settings
        steps = settings.max_steps if settings.epochs is None else None
        before = read_record(self.folder).get("data", {}).get("sources") if self.checkpoint else None
        # progress bars show only on a terminal
        quiet = nullcontext() if self.console.is_terminal else quiet_libraries()
        options = {"seed": settings.seed, "allow_truncated": getattr(settings, "allow_truncated", 0.05)}
        options |= {"validation_rows": self.batch.validation_rows, "max_samples": settings.max_samples}
        options["rows_needed"] = None if steps is None else math.ceil(steps * rows_per_step)
        options["rows_before"] = None if before is None else [source["rows"] for source in before]
        with self.process.main_process_first(), quiet:
            return build_rows(settings, maker, **options)

    def make_trainer(
        self,
        trainer: type[Trainer],
        config: type[TrainingArguments],
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        data: Any,
        *,
        arguments: dict[str, Any],
        progress: dict[str, Any] | None = None,
        best_metric: str = "loss",
        **options: Any,
    ) -> Any:
        """Returns the stage's trainer, whose class has `StageTrainer`, with `options` of its own, on `data.train`.
        `arguments` are those of `config` that follow neither from the settings nor from the machine, `progress` those
        of `ProgressLine`; the best checkpoint has the best validation `best_metric`, `loss` or `reward`, or the gate
        that the settings name."""
        if self.settings.gradient_checkpointing == "auto":
            chosen = {"gradient_checkpointing": needs_checkpointing(self, data.train)}
            self.settings = self.settings.model_copy(update=chosen)
        settings, evaluates = self.settings, data.validation is not None
        gates = held_out_gates(settings, model, tokenizer, self.stage != "pretrain") if settings.gates else []
        best = next((gate for gate in gates if GATE + gate.label == settings.metric_for_best_model), None)
        if best is not None:
            for problem in GatesSettings.contradictions(settings):  # eval_every may have come from completions
                raise UserError(problem)
            best_metric = f"gate/{best.label}"
            if not evaluates:
                raise UserError(f"metric_for_best_model = {GATE}{best.label}: there is no validation data")
        # SaveSchedule decides when to save; load_best_model_at_end requires a multiple of eval_steps all the same
        rhythm = {"save_strategy": "steps", "save_steps": settings.eval_every * 10**6, "eval_strategy": "no"}
        if evaluates:
            rhythm |= {
                "eval_strategy": "steps",
                "eval_steps": settings.eval_every,
                "metric_for_best_model": f"eval_{best_metric}",
                "greater_is_better": best.sign > 0 if best else best_metric == "reward",
                "load_best_model_at_end": settings.save_best_only,
            }
        self.rhythm = SaveSchedule(getattr(settings, "save_every", None if evaluates else settings.eval_every))
        self.progress = ProgressLine(self.console, **(progress or {}))
        args = build_arguments(config, settings, self.hardware, **{**rhythm, **arguments})
        use_one_gpu(args)
        with quiet_libraries():
            for each in (model, *options.values()):
                if isinstance(each, (PreTrainedModel, PeftModel)):  # the reference too
                    choose_kernels(each, settings, self.on_cpu)
            made = trainer(
                settings=settings,
                load_optimizer=self.load_optimizer,
                model=model,
                args=args,
                train_dataset=data.train,
                eval_dataset=data.validation,
                processing_class=tokenizer,
                callbacks=[self.rhythm, self.progress],
                **options,
            )
        made.on_cpu = self.on_cpu
        if isinstance(made.model, PeftModel):
            expose_head_bias(made.model)
        if gates:
            made.add_callback(GateCallback(made, gates, settings.gate_every, best, self.progress.say))
        return made

    def train(
        self,
        trainer: Trainer,
        *,
        steps: int,
        plan: Sequence[tuple[str, str | Text]],
        parents: list[str],
        data: dict[str, Any],
        callbacks: Sequence[TrainerCallback] = (),
        fixed_length: bool = False,
        optimizer_bytes: int | None = None,
        results: dict[str, float] | None = None,
    ) -> RunResult:
        """Trains for so many optimizer steps, saves the run folder and returns it with its last metrics and `results`;
        `callbacks` add metrics or state before others print and record, the last one first. `fixed_length` says that
        all rows have as many tokens; `optimizer_bytes` are by default AdamW's."""
        check_steps_left(self.folder, self.done, steps, self.resumed == "finished")
        trainer.has_all_steps = self.done == steps  # only the final save is left
        size = {"steps": steps - self.done, "tokens_per_step": self._tokens_per_step(trainer, data)}
        size |= {"device_type": self.hardware.device, "dynamic": not fixed_length}
        compiled = compile_if_worth(trainer.model, self.settings.compile, **size)
        trainer.remove_callback(PrinterCallback)  # the progress line prints the same
        for callback in callbacks:
            trainer.callback_handler.callbacks.insert(0, callback)
        record = None
        if self.process.is_main_process:
            trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            check_disk(self.folder, needed=3 * 4 * trained + 2 * (optimizer_bytes or 8 * trained))
            record = self.make_record(parents, data)
            record.values["steps"] = steps
            record.start(self.done if self.resumed else None)
            trainer.add_callback(MetricsLog(record, self.progress.tokens_per_step))
            if self.settings.report:
                trainer.add_callback(CompletionLog(record, trainer, self.progress.say))
            trainer.on_division = partial(self.note_division, record, trainer)
        health = Health(trainer, self.stage, self.folder, record, self.progress.say)
        trainer.add_callback(health)
        trainer.on_event, trainer.passed_over = health.respond, steps_to_pass_over(self.folder, self.stage)
        if self.checkpoint is not None:
            trainer.add_callback(ResumedSchedule())
        if self.hardware.device == "mps":
            trainer.add_callback(EmptyCache())
        if isinstance(trainer.model, PeftModel):
            trainer.add_callback(BestAdapters(trainer))
        rotation = CheckpointRotation(trainer, self.settings.save_total_limit)
        trainer.add_callback(rotation)  # must run after all other callbacks
        with (
            quiet_libraries(),
            reuse_freed_memory(self.hardware.device, forks=trainer.args.dataloader_num_workers > 0),
            record_failures(self.stage, self.folder, record, self.progress),
            explain_out_of_memory(self),
            self.rhythm.listen(self.progress.say),
            trackers(trainer, record, self.folder, self.done) as tracked,
        ):
            if not self.rolled_back:
                settings = self.settings
                rows = [*plan, *describe_schedule(settings, steps, trainer.eval_dataset is not None)]
                rows += [*self.hardware.rows(settings.tf32), *describe_cost(self, trainer, steps - self.done)]
                if trainer.args.gradient_checkpointing:
                    rows.append(("checkpointing", "activations are computed again in the backward pass"))
                size = sum(parameter.numel() for parameter in trainer.model.parameters())
                options = {"parameters": size, "processes": self.process.num_processes}
                unusual = find_outside(self.stage, settings, self.resolved.sources, **options)
                rows += [("unusual", Text(sentence, style="yellow")) for sentence in unusual]
                rows += [("compile", compiled), *tracked]
                rows += destinations(settings.trainer_args, settings.output_dir, settings.report_to)
                print_plan(self.console, f"{self.stage}: into {self.folder}", rows)
            try:
                trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
            except RolledBack:  # by all processes at once
                self.rhythm.end_if_interrupted(trainer.args)
                raise
            trainer.accelerator.wait_for_everyone()
            self.rhythm.end_if_interrupted(trainer.args)
            with checkpoints.staged(self.folder) as temporary:
                save_policy(trainer, temporary)
            metrics = last_metrics(trainer) | (results or {})
            if record is not None:
                record.finish("finished", step=trainer.state.global_step, metrics=metrics)
                rotation.rotate(trainer.args, trainer.state)
        first = (line for line in trainer.state.log_history if line["step"] == 0 and "eval_loss" in line)
        print_result(self.console, self.folder, metrics, before=next(first, {}))
        if events := describe_events(self.folder):
            self.console.print(f"[yellow]health[/yellow] {events}", soft_wrap=True)
        if self.rhythm.received:  # while the whole run was saved: nothing that follows it begins
            interrupt(self.rhythm.received)
        return RunResult(self.folder, metrics)

    def make_record(self, parents: list[str], data: dict[str, Any]) -> RunRecord:
        """Returns the record of this run, not yet written."""
        values = {"stage": self.stage, "settings": self.settings.recorded(), "sources": self.resolved.sources}
        values |= {"parents": parents, "hardware": self.hardware.record(), "data": data}
        return RunRecord(self.folder, **values, data_files=self.data_files, batch=asdict(self.batch))

    def train_rows(
        self,
        trainer: Trainer,
        policy: Policy,
        data: Rows,
        *,
        batch: str,
        plan: Sequence[tuple[str, str]] = (),
        **options: Any,
    ) -> RunResult:
        """Trains a policy on rows for as many steps or epochs as the settings say; the rest as in `train`."""
        rows, steps = len(trainer.train_dataset), self.settings.max_steps
        if self.settings.epochs is not None:  # counted as Trainer does
            steps = math.ceil(self.settings.epochs * math.ceil(rows / self.batch.rows))
        epochs = steps * self.batch.rows / rows
        data.set_epochs(epochs)
        length = f"{steps:,} ({epochs:.2g} epochs over the training rows)"
        plan = [*policy.rows(trainer.model), *plan, ("data", data.summary()), ("steps", length), ("batch", batch)]
        return self.train(trainer, steps=steps, plan=plan, parents=policy.parents, data=data.record(), **options)

    def note_division(self, record: RunRecord, trainer: Trainer, changes: dict[str, Any], phase: str) -> None:
        """Records and prints the smaller batch that a run goes on with."""
        self.settings = self.settings.model_copy(update=changes)
        record.change(changes, "auto-batch")
        values = " and ".join(f"{name} = {value}" for name, value in changes.items() if not name.startswith("eval"))
        step = trainer.state.global_step + 1
        self.progress.say(f"step {step}  out of memory ({phase}): taken again with {values}")

    def _tokens_per_step(self, trainer: Trainer, data: dict[str, Any]) -> float:
        """Estimates the tokens per optimizer step on this process."""
        if self.progress.tokens_per_step is not None:
            return self.progress.tokens_per_step / self.process.num_processes
        counted = sum(source["counts"]["tokens"] for source in data["sources"])
        per_row = counted / sum(source["trained_rows"] for source in data["sources"])
        per_row += getattr(self.settings, "max_new_tokens", 0)  # a completion comes after the prompt
        return per_row * trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps


def describe_schedule(settings: Any, steps: int, evaluates: bool) -> list[tuple[str, str | Text]]:
    """Returns the plan's rows for evaluation, optimizer and learning rate."""
    warmup = settings.warmup_steps if settings.warmup_steps >= 1 else math.ceil(settings.warmup_steps * steps)
    schedule = f"{settings.scheduler} after {warmup} steps of warmup"
    if warmup >= steps:
        schedule += " [yellow](warmup is as long as the run: the peak learning rate is never reached)[/yellow]"
    rate = spellings_of(type(settings))["learning_rate"].of(settings)
    evaluation = "none: there is no validation data"
    if evaluates:
        batches = getattr(settings, split_settings(settings)[2])
        evaluation = f"every {settings.eval_every:,} steps, on {batches:,} batches at most"
    optimizer = Text.from_markup(f"{settings.optimizer}, lr {rate:g}, {schedule}")
    return [("evaluation", evaluation), ("optimizer", optimizer)]


@dataclass(eq=False)
class BestAdapters(TrainerCallback):
    """Writes the adapters of each new best evaluation into `best_lora_adapters/`."""

    trainer: Trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.best_global_step == state.global_step:
            with checkpoints.staged(Path(args.output_dir)) as temporary:
                save_weights(self.trainer, temporary / BEST_ADAPTERS)


def save_policy(trainer: Trainer, folder: Path) -> None:
    """Saves what `save_weights` does, and `best_lora_adapters/` if no evaluation has written it."""
    save_weights(trainer, folder)
    best = trainer.state.best_global_step and (Path(trainer.args.output_dir) / BEST_ADAPTERS).is_dir()
    if isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel) and not best:
        save_weights(trainer, folder / BEST_ADAPTERS)


def save_weights(trainer: Trainer, folder: Path) -> None:
    """Saves weights or adapters, tokenizer and generation config; every process calls it (weights may be sharded)."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    fit_context(model, trainer.processing_class)
    trainer.save_model(str(folder))
    if not trainer.accelerator.is_main_process:
        return
    (folder / "training_args.bin").unlink(missing_ok=True)
    if isinstance(model, PeftModel):
        shutil.rmtree(folder / "ref", ignore_errors=True)  # DPO's frozen reference adapters
        if model.get_base_model().can_generate():  # sequence-classification models cannot generate
            model.get_base_model().generation_config.save_pretrained(folder)


def last_metrics(trainer: Trainer) -> dict[str, float]:
    """Returns the last value of each metric; those of validation from the best checkpoint where it was restored."""
    metrics: dict[str, float] = {}
    for line in trainer.state.log_history:
        metrics |= {name: value for name, value in line.items() if isinstance(value, (int, float))}
    restored = trainer.args.load_best_model_at_end and trainer.state.best_global_step
    for line in trainer.state.log_history:
        if restored and line["step"] == restored:
            metrics |= {name: value for name, value in line.items() if name.startswith(("eval_", "gate/"))}
    return metrics

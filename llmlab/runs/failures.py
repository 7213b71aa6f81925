"""How runs fail: full disks and memories become sentences, incomplete checkpoints go, the record says how it ended.
With `auto_batch` a step that does not fit into memory is taken again from its start, with each micro-batch in parts,
as a run would that was started with the smaller batch and as much more accumulation."""

import errno
import os
import random
import re
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from accelerate.utils.memory import clear_device_cache
from rich.markup import escape
from safetensors import SafetensorError

from llmlab.hardware import free_disk, peak_memory
from llmlab.runs import checkpoints
from llmlab.runs.health import RolledBack
from llmlab.runs.progress import ProgressLine, human
from llmlab.runs.record import COMPLETIONS, EVENTS, METRICS, RECORD, TENSORBOARD, RunRecord, read_metrics
from llmlab.runs.signals import Interrupted, handle_signals, interrupt
from llmlab.runs.start import smaller_batch
from llmlab.settings.base import spellings_of
from llmlab.settings.errors import Diverged, OutOfMemory, UserError, is_out_of_memory, reason_of
from llmlab.settings.files import read_layer, read_table
from llmlab.settings.presets import HARDWARE_PRESETS

# torch.save hides the system's error behind these words
TORCH_CANNOT_WRITE = ("iostream error", "PytorchStreamWriter failed", "unexpected pos")
PHASES = read_table("llmlab.runs", "phases")
ROOM = 0.7  # of a run's planned memory, for one that should have fitted
PLANS = 6  # of changes, each of which takes seconds
# what TRL's trainers and ours count while they take a step, and the rollout that they take it on
COUNTS = {"_metrics", "_stored_metrics", "_total_train_tokens", "_logs", "_step", "divergences"}
ROLLOUT = {"_buffered_inputs", "prepared"}
T = TypeVar("T")
NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def check_memory(parameters: int, *, batch_tokens: int = 0, width: int = 0) -> None:
    """Refuses a model whose fp32 weights, or a batch whose 16-bit embeddings, exceed this machine's memory."""
    memory = psutil.virtual_memory().total
    for what, needed in (("this model", 4 * parameters), ("one batch", 2 * batch_tokens * width)):
        if needed > memory > 0:
            here = f"and this machine has {human(memory, 'B')}"
            raise UserError(f"{what} needs at least {human(needed, 'B')} of memory, {here}")


def check_disk(folder: Path, *, needed: int) -> None:
    """Refuses a run that will write more bytes than the disk has free."""
    if needed > (free := free_disk(folder)):
        sizes = f"this run writes about {human(needed, 'B')}, and the disk has {human(free, 'B')} free"
        raise UserError(f"output_dir = {folder}: {sizes}")


@contextmanager
def record_failures(stage: str, folder: Path, record: RunRecord | None, progress: ProgressLine) -> Iterator[None]:
    """Records how a run ended that did not finish, and raises system errors as UserError; bugs keep their type."""

    def end(status: str, **results: str) -> None:
        stopped: list[int] = []
        with handle_signals(stopped.append):  # such as a launcher's SIGTERM, which follows the loss of a process
            progress.stop()
            if record is not None:
                checkpoints.remove_partial(folder)  # first: on a full disk the record needs the room
                record.finish(status, **results)
        if stopped:
            interrupt(stopped[0])

    try:
        yield
    except (KeyboardInterrupt, Interrupted):
        end("interrupted")
        progress.say(f"stopped; continue with: llmlab {stage} --resume {escape(str(folder))}")
        raise
    except RolledBack:  # the run goes on
        progress.stop()
        checkpoints.remove_partial(folder)
        raise
    except SystemExit:  # from rich, when the reader of a piped output has exited
        end("interrupted", reason="its output was closed")
        raise
    except Diverged as error:
        end("diverged", reason=str(error))
        saved = checkpoints.checkpoints(folder)
        if saved:
            again = f"llmlab {stage} --resume {folder} --no-load-optimizer learning_rate=..."
            progress.say(f"{saved[-1].name} is from before that; to resume it with a lower learning rate: {again}")
        raise
    except UserError as error:
        end("failed", reason=str(error))
        trained = any(folder.glob("checkpoint-*")) or any("loss" in line for line in read_metrics(folder))
        if record is not None and "resumed" not in record.values and not trained:
            # a new run without a step: it can be started again in this folder
            for name in (RECORD, METRICS, COMPLETIONS, EVENTS):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        raise
    except Exception as error:
        end("failed")
        reason = reason_of(error)
        if _is_write_error(error, folder):
            raise UserError(f"output_dir = {folder}: writing stopped: the disk is full or gone ({reason})") from error
        if isinstance(error, (OSError, SafetensorError)):
            raise UserError(f"{getattr(error, 'filename', None) or stage}: {reason}") from error
        raise


@contextmanager
def explain_out_of_memory(run: Any) -> Iterator[None]:
    """Says of memory that ran out in which phase of a `Run`, its peak and largest part, and what to change."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        hardware, processes, divides = run.hardware, run.process.num_processes, run.settings.auto_batch
        what = f": {error}" if isinstance(error, UserError) else ""  # which file it was
        where = f" on process {run.process.process_index} of {processes}" if processes > 1 else ""
        peak, memory = human(peak_memory(hardware.device), "B"), human(hardware.memory, "B")
        used = f"out of memory ({phase_of(error)}){what}: {peak} were in use{where} of {hardware.name}'s {memory}"
        ways = plan_less_memory(run)
        if not divides and smaller_batch(run.settings):
            ways.append("or --auto-batch, which finds a batch that fits")
        elif divides and processes > 1:
            ways.append("auto_batch works in one process alone: start this run again with such values")
        raise OutOfMemory("; ".join([used, *ways])) from error


def plan_less_memory(run: Any) -> list[str]:
    """Returns what takes most of a run's memory by its plan, and three changes of its settings that fit by it."""
    from llmlab.runs.plan import fitting_changes, make_plan

    settings, processes = run.settings, run.process.num_processes
    run.console.print("out of memory: planning what would fit ...")
    words = []
    try:
        plan = make_plan(run.function, settings, run.hardware, processes=processes)
        # where it fits by the plan, something else takes memory too
        room = min(run.hardware.memory, round(ROOM * plan.total))
        changes = fitting_changes(run.function, settings, run.hardware, room, at_most_plans=PLANS, processes=processes)
        name, size = max(plan.parts.items(), key=lambda part: part[1])
        words.append(f"by the plan most of it is {name}, {human(size, 'B')} of {human(plan.total, 'B')}")
    except (UserError, RuntimeError, MemoryError):  # what ran out is to be said all the same
        smaller = (smaller_batch(settings) or {}).items()
        values = [f"{name} = {value}" for name, value in smaller if not name.startswith("eval")]
        changes = [" with ".join(values)] if values else []
    changes = [*preset_changes(run), *changes][:3]
    return [*words, f"set {', or '.join(changes)}"] if changes else words


def preset_changes(run: Any) -> list[str]:
    """Returns what the hardware preset of a run's settings says to set where memory runs out."""
    names = {match[1] for source in run.resolved.sources.values() if (match := re.match(r"hardware (\w+)", source))}
    spellings, changes = spellings_of(type(run.settings)), []
    for name in names & HARDWARE_PRESETS.keys():
        for key, value in read_layer(HARDWARE_PRESETS[name]).values.get("out_of_memory", {}).items():
            setting = spellings.get(key)
            if setting and (setting.of(run.settings) or 0) > value:
                changes.append(f"{setting.key} = {value} (hardware {name})")
    return changes


def phase_of(error: BaseException) -> str:
    """Returns the phase of a run in which an error was raised, by the functions that it came through."""
    names = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    return next((phase for phase, functions in PHASES.items() if names.intersection(functions)), "loading")


def _is_write_error(error: Exception, folder: Path) -> bool:
    """Returns whether an error of the system or a library came from writing into the run folder, not reading."""
    if isinstance(error, RuntimeError):
        return any(part in str(error) for part in TORCH_CANNOT_WRITE)
    if isinstance(error, SafetensorError):
        return str(error).startswith("Error while serializing")
    if not isinstance(error, OSError):
        return False
    name = error.filename
    inside = isinstance(name, (str, os.PathLike)) and Path(name).resolve().is_relative_to(folder.resolve())
    return inside or error.errno in NO_DISK


class DivisibleBatches:
    """Mixin for a Trainer of one process: with `auto_batch` in its settings it takes a step in `parts` where memory
    runs out. `on_division` is called with the changed settings and the phase that ran out."""

    parts = 1
    rows_per_example = 1  # in a collated batch: of pairs all first rows, then all second ones
    on_division: Callable[[dict[str, Any], str], None] = staticmethod(lambda changes, phase: None)
    start: tuple[Any, ...] | None = None  # of this step, until it is over

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        self.start, self.taken = None, []
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: torch.nn.Module, batch: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        take = super().training_step  # type: ignore[misc]
        if not self.settings.auto_batch:
            return take(model, batch, num_items_in_batch)
        self.taken.append(batch)
        is_last, accumulation = self.accelerator.sync_gradients, self.args.gradient_accumulation_steps

        def take_parts() -> torch.Tensor:
            self.args.gradient_accumulation_steps = accumulation * self.parts
            try:
                # after a division the whole step, whose gradients are gone
                for each in self.taken if self.divided else [batch]:
                    parts = self.parts_of(each)
                    total = torch.zeros((), device=self.args.device)
                    for number, part in enumerate(parts, start=1):
                        self.accelerator.sync_gradients = is_last and each is batch and number == len(parts)
                        total += take(model, part, num_items_in_batch)
            finally:
                self.args.gradient_accumulation_steps = accumulation
            return total  # of this batch

        return self.in_parts(take_parts)

    def in_parts(self, action: Callable[[], T]) -> T:
        """Returns what a part of a training step returns; out of memory, it is taken again in smaller parts."""
        self.start = self.start or self.moment()
        self.divided = False
        while True:
            try:
                return action()
            except (RuntimeError, MemoryError) as error:
                phase, changes = phase_of(error), smaller_batch(self.settings)
                if changes is None or phase == "sampling" or not self.may_divide(error):
                    raise
            # here the exception is gone, and with it the step's tensors
            self.model.zero_grad()
            self.go_back(self.start)
            rows = self.settings.rows_per_pass
            self.divide(getattr(self.settings, rows) // changes[rows])
            self.settings = self.settings.model_copy(update=changes)
            self.start, self.divided = self.moment(), True
            self.on_division(changes, phase)

    def evaluate_in_parts(self, evaluate: Callable[[], T]) -> T:
        """Returns what an evaluation returns, with smaller batches where memory runs out; rows and losses stay."""
        while True:
            start, rows = self.moment(), self.args.per_device_eval_batch_size
            try:
                return evaluate()
            except (RuntimeError, MemoryError) as error:
                if rows == 1 or not self.may_divide(error):
                    raise
            self.go_back(start)
            self.args.per_device_eval_batch_size = rows // 2

    def may_divide(self, error: BaseException) -> bool:
        """Whether memory ran out where smaller batches are allowed and possible."""
        return self.settings.auto_batch and self.accelerator.num_processes == 1 and is_out_of_memory(error)

    def parts_of(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns a collated batch as batches of fewer rows of the data."""
        if self.parts == 1:
            return [batch]
        rows = len(next(value for name, value in batch.items() if name.endswith("input_ids"))) // self.rows_per_example
        size = getattr(self.settings, self.settings.rows_per_pass)

        def part(value: Any, first: int) -> Any:
            if isinstance(value, torch.Tensor) and value.ndim:
                return value.reshape(-1, rows, *value.shape[1:])[:, first : first + size].flatten(0, 1)
            return value[first : first + size] if isinstance(value, list) else value

        return [{name: part(value, first) for name, value in batch.items()} for first in range(0, rows, size)]

    def divide(self, factor: int) -> None:
        """Makes micro-batches smaller by a factor, from the present step on."""
        self.parts *= factor
        self.args.per_device_eval_batch_size = max(self.args.per_device_eval_batch_size // factor, 1)

    def moment(self) -> tuple[Any, ...]:
        """Returns what a step changes before its weights; `go_back` takes it once."""
        mine = vars(self)
        counts = {name: deepcopy(mine[name]) for name in COUNTS & mine.keys()}
        rollout = {name: getattr(self, name) for name in ROLLOUT if hasattr(self, name)}
        return random_states(self.args.device), counts | rollout, self.state.num_input_tokens_seen

    def go_back(self, moment: tuple[Any, ...]) -> None:
        """Frees what a step left, and restores what `moment` returned."""
        clear_device_cache(garbage_collection=True)
        restore, values, self.state.num_input_tokens_seen = moment
        restore()
        vars(self).update(values)


def random_states(device: torch.device) -> Callable[[], None]:
    """Returns a function that restores the present random states of Python, NumPy, torch and the device."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    module: Any = torch if device.type == "cpu" else torch.get_device_module(device)
    on_device = module.get_rng_state()

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        module.set_rng_state(on_device)

    return restore

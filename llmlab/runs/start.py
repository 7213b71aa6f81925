"""How a run of a stage begins: on which machine, in which claimed folder, from which checkpoint.

No model is loaded here, and of the data only the files' identities are read.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.markup import escape
from transformers import set_seed

from llmlab.hardware import Hardware, check_packages, probe
from llmlab.optim.build import check_supported
from llmlab.runs import checkpoints
from llmlab.runs.batch import Batch, batch_of, split_again
from llmlab.runs.record import read_record
from llmlab.runs.resume import check_data, check_undamaged, data_files, find_checkpoint, recorded_settings
from llmlab.settings.base import Settings
from llmlab.settings.errors import OfMainProcess, UserError, reason_of
from llmlab.settings.sources import Resolved
from llmlab.terminal import Terminal

S = TypeVar("S", bound=Settings)
R = TypeVar("R", bound="Start[Any]")
T = TypeVar("T")


@dataclass
class Start(Generic[S]):
    """Where a run starts: `resumed` is the status that an earlier part of it recorded, None for a new run; without a
    checkpoint it begins at the first step; `data_files` identifies each local data file; `batch` is what a resumed run
    keeps on other processes.
    """

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

    def __post_init__(self) -> None:
        self.settings: Any = self.resolved.settings
        set_seed(self.settings.seed)

    @property
    def done(self) -> int:
        """The number of optimizer updates that the checkpoint holds."""
        return checkpoints.saved_step(self.checkpoint) if self.checkpoint else 0


@contextmanager
def begin(
    run_class: type[R],
    stage: str,
    resolved: Resolved[Any],
    *,
    resume: str | Path | None,
    load_optimizer: bool,
    allow_changed_data: bool,
    console: Console | None,
) -> Iterator[R]:
    """Claims the run folder for as long as the run takes; the main process alone looks at it, and tells the others."""
    settings = resolved.settings
    hardware = probe(settings.device, settings.dtype)
    if hardware.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where it is installed, looks for a GPU and says so
    check_packages(settings, hardware)
    process = PartialState(cpu=hardware.device == "cpu")
    console = console or Terminal(quiet=not process.is_main_process)
    check_supported(settings.optimizer, process.distributed_type)
    with ExitStack() as stack, lost_processes_named(process):

        def claim() -> dict[str, Any]:
            output = Path(settings.output_dir)
            if resume is None:
                folder = stack.enter_context(checkpoints.claim(output))
                new = {"resumed": None, "checkpoint": None, "batch": batch_of(settings, process.num_processes)}
                return {"folder": folder, "data_files": data_files(settings), "changes": {}, **new}
            run, chosen = checkpoints.find_run(resume)
            if not run.is_dir():
                raise UserError(f"--resume {resume}: there is no such run folder")
            if not (output.is_dir() and run.samefile(output)):
                raise UserError(f"output_dir = {output}: a resumed run goes on in its own folder, {run}")
            folder = stack.enter_context(checkpoints.claim(output, resume=True))
            files = data_files(settings)
            notes = check_data(folder, files, allow_changed=allow_changed_data)
            checkpoint = find_checkpoint(folder, settings, load_optimizer=load_optimizer, chosen=chosen)
            if checkpoint is not None:
                check_undamaged(checkpoint)
            before, record = recorded_settings(folder, settings), read_record(folder)
            batch, changes = split_again(settings, before, record, process.num_processes)
            if changes:
                values = ", ".join(f"{name} = {value}" for name, value in changes.items())
                notes.append(f"an optimizer step keeps its {batch.rows} rows, with {values}")
            checkpoints.remove_partial(folder)
            if checkpoint is not None and chosen is not None:
                names = ", ".join(
                    path.name for path in checkpoints.supersede(folder, checkpoints.saved_step(checkpoint))
                )
                target = folder / checkpoints.SUPERSEDED
                notes += [f"moved into {target}, since the run continues from before them: {names}"] if names else []
            for note in notes:
                console.print(f"[yellow]note[/yellow] {escape(note)}", highlight=False, soft_wrap=True)
            resumed = {"resumed": record.get("status", "finished"), "checkpoint": checkpoint, "batch": batch}
            return {"folder": folder, "data_files": files, "changes": changes, **resumed}

        found = on_main(process, claim)
        if changes := found.pop("changes"):
            sources = {**resolved.sources, **dict.fromkeys(changes, "batch of the resumed run")}
            resolved = replace(resolved, settings=settings.model_copy(update=changes), sources=sources)
        yield run_class(stage, load_optimizer, resolved, hardware, process, console, **found)


def on_main(process: PartialState, action: Callable[[], T]) -> T:
    """Returns on every process what `action` returns on the main one, or raises its UserError there too."""
    result, error = None, None
    if process.is_main_process:
        try:
            result = action()
        except UserError as caught:
            error = caught
    result, message = broadcast_object_list([result, error and str(error)])
    if message is not None:
        raise error or OfMainProcess(message)
    return result


@contextmanager
def lost_processes_named(process: PartialState) -> Iterator[None]:
    """Says in one sentence, on the main process alone, that another process of this run is gone."""
    try:
        yield
    except (RuntimeError, torch.distributed.DistError) as error:
        # gloo's errors have no type of their own
        if not (isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)):
            raise
        kind = UserError if process.is_main_process else OfMainProcess
        raise kind(
            "another process of this run ended, and this one cannot go on without it; if it gave no reason, it was "
            f"killed (most often for its memory); --resume continues from the last checkpoint ({reason_of(error)})"
        ) from error

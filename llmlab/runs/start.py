"""How a run of a stage begins: on which machine, in which folder, from which checkpoint, and held against other runs.

Nothing here knows a model or reads data, but for whether its files are still what they were.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.markup import escape

from llmlab.hardware import Hardware, probe
from llmlab.optim.build import check_supported
from llmlab.runs import checkpoints
from llmlab.runs.record import read_record
from llmlab.runs.resume import check_data, check_whole, data_files, find_checkpoint
from llmlab.settings.base import Settings
from llmlab.settings.errors import OfMainProcess, UserError
from llmlab.settings.sources import Resolved, as_resolved
from llmlab.terminal import Terminal

S = TypeVar("S", bound=Settings)
T = TypeVar("T")


@dataclass(frozen=True)
class Start(Generic[S]):
    """What a run starts with.

    Attributes:
        resolved: the settings, and where they come from.
        hardware: the machine.
        process: which one this is.
        console: where to print.
        folder: the run folder.
        resumed: how a run that was begun before had ended, as it recorded; None is a new run.
        checkpoint: to go on from; None begins with the first step.
        data_files: the identity of each local file that is read.
    """

    resolved: Resolved[S]
    hardware: Hardware
    process: PartialState
    console: Console
    folder: Path
    resumed: str | None
    checkpoint: Path | None
    data_files: dict[str, Any]

    @property
    def done(self) -> int:
        """The optimizer updates behind it."""
        return checkpoints.saved_step(self.checkpoint) if self.checkpoint else 0

    @property
    def resumed_step(self) -> int | None:
        """The step that a resumed run goes on from; None where it is a new run."""
        return self.done if self.resumed else None

    def has_all_steps(self, steps: int) -> bool:
        """Returns whether nothing is left of a run of so many steps but its final save.

        Raises:
            UserError: not even that is left.
        """
        if self.done > steps or (self.done == steps and self.resumed == "finished"):
            raise UserError(f"--resume {self.folder}: it already is at step {self.done}; train longer to extend it")
        return self.done == steps


@contextmanager
def begin(
    settings: S | Resolved[S],
    *,
    resume: str | Path | None,
    load_optimizer: bool,
    allow_changed_data: bool,
    console: Console | None,
) -> Iterator[Start[S]]:
    """Claims the run folder for as long as the run takes; the main process alone looks at it, and tells the others.

    Args:
        settings: of the stage, resolved or plain.
        resume: the run folder to go on in, or a checkpoint in it.
        load_optimizer: with `resume`, whether the optimizer's state is restored.
        allow_changed_data: with `resume`, go on although data files changed.
        console: where to print; None is the terminal of the main process.

    Raises:
        UserError: the folder is taken or cannot be written, the machine lacks what is asked for, or the run cannot be
            resumed with these settings.
    """
    resolved = as_resolved(settings)
    settings = resolved.settings
    hardware = probe(settings.device, settings.dtype)  # type: ignore[attr-defined]
    process = PartialState(cpu=hardware.device == "cpu")
    console = console or Terminal(quiet=not process.is_main_process)
    check_supported(settings.optimizer, process.distributed_type)  # type: ignore[attr-defined]
    with ExitStack() as held, lost_processes_named(process):

        def claim() -> tuple[Path, Path | None, dict[str, Any], list[str]]:
            output = Path(settings.output_dir)  # type: ignore[attr-defined]
            run, chosen = (None, None) if resume is None else checkpoints.find_run(resume)
            if run is not None and not run.is_dir():
                raise UserError(f"--resume {resume}: there is no such run folder")
            if run is not None and not (output.is_dir() and run.samefile(output)):
                raise UserError(f"output_dir = {output}: a resumed run goes on in its own folder, {run}")
            folder = held.enter_context(checkpoints.claim(output, resume=run is not None))
            files = data_files(settings)
            if run is None:
                return folder, None, files, []
            notes = check_data(folder, files, allow_changed=allow_changed_data)
            checkpoint = find_checkpoint(folder, settings, load_optimizer=load_optimizer, chosen=chosen)
            if checkpoint is not None:
                check_whole(checkpoint)
            checkpoints.remove_partial(folder)
            later = checkpoints.supersede(folder, checkpoints.saved_step(checkpoint)) if checkpoint and chosen else []
            if later:
                names = ", ".join(path.name for path in later)
                notes.append(f"{names}: moved into {folder / checkpoints.SUPERSEDED}, since the run goes another way")
            return folder, checkpoint, files, notes

        folder, checkpoint, files, notes = on_main(process, claim)
        for note in notes:
            console.print(f"[yellow]note[/yellow] {escape(note)}", highlight=False, soft_wrap=True)
        status = None if resume is None else read_record(folder).get("status", "finished")
        yield Start(resolved, hardware, process, console, folder, status, checkpoint, files)


def on_main(process: PartialState, action: Callable[[], T]) -> T:
    """Returns on every process what `action` returns on the main one, or raises its UserError there too."""
    outcome: list[Any] = [None, None]
    if process.is_main_process:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
            broadcast_object_list(outcome)
            raise
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise OfMainProcess(outcome[1])
    return outcome[0]


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
            "killed (most often for its memory); --resume goes on from the last checkpoint"
        ) from error

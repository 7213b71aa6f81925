"""Checkpoint folders inside a run folder: which are whole, which is the last, how the final weights get their place.

The trainer fills them.  One that is being written holds `INCOMPLETE` from before its first file until after its last
one, those of every process and callback included, so that a kill at any moment leaves no doubt.
"""

import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from llmlab.runs.lock import locked
from llmlab.runs.record import RECORD
from llmlab.runs.signals import handle_signals, interrupt
from llmlab.settings.errors import UserError
from llmlab.settings.files import read_json
from llmlab.settings.paths import LOCK, check_free

STATE = "trainer_state.json"
INCOMPLETE = ".incomplete"
REMOVED = ".removed-"  # a checkpoint gets this prefix in one rename, before its files go one by one
SAVING = ".saving-"
SUPERSEDED = "superseded"


def checkpoints(run: Path) -> list[Path]:
    """Returns the whole checkpoints of a run folder, earliest step first."""
    found = [path for path in run.glob("checkpoint-*") if step_of(path) is not None and _is_whole(path)]
    return sorted(found, key=lambda path: step_of(path) or 0)


def find_run(resume: str | Path) -> tuple[Path, Path | None]:
    """Returns the run folder that `--resume` names, and the checkpoint where it names one."""
    path = Path(resume)
    is_checkpoint = step_of(path) is not None and not (path / RECORD).is_file()
    return (path.parent, path) if is_checkpoint else (path, None)


def step_of(checkpoint: Path) -> int | None:
    """Returns the step in a checkpoint's name, or None where the trainer gives no such name."""
    match = re.fullmatch("checkpoint-(0|[1-9][0-9]*)", checkpoint.name)
    return int(match[1]) if match else None


def saved_step(checkpoint: Path) -> int:
    """Returns the number of optimizer updates behind a checkpoint."""
    step = read_json(checkpoint / STATE).get("global_step")
    if not isinstance(step, int) or step < 0:
        raise UserError(f"{checkpoint / STATE}: global_step = {step}: expected a number of steps")
    return step


def begin(checkpoint: Path) -> None:
    """Marks a checkpoint as incomplete before anything is written into it; an earlier one of that step goes."""
    if checkpoint.exists():
        _remove(checkpoint)
    checkpoint.mkdir(parents=True)
    (checkpoint / INCOMPLETE).touch()


def complete(checkpoint: Path) -> None:
    """Declares a checkpoint whole."""
    (checkpoint / INCOMPLETE).unlink(missing_ok=True)


def rotate(run: Path, keep: int, scores: dict[int, float], *, best: str | None = None) -> None:
    """Removes all checkpoints but the last and so many of the best; the trainer's own rotation keeps the newest.

    Args:
        run: the run folder.
        keep: how many of the best.
        scores: step -> value on the validation data, larger is better; those without one are worse, the newest first.
        best: the checkpoint that the run will end with.
    """

    def rank(path: Path) -> tuple[bool, float]:
        step = step_of(path) or 0
        score = scores.get(step, math.nan)
        return (True, score) if math.isfinite(score) else (False, step)

    found = checkpoints(run)
    kept = {*sorted(found, key=rank, reverse=True)[:keep], *found[-1:]}
    for path in found:
        if path not in kept and not (best and path.name == Path(best).name):
            _remove(path)


def supersede(run: Path, step: int) -> list[Path]:
    """Sets aside the checkpoints past a step from which the run goes another way, and returns them."""
    later = [path for path in checkpoints(run) if (step_of(path) or 0) > step]
    for path in later:
        kept = run / SUPERSEDED / path.name
        kept.parent.mkdir(exist_ok=True)
        if kept.exists():
            shutil.rmtree(kept)
        os.replace(path, kept)
    return later


def remove_partial(run: Path) -> list[Path]:
    """Removes what a run was writing or removing when it was cut off, and returns it."""
    partial = [path.parent for path in run.glob(f"checkpoint-*/{INCOMPLETE}")]
    partial += [*run.glob(f"{REMOVED}checkpoint-*"), *run.glob(f"{SAVING}*")]
    for path in partial:
        shutil.rmtree(path)
    return partial


def _is_whole(checkpoint: Path) -> bool:
    return (checkpoint / STATE).is_file() and not (checkpoint / INCOMPLETE).exists()


def _remove(checkpoint: Path) -> None:
    removed = checkpoint.with_name(REMOVED + checkpoint.name)
    if removed.exists():
        shutil.rmtree(removed)
    os.replace(checkpoint, removed)  # half removed, it could look whole
    shutil.rmtree(removed)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill, then moves what is in it into the run folder, one rename each."""
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=SAVING))
    try:
        yield temporary
        for path in sorted(temporary.iterdir()):
            if path.is_dir() and not any(path.iterdir()):
                continue  # of a process that writes nothing itself
            if path.is_dir() and (folder / path.name).is_dir():
                shutil.rmtree(folder / path.name)  # only files are replaced in one rename
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary)


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary folder, then moves what is in it into the run folder."""
    with staged(folder) as temporary:
        write(temporary)


@contextmanager
def claim(folder: str | Path, *, resume: bool = False) -> Iterator[Path]:
    """Holds a run folder against other runs; folders that were made for it and stay empty are removed again.

    Meanwhile SIGTERM and SIGHUP end what is going on as Ctrl+C does.

    Raises:
        UserError: it holds something already, another run is writing into it, or it cannot be written.
    """
    path = Path(folder)
    with ExitStack() as held:
        held.enter_context(handle_signals(interrupt))
        try:
            if not resume and not (path / LOCK).exists():
                check_free(path)  # before anything is written
            for place in (*reversed(path.parents), path):  # removed from the innermost
                if not place.exists():
                    held.callback(_remove_empty, place)
            held.enter_context(locked(path))
        except OSError as error:
            raise UserError(f"output_dir = {folder}: cannot be written: {error.strerror}") from None
        if not resume:
            check_free(path)  # another run may have come and gone in between
        yield path


def _remove_empty(place: Path) -> None:
    with suppress(OSError):  # it holds a run now
        place.rmdir()

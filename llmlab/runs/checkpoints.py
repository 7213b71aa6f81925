"""What lies in a run folder: checkpoints, complete or marked as incomplete, files that are moved in when complete, and
the lock of the process that writes there. A checkpoint holds `INCOMPLETE` from before its first file until all
processes and callbacks have written theirs, and is moved away before it is deleted: after a kill at any moment, what
looks complete is."""

import errno
import math
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from llmlab.runs.record import RECORD
from llmlab.runs.signals import handle_signals, interrupt
from llmlab.settings.errors import UserError
from llmlab.settings.files import read_json
from llmlab.settings.paths import LOCK, check_free

try:
    import fcntl
except ImportError:  # Windows has none: two runs in one folder go unnoticed there
    fcntl = None  # type: ignore[assignment]

ATTEMPTS = 100  # other processes may remove the file between opening and locking it
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of file systems without locks, as some network disks
STATE = "trainer_state.json"
INCOMPLETE = ".incomplete"
TEMPORARY = ".saving-"  # prefix of folders whose contents are about to be moved out, or to be deleted
SUPERSEDED = "superseded"


def checkpoints(run: Path) -> list[Path]:
    """Returns the complete checkpoints of a run folder, earliest step first."""
    found = [path.parent for path in run.glob(f"checkpoint-*/{STATE}") if path.is_file()]
    complete = [path for path in found if step_of(path) is not None and not (path / INCOMPLETE).exists()]
    return sorted(complete, key=lambda path: step_of(path) or 0)


def find_run(resume: str | Path) -> tuple[Path, Path | None]:
    """Returns the run folder that `--resume` names, and the checkpoint where it names one."""
    path = Path(resume)
    is_checkpoint = step_of(path) is not None and not (path / RECORD).is_file()
    return (path.parent, path) if is_checkpoint else (path, None)


def step_of(checkpoint: Path) -> int | None:
    """Returns the step in a checkpoint's name, or None for a name that the trainer would not give."""
    match = re.fullmatch("checkpoint-(0|[1-9][0-9]*)", checkpoint.name)
    return int(match[1]) if match else None


def saved_step(checkpoint: Path) -> int:
    """Returns the number of optimizer updates that a checkpoint records."""
    step = read_json(checkpoint / STATE).get("global_step")
    if not isinstance(step, int) or step < 0:
        raise UserError(f"{checkpoint / STATE}: global_step = {step}: expected a number of steps")
    return step


def begin(checkpoint: Path) -> None:
    """Makes a checkpoint folder that is marked as incomplete, in place of an earlier one of that step."""
    if checkpoint.exists():
        _remove(checkpoint)
    checkpoint.mkdir(parents=True)
    (checkpoint / INCOMPLETE).touch()


def complete(checkpoint: Path) -> None:
    """Removes the mark that `begin` left."""
    (checkpoint / INCOMPLETE).unlink(missing_ok=True)


def rotate(run: Path, keep: int, scores: dict[int, float], *, best: str | None = None) -> None:
    """Removes all checkpoints but the last, `best`, and the `keep` highest by `scores` (none is the lowest)."""

    def rank(path: Path) -> tuple[bool, float]:
        score = scores.get(step_of(path) or 0, math.nan)
        return (True, score) if math.isfinite(score) else (False, step_of(path) or 0)

    found = checkpoints(run)
    kept = {*sorted(found, key=rank, reverse=True)[:keep], *found[-1:]}
    for path in found:
        if path not in kept and not (best and path.name == Path(best).name):
            _remove(path)


def supersede(run: Path, step: int) -> list[Path]:
    """Moves the checkpoints after a step, which a run resumed there would overwrite, into `superseded/`."""
    later = [path for path in checkpoints(run) if (step_of(path) or 0) > step]
    for path in later:
        target = run / SUPERSEDED / path.name
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        os.replace(path, target)
    return later


def remove_partial(run: Path) -> list[Path]:
    """Removes and returns the folders that a killed run was writing or deleting."""
    partial = [*(path.parent for path in run.glob(f"checkpoint-*/{INCOMPLETE}")), *run.glob(f"{TEMPORARY}*")]
    for path in partial:
        shutil.rmtree(path)
    return partial


def _remove(checkpoint: Path) -> None:
    with TemporaryDirectory(dir=checkpoint.parent, prefix=TEMPORARY) as temporary:
        os.replace(checkpoint, Path(temporary) / checkpoint.name)  # half deleted in place, it could look complete


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill, then moves its contents into the run folder, one rename each."""
    with TemporaryDirectory(dir=folder, prefix=TEMPORARY) as temporary:
        yield Path(temporary)
        for path in sorted(Path(temporary).iterdir()):
            target = folder / path.name
            if path.is_dir() and not any(path.iterdir()):
                continue  # from a process that writes nothing itself
            if path.is_dir() and target.is_dir():
                shutil.rmtree(target)  # a rename replaces files only
            os.replace(path, target)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder where it is missing and holds it against other processes, also on shared disks; the system
    releases it when this one ends. Not filelock's, whose locks forked processes inherit and keep."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with _lock(folder / LOCK) as handle:
        try:
            handle.truncate(0)  # a killed process left its name
            handle.write(f"{os.getpid()} on {platform.node()}")
            handle.flush()
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)  # while locked: a process that has it open tries again


def _lock(path: Path) -> IO[str]:
    """Returns a locked file, tried again where its last owner has just removed it or the folder."""
    for _ in range(ATTEMPTS):
        with suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = path.open("a+", encoding="utf-8")
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in NO_LOCKS:
                    return handle
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                handle.seek(0)
                owner, advice = handle.read().strip(), "wait for it, stop it, or choose another folder"
                run = f"another run (process {owner})" if owner else "another run"
                raise UserError(f"{path.parent}: {run} is writing into this folder; {advice}") from None
            if os.path.samestat(path.stat(), os.fstat(handle.fileno())):
                return handle
            handle.close()
    raise UserError(f"{path.parent}: other runs keep taking this folder; choose another")


@contextmanager
def claim(folder: str | Path, *, resume: bool = False) -> Iterator[Path]:
    """Holds a run folder against other processes, empty unless `resume`, and makes it and its parents where missing.
    Those that are still empty at the end are removed. Meanwhile SIGTERM and SIGHUP stop the program as Ctrl+C does."""
    path = Path(folder)
    with ExitStack() as stack:
        stack.enter_context(handle_signals(interrupt))
        try:
            if not resume and not (path / LOCK).exists():
                check_free(path)  # before anything is written
            for parent in (*reversed(path.parents), path):  # removed in reverse, the innermost first
                if not parent.exists():
                    stack.callback(_remove_if_empty, parent)
            stack.enter_context(locked(path))
        except OSError as error:
            raise UserError(f"output_dir = {folder}: cannot be written: {error.strerror}") from None
        if not resume:
            check_free(path)  # another run may have come and gone in between
        yield path


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()

"""Checkpoint folders inside a run folder: which are whole, which is the last, how the final weights get their place.

The trainer writes and rotates them; a folder without its trainer state was cut off while being written.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from llmlab.settings.errors import UserError
from llmlab.settings.files import read_json

STATE = "trainer_state.json"  # the trainer writes it last


def checkpoints(run: Path) -> list[Path]:
    """Returns the whole checkpoints of a run folder, earliest step first."""
    found = [path for path in run.glob("checkpoint-*") if (path / STATE).is_file() and step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


def last_checkpoint(run: Path) -> Path:
    """Returns the checkpoint to resume from.

    Raises:
        UserError: the run has none.
    """
    found = checkpoints(run)
    if not found:
        raise UserError(f"--resume {run}: this run has no whole checkpoint; start it again in another output_dir")
    return found[-1]


def step_of(checkpoint: Path) -> int | None:
    """Returns the step in a checkpoint's name, or None where the name has none."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else None


def saved_step(checkpoint: Path) -> int:
    """Returns the number of optimizer updates behind a checkpoint."""
    step = read_json(checkpoint / STATE).get("global_step")
    if not isinstance(step, int) or step < 0:
        raise UserError(f"{checkpoint / STATE}: global_step = {step}: expected a number of steps")
    return step


def remove_partial(run: Path) -> list[Path]:
    """Removes checkpoints that were cut off while being written, and returns them."""
    partial = [path for path in run.glob("checkpoint-*") if path.is_dir() and path not in checkpoints(run)]
    for path in partial:
        shutil.rmtree(path)
    return partial


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary folder, then moves what is in it into the run folder, one rename each."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
    try:
        write(temporary)
        for path in sorted(temporary.iterdir()):
            if path.is_dir() and (folder / path.name).is_dir():
                shutil.rmtree(folder / path.name)  # only files are replaced in one rename
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary)


def claim(folder: str, *, resume: bool) -> Path:
    """Checks that the run folder is free and can be written, and leaves nothing behind: a run may still be refused.

    Raises:
        UserError: it holds something already, or cannot be written.
    """
    path = Path(folder)
    if not resume and path.is_dir() and any(path.iterdir()):
        what = "a run" if (path / "llmlab.json").is_file() else "other files"
        go_on = f"continue it with --resume {path}, or " if what == "a run" else ""
        raise UserError(f"output_dir = {folder}: it already holds {what}; {go_on}choose another folder")
    made = [place for place in (path, *path.parents) if not place.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        for place in made:
            place.rmdir()
    except OSError as error:
        raise UserError(f"output_dir = {folder}: cannot be written: {error.strerror}") from None
    return path

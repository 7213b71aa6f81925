"""Names of models, datasets and folders: which can only be local paths, and what is missing before anything loads.
Only the file system is asked, and nothing heavy is imported; the content of files is their reader's business."""

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from llmlab.settings.base import Settings, fields_of
from llmlab.settings.errors import SettingsError, UserError, did_you_mean

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, of the usual file systems
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
DATA_ENDINGS = tuple(f".{kind}{gz}" for kind in ("txt", "json", "jsonl", "csv", "parquet") for gz in ("", ".gz"))
MODEL_FILES = ("config.json", "adapter_config.json")
LOCK = ".llmlab.lock"  # locked by the run that writes into a folder; a killed run leaves the file, unlocked
OWNER = ".llmlab.pipeline"  # names the pipeline that a run folder belongs to


@dataclass(frozen=True)
class Reads:
    """Marks a setting whose value names something to read: a model, or any file or folder."""

    kind: Literal["model", "path"]


def check_path(text: str) -> str:
    """Returns the text, or raises ValueError where no file system can have such a path."""
    if not text.strip():
        raise ValueError("expected a path, found nothing")
    if len(os.fsencode(text)) > LONGEST_PATH or any(len(os.fsencode(part)) > LONGEST_NAME for part in text.split("/")):
        raise ValueError(f"this is too long for a path: expected at most {LONGEST_NAME} bytes in each of its names")
    return text


PathName = Annotated[str, AfterValidator(check_path)]
"""A local path, or a hub id where one is read."""


def expand(text: str | Path) -> Path:
    """Returns a path with `~` replaced by the home folder, where that user exists."""
    return Path(os.path.expanduser(text))


def shipped_folder(name: str) -> Path:
    """Returns a folder that is shipped beside the package in a checkout, and inside it in a wheel."""
    package = Path(__file__).parents[1]
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def is_local(name: str) -> bool:
    """Whether a name can only be a local path: it exists, has a path's form, or its parent folder exists."""
    path = expand(name)
    return (
        os.path.exists(path)
        or name.startswith((".", "/", "~"))
        or name.lower().endswith(DATA_ENDINGS)
        or HUB_ID.fullmatch(name) is None
        or ("/" in name and os.path.isdir(path.parent))
    )


def missing(name: str, what: str = "file or folder") -> UserError:
    """Returns the error for a path that does not exist, with the nearest name beside it."""
    path = expand(name)
    while not os.path.isdir(path.parent):
        path = path.parent
    near = did_you_mean(path.name, [sibling.name for sibling in path.parent.iterdir()])
    return UserError(f"{name}: there is no such {what}{near}")


def check_model(name: str) -> None:
    """Checks that a local path holds a model; hub ids pass unchecked."""
    folder = expand(name)
    if os.path.isfile(folder):
        raise UserError(f"{name}: this is a file; expected a run folder or a hub id")
    if not os.path.isdir(folder):
        if not name or is_local(name):
            raise missing(name, "folder")
        return
    if any(os.path.isfile(folder / file) for file in MODEL_FILES):
        return
    steps = [path.name.rpartition("-")[2] for path in folder.glob("checkpoint-*")]
    if steps := [int(step) for step in steps if step.isdecimal()]:
        last = folder / f"checkpoint-{max(steps)}"
        raise UserError(f"{name}: this run has no finished model; try its last checkpoint, {last}")
    raise UserError(f"{name}: this folder holds no model: it has neither config.json nor adapter_config.json")


def check_inputs(settings: Settings, sources: dict[str, str], made: Collection[Path] = ()) -> None:
    """Raises SettingsError for everything that settings read and that is missing, as far as known without a network.
    `sources` says where each setting came from; `made` are the folders that earlier stages will have written."""
    problems = []
    for setting in fields_of(type(settings)):
        reads = setting.marker(Reads)
        values: Any = setting.of(settings) if reads else None
        for value in values if isinstance(values, list) else [] if values is None else [values]:
            name = getattr(value, "name", value)
            if name.startswith("demo/") or any(Path(name).is_relative_to(folder) for folder in made):
                continue
            try:
                if reads.kind == "model":
                    check_model(name)
                elif is_local(name) and not os.path.exists(expand(name)):
                    raise missing(name)
            except UserError as error:
                problems.append(f"{sources.get(setting.key, 'arguments')}: {setting.key} = {error}")
    if problems:
        raise SettingsError(problems)


def check_free(path: Path) -> None:
    """Raises UserError where a folder holds anything but a lock and an owner file."""
    if not os.path.isdir(path) or all(entry.name in (LOCK, OWNER) for entry in path.iterdir()):
        return
    ours = os.path.isfile(path / "llmlab.json")
    go_on = f"a run; continue it with --resume {path}, or" if ours else "other files;"
    raise UserError(f"output_dir = {path}: it already holds {go_on} choose another folder")


def check_output(folder: str) -> None:
    """Raises UserError where a run folder is taken or cannot be written, without writing anything."""
    path = expand(folder)
    check_free(path)
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    if not os.path.isdir(path):
        raise UserError(f"output_dir = {folder}: cannot be written: {path} is no folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"output_dir = {folder}: cannot be written: {path} is read-only")

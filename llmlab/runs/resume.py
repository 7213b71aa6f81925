"""What may change when a run is resumed; the order of the data and the shape of the weights hang on the rest."""

import hashlib
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer import safe_globals

from llmlab.data.files import files_of
from llmlab.runs import checkpoints
from llmlab.runs.record import read_record
from llmlab.settings.base import Resume, Settings, fields_of, show
from llmlab.settings.data import DataSettings
from llmlab.settings.errors import SettingsError, UserError, reading
from llmlab.settings.files import Layer, check_types, read_json
from llmlab.settings.sources import resolve

HASHED_BYTES = 2**30  # of all data files together, a second or two; larger ones are known by their sizes and times


def check_whole(checkpoint: Path) -> None:
    """Raises UserError for a checkpoint whose files are damaged, before a run that would fail over them begins."""
    state = read_json(checkpoint / checkpoints.STATE)
    # what the trainer relies on, which its annotations are looser or stricter than
    relied = {"stateful_callbacks": dict[str, dict[str, Any]], "train_batch_size": int}
    types = get_type_hints(TrainerState) | relied | {"log_history": list[dict[str, Any]]}
    check_types(checkpoint / checkpoints.STATE, dict.fromkeys(relied) | state, types)
    for path in sorted(checkpoint.glob("*.json")):
        if path.name != "tokenizer.json":  # large, and not the trainer's
            read_json(path)
    for path in sorted(checkpoint.glob("*.safetensors")):
        with reading(path, "weights"), safe_open(path, "pt"):
            pass
    for path in sorted(checkpoint.glob("*.pt")) + sorted(checkpoint.glob("rng_state*.pth")):
        with reading(path, "a file of torch"), safe_globals():
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def data_files(settings: DataSettings) -> dict[str, dict[str, Any]]:
    """Returns size, time and, where all data are small enough, the hash of each local data file."""
    found = [
        file for source in (*settings.datasets, *(settings.validation_datasets or ())) for file in files_of(source)
    ]
    hashed = sum(file.stat().st_size for file in found) <= HASHED_BYTES
    identities = {}
    for file in found:
        about = file.stat()
        identities[str(file)] = {"bytes": about.st_size, "modified": about.st_mtime_ns}
        if hashed:
            identities[str(file)]["hash"] = _hash(file)
    return identities


def check_data(run: Path, now: dict[str, dict[str, Any]], *, allow_changed: bool) -> list[str]:
    """Returns what is to be said of data files that are not what they were when the run began.

    Raises:
        SettingsError: there are such files, and nobody allowed them.
    """
    before = read_record(run).get("data_files", now)
    notes = []
    for name in sorted({*before, *now}):
        if name not in now or name not in before:
            notes.append(f"{name}: this data file is {'gone' if name in before else 'new'} since the run began")
        elif any(before[name].get(key) != now[name][key] for key in _compared(before[name], now[name])):
            notes.append(f"{name}: this data file changed since the run began")
    if notes and not allow_changed:
        raise SettingsError([f"{note}; --allow-changed-data goes on with it as it is" for note in notes])
    return notes


def _compared(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, str]:
    """Returns what tells whether a file changed: its time only where it was too large to be read."""
    return "bytes", "hash" if "hash" in before and "hash" in now else "modified"


def _hash(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with reading(file), file.open("rb") as handle:
        while block := handle.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def find_checkpoint(run: Path, settings: Settings, *, load_optimizer: bool, chosen: Path | None = None) -> Path | None:
    """Returns the checkpoint to go on from, after checking that these settings can; None is the first step.

    Args:
        run: the run folder.
        settings: the settings of the resumed run.
        load_optimizer: False allows another optimizer and other values of its settings.
        chosen: the checkpoint that the user names; None is the last.

    Raises:
        SettingsError: every setting that changed and must not.
        UserError: there is no such checkpoint, or nothing is left to do.
    """
    record = read_record(run)
    before = resolve(type(settings), Layer("record", record["settings"])).settings if record else settings
    problems = []
    for setting in fields_of(type(settings)):
        if setting.resume in (Resume.FREE, Resume.LOCAL) or setting.of(before) == setting.of(settings):
            continue
        of_optimizer = setting.resume is Resume.NEW_OPTIMIZER
        if of_optimizer and not load_optimizer:
            continue
        hint = " (or resume with --no-load-optimizer)" if of_optimizer else ""
        problems.append(
            f"{setting.key} = {show(setting.of(settings))}: the run to resume has {show(setting.of(before))}, "
            f"and this cannot change on the way{hint}"
        )
    if problems:
        raise SettingsError(problems)
    found = checkpoints.checkpoints(run)
    if chosen is not None:
        found = [path for path in found if path.name == chosen.name]
        if not found:
            whole = ", ".join(path.name for path in checkpoints.checkpoints(run)) or "none"
            raise UserError(f"--resume {chosen}: this is no whole checkpoint; expected one of those in {run}: {whole}")
    if not found:
        if record.get("status", "finished") == "finished":
            raise UserError(f"--resume {run}: this run has no whole checkpoint; start it again in another output_dir")
        return None  # it ended before its first checkpoint
    checkpoint = found[-1]
    step, last = checkpoints.saved_step(checkpoint), settings.max_steps  # type: ignore[attr-defined]
    in_other_units = getattr(settings, "epochs", None) or getattr(settings, "num_episodes", None)
    # one that was killed between its last checkpoint and its final save has only that to do
    if not in_other_units and (step > last or (step == last and record.get("status", "finished") == "finished")):
        raise UserError(f"--resume {run}: it already is at step {step}; give a larger max_steps to extend it")
    return checkpoint

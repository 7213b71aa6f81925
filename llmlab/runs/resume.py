"""What a run resumes from: an undamaged checkpoint, with settings and data files that continue the same training."""

import hashlib
import math
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

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

S = TypeVar("S", bound=Settings)
HASHED_BYTES = 2**30  # of all data files together, a second or two; larger ones are known by size and time


def check_undamaged(checkpoint: Path) -> None:
    """Raises UserError for a checkpoint with damaged files, before the run that would fail over them begins."""
    state = read_json(checkpoint / checkpoints.STATE)
    # the trainer relies on these, and its annotations are looser or stricter
    required = {"stateful_callbacks": dict[str, dict[str, Any]], "train_batch_size": int}
    types = get_type_hints(TrainerState) | required | {"log_history": list[dict[str, Any]]}
    check_types(checkpoint / checkpoints.STATE, dict.fromkeys(required) | state, types)
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".json" and path.name != "tokenizer.json":  # large, and not the trainer's
            read_json(path)
        elif path.suffix == ".safetensors":
            with reading(path, "weights"), safe_open(path, "pt"):
                pass
        elif path.suffix == ".pt" or path.match("rng_state*.pth"):
            with reading(path, "a file of torch"), safe_globals():
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def data_files(settings: DataSettings) -> dict[str, dict[str, Any]]:
    """Returns size, time and, unless they are too large together, the hash of each local data file."""
    sources = (*settings.datasets, *(settings.validation_datasets or ()))
    stats = {file: file.stat() for source in sources for file in files_of(source)}
    hashed = sum(stat.st_size for stat in stats.values()) <= HASHED_BYTES
    return {
        str(file): {"bytes": stat.st_size, "modified": stat.st_mtime_ns, **({"hash": _hash(file)} if hashed else {})}
        for file, stat in stats.items()
    }


def check_data(run: Path, now: dict[str, dict[str, Any]], *, allow_changed: bool) -> list[str]:
    """Returns a note for each data file that changed since the run began, or raises them all."""
    before = read_record(run).get("data_files", now)
    notes = []
    for name in sorted({*before, *now}):
        if not _is_same(before.get(name, {}), now.get(name, {})):
            change = "is gone" if name not in now else "changed" if name in before else "is new"
            notes.append(f"{name}: this data file {change} since the run began")
    if notes and not allow_changed:
        raise SettingsError([f"{note}; --allow-changed-data resumes all the same" for note in notes])
    return notes


def _is_same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a file's size and hash are the same; its time counts only where one of them has no hash."""
    by = "hash" if "hash" in before and "hash" in now else "modified"
    return bool(before and now) and (before.get("bytes"), before.get(by)) == (now.get("bytes"), now.get(by))


def _hash(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with reading(file), file.open("rb") as handle:
        while block := handle.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def recorded_settings(run: Path, settings: S) -> S:
    """Returns the settings that a run recorded, or these where it has no record."""
    record = read_record(run)
    return resolve(type(settings), Layer("record", record["settings"])).settings if record else settings


def rollbacks_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the rollbacks of a run so far, oldest first."""
    return read_record(folder).get("rollbacks", [])


def changes_since_start(folder: Path, settings: Any) -> dict[str, Any]:
    """Returns what rollbacks changed of a run's first settings, of those that still have their first values."""
    first, now = {}, {}
    for entry in rollbacks_of(folder):
        for name, (before, after) in entry["changes"].items():
            if now.get(name) != before:  # the first time, or a resumed run had another value
                first[name] = before
            now[name] = after
    return {name: value for name, value in now.items() if getattr(settings, name) == first[name]}


def changed_by(folder: Path, name: str, step: int) -> float:
    """Returns the factor by which rollbacks changed a setting since the checkpoint of a step was written."""
    later = takewhile(lambda each: each["to"] >= step, reversed(rollbacks_of(folder)))
    pairs = [each["changes"][name] for each in later if name in each["changes"]]
    return math.prod(after / before for before, after in pairs)


def find_checkpoint(run: Path, settings: Settings, *, load_optimizer: bool, chosen: Path | None = None) -> Path | None:
    """Returns the last or the chosen checkpoint, None for a run that ended before its first; settings that decide
    data, model or, unless it is not loaded, the optimizer's state must be the recorded ones."""
    record, before = read_record(run), recorded_settings(run, settings)
    problems = []
    for setting in fields_of(type(settings)):
        of_optimizer = setting.resume is Resume.NEW_OPTIMIZER
        free = setting.resume in (Resume.FREE, Resume.SPLIT, Resume.LOCAL) or (of_optimizer and not load_optimizer)
        if not free and setting.of(before) != setting.of(settings):
            hint = " (or resume with --no-load-optimizer)" if of_optimizer else ""
            has = f"the run to resume has {show(setting.of(before))}, which a resumed run cannot change{hint}"
            problems.append(f"{setting.key} = {show(setting.of(settings))}: {has}")
    if problems:
        raise SettingsError(problems)
    saved = checkpoints.checkpoints(run)
    if chosen is not None and chosen.name not in [path.name for path in saved]:
        names = ", ".join(path.name for path in saved) or "none"
        raise UserError(f"--resume {chosen}: this is no complete checkpoint; expected one of those in {run}: {names}")
    finished = record.get("status", "finished") == "finished"
    if not saved:
        if finished:
            problem = "this run has no complete checkpoint; start it again in another output_dir"
            raise UserError(f"--resume {run}: {problem}")
        return None
    checkpoint = run / chosen.name if chosen else saved[-1]
    if not (getattr(settings, "epochs", None) or getattr(settings, "num_episodes", None)):
        check_steps_left(run, checkpoints.saved_step(checkpoint), settings.max_steps, finished)  # type: ignore[attr-defined]
    return checkpoint


def check_deepspeed(checkpoint: Path, *, used: bool, processes: int, load_optimizer: bool) -> None:
    """Raises UserError for a checkpoint that DeepSpeed wrote and others would read, or the other way around."""
    parts = len(list(checkpoint.glob("global_step*/*zero_pp_rank_*optim_states.pt")))
    if used and not (parts and load_optimizer):
        why = "restores the optimizer too" if parts else "reads only checkpoints that it wrote"
        raise UserError(f"--resume {checkpoint}: DeepSpeed always {why}; resume without it")
    if parts and load_optimizer and (not used or parts != processes):
        why = f"DeepSpeed wrote it on {parts} processes, and reads it on as many"
        raise UserError(f"--resume {checkpoint}: {why}; take them, or with --no-load-optimizer and without DeepSpeed")


def check_steps_left(run: Path, done: int, steps: int, finished: bool) -> None:
    """Raises UserError where a run has no step left; one killed before its final save has that to do."""
    if done > steps or (done == steps and finished):
        raise UserError(f"--resume {run}: it already is at step {done}; train longer to extend it")

"""Runs a pipeline's stages in order: skips what is finished and unchanged, resumes what was interrupted.

What each stage does is the stage's own business; here is only what was run, from what, and whether that still holds.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from typing_extensions import Required, TypedDict  # pydantic's, before Python 3.12

from llmlab import __version__
from llmlab.pipeline.reading import Pipeline, PipelineStage
from llmlab.runs.history import flatten
from llmlab.runs.lock import locked
from llmlab.runs.record import RECORD, read_record
from llmlab.settings.base import local_names, show
from llmlab.settings.errors import Diverged, SettingsError, UserError, did_you_mean
from llmlab.settings.files import read_json, write_atomically
from llmlab.settings.paths import LOCK, OWNER, check_inputs, expand

STATE = "pipeline.json"


class Recorded(TypedDict, total=False):
    """What a pipeline's record holds of a stage."""

    status: Required[str]
    fingerprint: Required[str]
    owner: str
    run: str | None
    used: dict[str, str | None]
    stage: str
    settings: dict[str, Any]
    needs: dict[str, str]
    files: dict[str, str]
    versions: dict[str, str]


RECORDED = TypeAdapter(dict[str, Recorded])
VERSIONS = ("torch", "transformers", "trl", "tokenizers", "datasets")
LONGEST_CHANGE = 40  # characters; of a longer change only the name is told
Action = Literal["skip", "run", "resume"]


@dataclass(frozen=True)
class Step:
    """What will be done with a stage, and why.

    Attributes:
        changes: what differs from the recorded run, such as `lr 0.001 → 0.002`.
        material: everything that decides what the stage writes; the fingerprint is its hash.
    """

    stage: PipelineStage
    action: Action
    reason: str
    fingerprint: str
    changes: tuple[str, ...] = ()
    material: dict[str, Any] = field(default_factory=dict, repr=False)


def plan(pipeline: Pipeline, *, first: str | None = None, only: str | None = None) -> list[Step]:
    """Decides for each stage whether it is skipped, resumed or run.

    A stage is finished when its recorded fingerprint (settings, inputs, versions, and those of the stages before it)
    is the present one and no stage that it needs has run since; an interrupted or diverged stage with the same
    fingerprint resumes from its last checkpoint where its kind can.

    Args:
        pipeline: the pipeline.
        first: run this stage from its beginning, and every one after it, even if finished and unchanged.
        only: run this stage alone, even if finished and unchanged; interrupted, it resumes.

    Returns:
        One step a stage, in the pipeline's order.

    Raises:
        UserError: there is no such stage, both are given, or a stage that `only` needs would have to run.
    """
    names = [stage.name for stage in pipeline.stages]
    for option, name in (("--from", first), ("--only", only)):
        if name is not None and name not in names:
            raise UserError(f"{option} {name}: expected one of {', '.join(names)}{did_you_mean(name, names)}")
    if first is not None and only is not None:
        raise UserError(f"--from {first} and --only {only} contradict each other; keep one")
    state = _read_state(pipeline)
    steps: dict[str, Step] = {}
    for stage in pipeline.stages:
        material = _material(stage, {name: steps[name].fingerprint for name in stage.needs})
        fingerprint = hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()
        recorded = state.get(stage.name, {})
        changed, changes = _changes(recorded, material)
        rerun = next((name for name in stage.needs if steps[name].action != "skip"), None)
        replaced = next((name for name in stage.needs if _run_of(state, name) != _run_used(recorded, name)), None)
        action: Action = "run"
        if first is not None and names.index(stage.name) >= names.index(first):
            reason = "asked for by --from" if stage.name == first else f"comes after '{first}' (--from)"
        elif not recorded:
            reason = "not run yet"
        elif changed:
            reason = f"its {' and '.join(changed)} changed"
        elif rerun:
            reason = f"'{rerun}' runs again"
        elif replaced:
            reason = f"'{replaced}' has run again since"
        elif recorded["fingerprint"] != fingerprint:  # a record of an earlier llmlab names no details
            reason = "its settings, inputs or versions changed"
        elif recorded["status"] != "finished" and not _has_finished(stage.folder):
            resumable = stage.stage.resumes and (stage.folder / RECORD).is_file()
            action, reason = ("resume", "it was interrupted") if resumable else ("run", "it did not finish")
            reason = "it diverged" if recorded["status"] == "diverged" else reason
        elif not stage.folder.is_dir():
            reason = "its run folder is gone"
        else:
            action, reason = "skip", "finished"
        steps[stage.name] = Step(stage, action, reason, fingerprint, changes, material)
    chosen = list(steps.values()) if only is None else _alone(steps, only)
    _check_folders(chosen, state)
    _check_inputs(chosen)
    return chosen


def _check_folders(steps: list[Step], state: dict[str, Any]) -> None:
    """Raises SettingsError for folders that stages would write into or set aside, and that are somebody else's."""
    problems = []
    for step in steps:
        folder, owner = step.stage.folder, state.get(step.stage.name, {}).get("owner")
        touched = {"skip": (), "resume": (folder,), "run": (folder, _previous(folder))}[step.action]
        problems += [
            f"stage '{step.stage.name}': {place} is not known to be this pipeline's; "
            "move it away, or choose another output_dir or name of the stage"
            for place in touched
            if not _is_ours(place, owner)
        ]
    if problems:
        raise SettingsError(problems)


def _is_ours(folder: Path, owner: str | None) -> bool:
    """Whether a folder is free, or has the mark of the stage that owns it."""
    mark = folder / OWNER
    if not folder.exists() and not folder.is_symlink():
        return True
    if owner is not None and mark.is_file() and mark.read_text(encoding="utf-8") == owner:
        return True
    return folder.is_dir() and all(path.name in (LOCK, OWNER) for path in folder.iterdir())


def _has_finished(folder: Path) -> bool:
    """Whether the run in a folder says so, where the program was killed before the pipeline's record did."""
    return read_record(folder).get("status") == "finished"


def _check_inputs(steps: list[Step]) -> None:
    """Raises SettingsError for everything that a stage will read, that is not there and that no stage will make."""
    problems = []
    for number, step in enumerate(steps):
        resolved, made = step.stage.resolved, [earlier.stage.folder for earlier in steps[:number]]
        try:
            if step.action != "skip":
                check_inputs(resolved.settings, resolved.sources, made)
        except SettingsError as error:
            problems += [f"{problem} (stage '{step.stage.name}')" for problem in error.problems]
    if problems:
        raise SettingsError(problems)


def _alone(steps: dict[str, Step], only: str) -> list[Step]:
    """Returns the steps with every other stage left out.

    Raises:
        SettingsError: the stages that it needs and that are not finished and unchanged.
    """
    chosen = steps[only]
    needed: set[str] = set()
    for name in reversed(steps):
        if name == only or name in needed:
            needed |= set(steps[name].stage.needs)
    problems = []
    for name, step in steps.items():
        if name in needed and step.action != "skip":
            details = f" ({', '.join(step.changes)})" if step.changes else ""
            problems.append(
                f"--only {only}: it needs '{name}' finished and unchanged, and that has to {step.action}: "
                f"{step.reason}{details}; leave --only out, or finish '{name}' first"
            )
    if problems:
        raise SettingsError(problems)
    if chosen.action == "skip":
        chosen = replace(chosen, action="run", reason="asked for by --only")
    left_out = f"left out: only '{only}' was asked for"
    return [
        chosen if name == only else replace(step, action="skip", reason=left_out, changes=())
        for name, step in steps.items()
    ]


def execute(pipeline: Pipeline, steps: list[Step]) -> Iterator[Step]:
    """Does the steps one after the other, yielding each before it starts.

    Raises:
        UserError: another process is running a pipeline in this folder, or the folder cannot be written.
    """
    with ExitStack() as held:
        if any(step.action != "skip" for step in steps):
            try:
                held.enter_context(locked(pipeline.output_dir))
            except OSError as error:
                raise UserError(f"output_dir = {pipeline.output_dir}: cannot be written: {error.strerror}") from None
        yield from _execute(pipeline, steps)


def _execute(pipeline: Pipeline, steps: list[Step]) -> Iterator[Step]:
    state = _read_state(pipeline)
    for step in steps:
        yield step
        if step.action == "skip":
            continue
        name, folder = step.stage.name, step.stage.folder
        _check_folders([step], state)
        if step.action == "run":
            _set_aside(folder)
        owner = state.get(name, {}).get("owner") or uuid.uuid4().hex
        state[name] = {
            "owner": owner,
            "status": "started",
            # what later stages compare: a resumed run stays the same run
            "run": uuid.uuid4().hex if step.action == "run" else state[name].get("run"),
            "used": {need: _run_of(state, need) for need in step.stage.needs},
            "fingerprint": step.fingerprint,
            **step.material,
        }
        _write_state(pipeline, state)
        folder.mkdir(exist_ok=True)
        (folder / OWNER).write_text(owner, encoding="utf-8")
        resume = {"resume": folder} if step.action == "resume" else {}
        try:
            step.stage.stage.function(step.stage.resolved, **resume)
        except Diverged:
            state[name]["status"] = "diverged"
            _write_state(pipeline, state)
            raise
        state[name]["status"] = "finished"
        _write_state(pipeline, state)


def _run_of(state: dict[str, Any], name: str) -> str | None:
    """Returns the id of a stage's last run; None in records of an earlier llmlab."""
    return state.get(name, {}).get("run")


def _run_used(recorded: dict[str, Any], need: str) -> str | None:
    """Returns the id of the run of `need` that a recorded run started from."""
    return recorded.get("used", {}).get(need)


def _set_aside(folder: Path) -> None:
    """Keeps the run folder of an earlier try as `<name>.previous`; the one before that goes."""
    if folder.exists():
        with locked(folder):
            pass  # no run is writing into it
        previous = _previous(folder)
        if previous.is_symlink():
            previous.unlink()
        elif previous.exists():
            shutil.rmtree(previous)
        os.replace(folder, previous)


def _previous(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.previous")


def _material(stage: PipelineStage, earlier: dict[str, str]) -> dict[str, Any]:
    """Returns everything that decides what a stage writes, as plain values."""
    settings = stage.resolved.settings.model_dump(mode="json", exclude=local_names(stage.stage.name))
    made_here = [stage.folder.parent / name for name in stage.needs]
    return {
        "stage": stage.stage.name,
        "settings": settings,
        "needs": earlier,
        "files": {path: _identity(expand(path)) for path in _local_paths(settings, made_here)},
        "versions": {"llmlab": __version__, **{name: version(name) for name in VERSIONS}},
    }


def _changes(recorded: dict[str, Any], material: dict[str, Any]) -> tuple[list[str], tuple[str, ...]]:
    """Returns which kinds of things differ from a recorded run, and each difference in a reader's words."""
    if not {"stage", "settings", "files", "versions"} <= recorded.keys():
        return [], ()
    kinds: list[str] = []
    details: list[str] = []
    for kind in ("stage", "settings", "files", "versions"):
        before, now = flatten({kind: recorded[kind]}), flatten({kind: material[kind]})
        if kind == "files":
            before, now = recorded[kind], material[kind]
        keys = [key for key in dict.fromkeys([*now, *before]) if before.get(key, ...) != now.get(key, ...)]
        if not keys:
            continue
        kinds.append("input files" if kind == "files" else "kind" if kind == "stage" else kind)
        for key in keys:
            name = key.removeprefix(f"{kind}.")
            change = f"{name} {show(before.get(key))} → {show(now.get(key))}"
            details.append(name if kind == "files" or len(change) > LONGEST_CHANGE else change)
    return kinds, tuple(details)


def _local_paths(value: Any, made_here: list[Path]) -> list[str]:
    """Returns the texts in the settings that name existing files or folders, needed stages' run folders left out.

    A function of one's own is named `path/to/file.py:name`: the file counts.
    """
    if isinstance(value, dict):
        return [path for inner in value.values() for path in _local_paths(inner, made_here)]
    if isinstance(value, list):
        return [path for inner in value for path in _local_paths(inner, made_here)]
    if not isinstance(value, str) or len(value) > 1024 or "\n" in value:
        return []
    found = next((text for text in (value, value.rpartition(":")[0]) if text and _exists(text)), None)
    if found is None or any(Path(found).is_relative_to(folder) for folder in made_here):
        return []
    return [found]


def _exists(text: str) -> bool:
    return os.path.exists(os.path.expanduser(text))


def _identity(path: Path) -> str:
    """Returns a hash of the names, sizes and times of a file, or of the files in a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    seen = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def _read_state(pipeline: Pipeline) -> dict[str, Any]:
    path = pipeline.output_dir / STATE
    if not path.is_file():
        return {}
    try:
        return RECORDED.validate_python(read_json(path), strict=True)
    except (UserError, ValidationError):
        raise UserError(
            f"{path}: this record is damaged; remove it and the stages' folders to run every stage again"
        ) from None


def _write_state(pipeline: Pipeline, state: dict[str, Any]) -> None:
    write_atomically(pipeline.output_dir / STATE, json.dumps(state, indent=2) + "\n")

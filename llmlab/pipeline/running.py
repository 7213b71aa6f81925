"""Decides which stages of a pipeline are skipped, resumed or run, runs them in order, and writes their page."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic's, before Python 3.12

from llmlab.pipeline.reading import Pipeline, PipelineStage
from llmlab.report.page import write_page
from llmlab.runs.checkpoints import locked
from llmlab.runs.history import RunFolder, curve_metric, flatten, open_or_note, open_run
from llmlab.runs.page import PAGE, charts_of, try_writing, write_run_page
from llmlab.runs.record import RECORD, library_versions, read_record
from llmlab.settings.base import Resume, fields_of, local_names, show
from llmlab.settings.errors import SettingsError, UserError, did_you_mean, shorten
from llmlab.settings.files import dump, read_json
from llmlab.settings.paths import LOCK, OWNER, check_inputs, expand
from llmlab.settings.sources import Resolved
from llmlab.stages import Stage

STATE = "pipeline.json"
FILES = "input files"
VERSIONS = ("llmlab", "torch", "transformers", "trl", "tokenizers", "datasets")
LONGEST_CHANGES = 400  # characters
Action = Literal["skip", "run", "resume"]
Inputs = dict[str, dict[str, Any]]


class StageState(TypedDict):
    """What `pipeline.json` holds of a stage that was started."""

    status: str
    owner: str  # in the mark of its run folder
    run: str  # a new id for each run; a resumed run keeps its own
    needed_runs: dict[str, str]  # stage -> the id of its run that this one started from
    inputs: Inputs


State = dict[str, StageState]


@dataclass(frozen=True)
class Step:
    """What will be done with a stage, and why, with changes since the recorded run such as `lr 0.001 → 0.002`; and all
    inputs that determine what the stage writes (settings, local files, versions)."""

    stage: PipelineStage
    action: Action
    reason: str
    inputs: Inputs = field(default_factory=dict, repr=False)


def plan(pipeline: Pipeline, *, first: str | None = None, only: str | None = None) -> list[Step]:
    """Plans each stage, in order: skip, resume or run, as its recorded inputs and those it needs allow. `first` runs
    that stage from its beginning and every one after it; `only` runs or resumes that stage alone."""
    names = [stage.name for stage in pipeline.stages]
    for option, name in (("--from", first), ("--only", only)):
        if name is not None and name not in names:
            raise UserError(f"{option} {name}: expected one of {', '.join(names)}{did_you_mean(name, names)}")
    if first is not None and only is not None:
        raise UserError(f"--from {first} and --only {only} contradict each other; keep one")
    state = read_state(pipeline.output_dir)
    steps: dict[str, Step] = {}
    for number, stage in enumerate(pipeline.stages):
        inputs = _inputs(stage, pipeline.processes)
        if first is not None and number >= names.index(first):
            action: Action = "run"
            reason = "asked for by --from" if stage.name == first else f"comes after '{first}' (--from)"
        else:
            action, reason = _decide(stage, state, inputs, steps)
        steps[stage.name] = Step(stage, action, reason, inputs)
    chosen = list(steps.values()) if only is None else _select(steps, only)
    _check_folders(chosen, state)
    problems: list[str] = []
    for number, step in enumerate(chosen):
        resolved, made = step.stage.resolved, [earlier.stage.folder for earlier in chosen[:number]]
        try:
            if step.action != "skip":
                check_inputs(resolved.settings, resolved.sources, made)
        except SettingsError as error:
            problems += [f"{problem} (stage '{step.stage.name}')" for problem in error.problems]
    if problems:
        raise SettingsError(problems)
    return chosen


def _decide(stage: PipelineStage, state: State, inputs: Inputs, steps: dict[str, Step]) -> tuple[Action, str]:
    """Returns what to do with a stage, and why; `steps` are those of the stages before it."""
    if stage.name not in state:
        return "run", "not run yet"
    recorded = state[stage.name]
    if changed := _changes(recorded["inputs"], inputs):
        return "run", changed
    for need in stage.needs:
        if steps[need].action != "skip":
            return "run", f"'{need}' runs again"
    for need in stage.needs:
        if state[need]["run"] != recorded["needed_runs"].get(need):
            return "run", f"'{need}' was rerun since"
    # the run's own record knows of an end that the pipeline did not see
    ended = recorded["status"] if recorded["status"] == "finished" else read_record(stage.folder).get("status")
    if ended != "finished":
        resumes = stage.stage.resumes and (stage.folder / RECORD).is_file()
        reason = "it was interrupted" if resumes else "it did not finish"
        return "resume" if resumes else "run", "it diverged" if ended == "diverged" else reason
    return ("skip", "finished") if stage.folder.is_dir() else ("run", "its run folder is gone")


def _select(steps: dict[str, Step], only: str) -> list[Step]:
    """Returns the steps with every stage but one skipped; raises if its dependencies are not up to date."""
    needed, problems = {only}, []
    for name, step in reversed(steps.items()):
        needed |= set(step.stage.needs) if name in needed else set()
        if name in needed - {only} and step.action != "skip":
            why = f"it needs '{name}' finished and unchanged, and that has to {step.action}: {step.reason}"
            problems.insert(0, f"--only {only}: {why}; leave --only out, or finish '{name}' first")
    if problems:
        raise SettingsError(problems)
    chosen, left_out = steps[only], f"left out: only '{only}' was asked for"
    if chosen.action == "skip":
        chosen = replace(chosen, action="run", reason="asked for by --only")
    return [chosen if name == only else replace(step, action="skip", reason=left_out) for name, step in steps.items()]


def _check_folders(steps: list[Step], state: State) -> None:
    """Raises SettingsError for folders that stages would replace and that this pipeline did not write."""
    problems = []
    for step in steps:
        folder, name = step.stage.folder, step.stage.name
        owner = state[name]["owner"] if name in state else None
        for place in {"skip": (), "resume": (folder,), "run": (folder, _previous(folder))}[step.action]:
            mark = place / OWNER
            is_free = not place.exists() and not place.is_symlink()
            is_ours = owner is not None and mark.is_file() and mark.read_text(encoding="utf-8") == owner
            is_empty = place.is_dir() and all(path.name in (LOCK, OWNER) for path in place.iterdir())
            if not (is_free or is_ours or is_empty):
                move = "move it away, or choose another output_dir or stage name"
                problems.append(f"stage '{name}': {place} was not written by this pipeline; {move}")
    if problems:
        raise SettingsError(problems)


def run_stage(stage: Stage, resolved: Resolved[Any], options: dict[str, Any]) -> None:
    """Runs a stage in this process."""
    stage.function(resolved, **options)


def execute(pipeline: Pipeline, steps: list[Step], run: Callable[..., None] = run_stage) -> Iterator[Step]:
    """Executes the steps in order, yielding each before it starts; `run` runs a stage, as `run_stage` does."""
    with ExitStack() as stack:
        if any(step.action != "skip" for step in steps):
            try:
                stack.enter_context(locked(pipeline.output_dir))
            except OSError as error:
                raise UserError(f"output_dir = {pipeline.output_dir}: cannot be written: {error.strerror}") from None
        state = read_state(pipeline.output_dir)
        for step in steps:
            yield step
            if step.action != "skip":
                _execute(pipeline, step, state, run)


def _execute(pipeline: Pipeline, step: Step, state: State, run: Callable[..., None]) -> None:
    name, folder, resumes = step.stage.name, step.stage.folder, step.action == "resume"
    _check_folders([step], state)
    if not resumes and folder.exists():
        with locked(folder):
            pass  # no run is writing into it
        previous = _previous(folder)
        if previous.is_symlink():
            previous.unlink()
        elif previous.exists():
            shutil.rmtree(previous)
        os.replace(folder, previous)
    state[name] = {
        "status": "started",
        "owner": state[name]["owner"] if name in state else uuid.uuid4().hex,
        "run": state[name]["run"] if resumes else uuid.uuid4().hex,
        "needed_runs": {need: state[need]["run"] for need in step.stage.needs},
        "inputs": step.inputs,
    }
    dump(state, pipeline.output_dir / STATE)
    folder.mkdir(exist_ok=True)
    (folder / OWNER).write_text(state[name]["owner"], encoding="utf-8")
    try:
        run(step.stage.stage, step.stage.resolved, {"resume": folder} if resumes else {})
        state[name]["status"] = "finished"
        dump(state, pipeline.output_dir / STATE)
    finally:
        if any(getattr(stage.resolved.settings, "report", False) for stage in pipeline.stages):
            if not step.stage.stage.resumes and (folder / RECORD).is_file():  # stages that train write their own
                try_writing(lambda: write_run_page(open_run(folder)))
            try_writing(lambda: write_pipeline_page(pipeline.output_dir))


def _previous(folder: Path) -> Path:
    """Returns where the folder of an earlier run is set aside, in place of an older one."""
    return folder.with_name(f"{folder.name}.previous")


def _inputs(stage: PipelineStage, processes: int) -> Inputs:
    """Returns everything that determines what a stage writes, the runs of the stages that it needs aside: of a batch
    that a hardware preset split for so many processes, its rows together."""
    resolved = stage.resolved
    split = [setting.key for setting in fields_of(type(resolved.settings)) if setting.resume is Resume.SPLIT]
    fitted = {key for key in split if resolved.sources[key].startswith("hardware ")}
    settings = resolved.settings.model_dump(mode="json", exclude=local_names(stage.stage.name) | fitted)
    if fitted:
        settings["effective batch"] = resolved.settings.effective_batch(processes)
    made_here = [stage.folder.parent / name for name in stage.needs]
    return {
        "kind": {"stage": stage.stage.name},
        "settings": flatten(settings),
        FILES: {path: _identity(expand(path)) for path in _local_paths(settings, made_here)},
        "versions": {name: version for name, version in library_versions().items() if name in VERSIONS},
    }


def _changes(before: Inputs, now: Inputs) -> str:
    """Returns which inputs differ from those of a recorded run, and how; empty where none does."""
    kinds, details = [], []
    for kind in now:
        old, new = before.get(kind, {}), now[kind]
        keys = [key for key in new | old if old.get(key, ...) != new.get(key, ...)]
        kinds += [kind] if keys else []
        changes = (f"{key} {shorten(show(old.get(key)))} → {shorten(show(new.get(key)))}" for key in keys)
        details += keys if kind == FILES else changes
    return f"its {' and '.join(kinds)} changed ({shorten(', '.join(details), LONGEST_CHANGES)})" if kinds else ""


def _local_paths(value: Any, made_here: list[Path]) -> list[str]:
    """Returns the texts in the settings that name existing files or folders, needed stages' run folders left out. Of a
    reward function, named `path/to/file.py:name`, it is the file."""
    if isinstance(value, (dict, list)):
        entries = value.values() if isinstance(value, dict) else value
        return [path for inner in entries for path in _local_paths(inner, made_here)]
    if not isinstance(value, str) or len(value) > 1024 or "\n" in value:
        return []
    for text in (value, value.rpartition(":")[0]):
        if text and os.path.exists(expand(text)):
            return [] if any(Path(text).is_relative_to(folder) for folder in made_here) else [text]
    return []


def _identity(path: Path) -> str:
    """Returns the sizes and times of a file, or of the files in a folder, as a hash."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.is_file() and file.name != PAGE]
    seen = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def read_state(output_dir: Path) -> State:
    """Returns the stages of a pipeline's folder that were started."""
    path = output_dir / STATE
    if not path.is_file():
        return {}
    try:
        return TypeAdapter(State).validate_python(read_json(path), strict=True)
    except (UserError, ValidationError):
        again = "remove it and the stages' folders to run every stage again"
        raise UserError(f"{path}: this record is damaged, or of another version of llmlab; {again}") from None


def write_pipeline_page(folder: Path) -> Path:
    """Writes `report.html` into a pipeline's folder, and returns its path."""
    stages = []
    for name, entry in read_state(folder).items():
        place = folder / name
        recorded = (place / RECORD).is_file()  # it may have ended before it wrote a record
        run = open_or_note(place) if recorded else RunFolder(place, {})
        metric = curve_metric(run)
        charts = charts_of(run, metric) if metric else []
        stage = {
            "name": name,
            "kind": run.stage or entry["inputs"].get("kind", {}).get("stage", name),
            "status": run.status if recorded or entry["status"] == "finished" else "failed",
            "run": run,
            "charts": [replace(chart, title=f"{name}: {chart.title}") for chart in charts],
            "events": len(run.events),
            "needs": list(entry["needed_runs"]),
        }
        stages.append(stage)
    stages.sort(key=lambda stage: str(stage["run"].record.get("started", "~")))  # those without a record last
    return write_page(folder / PAGE, "pipeline.html", folder=folder, stages=stages)

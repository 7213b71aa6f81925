"""Runs a pipeline's stages in order: skips what is finished and unchanged, resumes what was interrupted.

What each stage does is the stage's own business; here is only what was run, from what, and whether that still holds.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from llmlab import __version__
from llmlab.pipeline.reading import Pipeline, PipelineStage
from llmlab.settings.errors import UserError
from llmlab.settings.files import write_atomically

STATE = "pipeline.json"
VERSIONS = ("torch", "transformers", "trl", "tokenizers", "datasets")
WITHOUT_CONSEQUENCE = {"output_dir", "cache_dir", "num_proc"}  # settings that do not decide what is written
Action = Literal["skip", "run", "resume"]


@dataclass(frozen=True)
class Step:
    """What will be done with a stage, and why."""

    stage: PipelineStage
    action: Action
    reason: str
    fingerprint: str


def plan(pipeline: Pipeline) -> list[Step]:
    """Decides for each stage whether it is skipped, resumed or run.

    A stage is finished when its recorded fingerprint (settings, inputs, versions, and those of the stages before it)
    is the present one; an interrupted stage with the same fingerprint resumes where its kind can.
    """
    state = _read_state(pipeline)
    steps: list[Step] = []
    fingerprints: dict[str, str] = {}
    for stage in pipeline.stages:
        fingerprint = fingerprints[stage.name] = _fingerprint(stage, fingerprints)
        recorded = state.get(stage.name, {})
        rerun = next((s.stage.name for s in steps if s.stage.name in stage.needs and s.action != "skip"), None)
        if not recorded:
            action, reason = "run", "not run yet"
        elif recorded["fingerprint"] != fingerprint:
            action, reason = "run", "its settings, inputs or versions changed"
        elif rerun:
            action, reason = "run", f"'{rerun}' runs again"
        elif recorded["status"] != "finished":
            resumable = stage.stage.resumes and any(stage.folder.glob("checkpoint-*/trainer_state.json"))
            action, reason = ("resume", "it was interrupted") if resumable else ("run", "it did not finish")
        elif not stage.folder.is_dir():
            action, reason = "run", "its run folder is gone"
        else:
            action, reason = "skip", "finished"
        steps.append(Step(stage, action, reason, fingerprint))
    return steps


def execute(pipeline: Pipeline, steps: list[Step]) -> Iterator[Step]:
    """Does the steps one after the other, yielding each before it starts."""
    state = _read_state(pipeline)
    for step in steps:
        yield step
        if step.action == "skip":
            continue
        if step.action == "run":
            _set_aside(step.stage.folder)
        state[step.stage.name] = {"fingerprint": step.fingerprint, "status": "started"}
        _write_state(pipeline, state)
        resume = {"resume": step.stage.folder} if step.action == "resume" else {}
        step.stage.stage.function(step.stage.resolved, **resume)
        state[step.stage.name]["status"] = "finished"
        _write_state(pipeline, state)


def _set_aside(folder: Path) -> None:
    """Keeps the run folder of an earlier try as `<name>.previous`; the one before that goes."""
    if folder.exists():
        previous = folder.with_name(f"{folder.name}.previous")
        if previous.exists():
            shutil.rmtree(previous)
        os.replace(folder, previous)


def _fingerprint(stage: PipelineStage, earlier: dict[str, str]) -> str:
    """Returns a hash of everything that decides what a stage writes."""
    settings = stage.resolved.settings.model_dump(mode="json", exclude=WITHOUT_CONSEQUENCE)
    material = {
        "stage": stage.stage.name,
        "settings": settings,
        "needs": {name: earlier[name] for name in stage.needs},
        "files": {path: _identity(Path(path)) for path in _local_paths(settings, stage)},
        "versions": {"llmlab": __version__, **{name: version(name) for name in VERSIONS}},
    }
    return hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()


def _local_paths(value: Any, stage: PipelineStage) -> list[str]:
    """Returns the texts in the settings that name existing files or folders, other stages' run folders left out."""
    if isinstance(value, dict):
        return [path for inner in value.values() for path in _local_paths(inner, stage)]
    if isinstance(value, list):
        return [path for inner in value for path in _local_paths(inner, stage)]
    if not isinstance(value, str) or len(value) > 1024 or "\n" in value or not value or not os.path.exists(value):
        return []
    return [] if Path(value).is_relative_to(stage.folder.parent) else [value]


def _identity(path: Path) -> list[Any]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


def _read_state(pipeline: Pipeline) -> dict[str, Any]:
    path = pipeline.output_dir / STATE
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        raise UserError(f"{path}: this record is damaged; remove it to run every stage again") from None


def _write_state(pipeline: Pipeline, state: dict[str, Any]) -> None:
    write_atomically(pipeline.output_dir / STATE, json.dumps(state, indent=2) + "\n")

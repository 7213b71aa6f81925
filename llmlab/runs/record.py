"""The run folder's own record: `llmlab.json` (what was run, from what, on what) and `metrics.jsonl` (its curves). The
weights beside them are ordinary Transformers files, written by the trainer."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic's, before Python 3.12

from llmlab import __version__
from llmlab.health.symptoms import Event
from llmlab.settings.errors import UserError, reading
from llmlab.settings.files import finite, read_json, write_atomically

RECORD = "llmlab.json"
METRICS = "metrics.jsonl"
END_OF_METRICS = 4096  # bytes, most often of several lines
EVENTS = "health.jsonl"
COMPLETIONS = "completions.jsonl"
TENSORBOARD = "tensorboard"  # the folder of its event files
HARDEST_ROWS = "hardest_rows.jsonl"
LARGEST = 1e307  # number: differences of larger ones are infinite
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")


FIELDS: dict[str, Any] = {  # those that readers rely on; more are allowed
    **dict.fromkeys(("stage", "status", "started", "ended"), str),
    **dict.fromkeys(("step", "steps"), int),
    **dict.fromkeys(("settings", "metrics"), dict[str, Any]),
    **dict.fromkeys(("sources", "versions"), dict[str, str]),
    "parents": list[str | None],
    "data": dict[str, Any] | None,
    "batch": TypedDict("Batch", {"rows": int, "validation_rows": int, "settings": dict[str, int | None]}),
    "data_files": dict[str, dict[str, Any]],
    "resumed": list[TypedDict("Resumed", {"step": int, "at": str})],
    "rollbacks": list[TypedDict("Rollback", {"step": int, "to": int, "changes": dict[str, list[Any]]})],
    "hardware": TypedDict("Hardware", {"memory": float, "processes": int}, total=False),
    "git": TypedDict("Git", {"revision": str}) | None,
}
SHAPE = TypeAdapter(TypedDict("Record", FIELDS, total=False))  # type: ignore[misc]


@dataclass(frozen=True)
class RunResult:
    """What a stage returns: its run folder and the last value of every metric."""

    folder: Path
    metrics: dict[str, float]


class RunRecord:
    """Writes a run folder's record as the run goes on; only the main process may hold one. `values` are `stage`,
    `settings`, `sources` (where each setting's value came from), `parents` (run folders or hub ids that the run starts
    from), `hardware`, and whatever else is known before it starts."""

    def __init__(self, folder: Path, **values: Any):
        self.folder = folder
        self.values: dict[str, Any] = {**values, "cwd": os.getcwd(), "status": "running", "started": _now()}
        self.values |= {"versions": library_versions(), "git": git_revision()}
        self.listeners: list[Callable[[Event], None]] = []  # of health events
        self._clock = time.monotonic()
        self._seconds_before = 0.0

    def start(self, resumed_step: int | None = None) -> None:
        """Writes the record; a resumed run keeps its start, and its metrics up to the step that it resumes at."""
        if resumed_step is not None:
            earlier = read_record(self.folder)
            self.values["rollbacks"] = earlier.get("rollbacks", [])
            self.values["started"] = earlier.get("started", self.values["started"])
            self.values["resumed"] = [*earlier.get("resumed", []), {"step": resumed_step, "at": _now()}]
            kept = {}
            for file, read in ((METRICS, read_metrics), (COMPLETIONS, read_completions)):
                kept[file] = [line for line in read(self.folder) if resumed_step and line["step"] <= resumed_step]
                if (self.folder / file).exists():
                    write_atomically(self.folder / file, "".join(_json(line) + "\n" for line in kept[file]))
            self._seconds_before = kept[METRICS][-1]["seconds"] if kept[METRICS] else 0.0
        self._write()

    def log(self, step: int, tokens: int, metrics: dict[str, Any]) -> None:
        """Appends one line to `metrics.jsonl`; `seconds` includes the earlier parts of a resumed run."""
        seconds = round(self._seconds_before + time.monotonic() - self._clock, 3)
        self._append(METRICS, {"step": step, "tokens": tokens, "seconds": seconds, **metrics})

    def log_event(self, event: Event) -> None:
        """Appends a health event to `health.jsonl`; events stay when their steps are undone."""
        self._append(EVENTS, asdict(event))
        for listener in self.listeners:
            listener(event)

    def log_completion(self, step: int, **values: Any) -> None:
        """Appends what the model answered at a step, `prompt` and `completion` (text or messages), for the report."""
        self._append(COMPLETIONS, {"step": step, **values})

    def _append(self, file: str, line: dict[str, Any]) -> None:
        with (self.folder / file).open("a", encoding="utf-8") as handle:
            handle.write(_json(line) + "\n")

    def change(self, settings: dict[str, Any], source: str) -> None:
        """Writes settings that the run changed itself, and what did."""
        self.values["settings"] |= settings
        self.values["sources"] |= dict.fromkeys(settings, source)
        self._write()

    def roll_back(self, event: Event, to: int, changes: dict[str, tuple[Any, Any]]) -> None:
        """Writes that the run goes on from an earlier step, with settings changed as `changes_of` returns them."""
        entry = {"step": event.step, "since": event.since or event.step, "to": to, "symptom": event.symptom}
        changed = {name: list(values) for name, values in changes.items()}
        self.values["rollbacks"] = [*self.values.get("rollbacks", []), {**entry, "changes": changed}]
        self.change({name: after for name, (_, after) in changes.items()}, f"rollback at step {event.step}")

    def finish(self, status: str, **results: Any) -> None:
        """Writes how the run ended: `finished`, `interrupted`, `diverged` or `failed`, with its results."""
        self.values.update(status=status, ended=_now(), **results)
        self._write()

    def _write(self) -> None:
        write_atomically(self.folder / RECORD, _json(self.values, indent=2) + "\n")


def record_result(
    folder: Path, *, stage: str, resolved: Any, parents: list[str], metrics: dict[str, float], **results: Any
) -> RunResult:
    """Writes the record of a finished stage that has no steps."""
    values = {"settings": resolved.settings.recorded(), "sources": resolved.sources}
    record = RunRecord(folder, stage=stage, parents=parents, hardware={}, **values)
    record.finish("finished", metrics=metrics, **results)
    return RunResult(folder, metrics)


def read_record(folder: Path) -> dict[str, Any]:
    """Returns a run folder's record, or an empty mapping where there is none (a plain Transformers folder)."""
    path = folder / RECORD
    if not os.path.lexists(path):
        return {}
    try:
        values = read_json(path)
    except UserError as error:
        raise UserError(f"this record is damaged: {error}") from None
    try:
        SHAPE.validate_python(values, strict=True)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path}: this record is damaged: {key}: {error.errors()[0]['msg']}") from None
    return values


def started_in(folder: Path, record: dict[str, Any]) -> Path | None:
    """Returns the folder that a run's relative paths count from, also where the whole tree has moved; None if gone."""
    output_dir = Path(str(record.get("settings", {}).get("output_dir", "")))
    folder, depth = folder.resolve(), len(output_dir.parts)
    if depth and not output_dir.is_absolute() and folder.parts[-depth:] == output_dir.parts:
        return Path(*folder.parts[:-depth])
    cwd = Path(str(record.get("cwd", "")))
    return cwd if cwd.is_absolute() and cwd.is_dir() else None


def read_metrics(folder: Path, *, last: bool = False) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`, or its last ones, but those that a crash cut off or damaged."""
    lines = _read_lines(folder / METRICS, "metrics", END_OF_METRICS if last else sys.maxsize)
    return [line for line in lines if all(is_number(line.get(name, 0)) for name in ("step", "tokens", "seconds"))]


def read_events(folder: Path) -> list[Event]:
    """Returns the health events of a run, oldest first; a value that was not finite is NaN."""
    events = []
    for line in _read_lines(folder / EVENTS, "health events"):
        if isinstance(line.get("value"), str) or line.get("value", 0) is None:
            line["value"] = math.nan
        with suppress(ValidationError):  # damaged
            events.append(TypeAdapter(Event).validate_python(line))
    return events


def read_completions(folder: Path) -> list[dict[str, Any]]:
    """Returns the completions that a run recorded on its way, oldest first."""
    return [line for line in _read_lines(folder / COMPLETIONS, "completions") if is_number(line.get("step"))]


def read_hardest_rows(folder: Path) -> list[dict[str, Any]]:
    """Returns the validation rows with the highest loss at the last evaluation, the highest first."""
    lines = _read_lines(folder / HARDEST_ROWS, "hardest rows")
    return [line for line in lines if is_number(line.get("loss")) and is_number(line.get("row"))]


def _read_lines(path: Path, what: str, size: int = sys.maxsize) -> list[dict[str, Any]]:
    """Returns the mappings of the last bytes of a JSON Lines file but those that are damaged or cut off."""
    if not path.is_file():
        return []
    with reading(path, what), path.open("rb") as file:
        file.seek(max(path.stat().st_size - size, 0))
        return parse_lines(file.read().decode("utf-8", errors="replace").splitlines())


def parse_lines(texts: Iterable[str]) -> list[dict[str, Any]]:
    """Returns the mappings of lines of JSON but those that are damaged."""
    lines = []
    for text in texts:
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def is_number(value: Any) -> bool:
    """Whether a plain value is a number that sums and charts can take: finite, and no integer beyond floats."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def library_versions() -> dict[str, str]:
    """Returns the versions of Python, llmlab and the libraries that decide what a run does."""
    return {"python": sys.version.split()[0], "llmlab": __version__, **{name: version(name) for name in LIBRARIES}}


def git_revision() -> dict[str, Any] | None:
    """Returns the revision of the working directory's repository, or None outside one; `rev-parse`, unlike `status`,
    runs nothing that the repository's configuration names."""
    try:
        words = ["git", "-c", "safe.directory=*", "rev-parse", "HEAD"]  # mounted folders have other owners
        found = subprocess.run(words, capture_output=True, text=True, timeout=1)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {"revision": found.stdout.strip()} if found.returncode == 0 else None


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

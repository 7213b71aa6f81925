"""Search, lineage and comparison of run folders, from their `llmlab.json` and `metrics.jsonl` alone. `record.py`
writes these; `cli/runs.py` shows what is found here."""

import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from llmlab.health.symptoms import Event
from llmlab.runs.record import EVENTS, METRICS, RECORD, is_number, read_events, read_metrics, read_record, started_in
from llmlab.settings.base import local_names, show
from llmlab.settings.errors import UserError
from llmlab.settings.files import read_table
from llmlab.settings.paths import expand, missing

Status = Literal["running", "finished", "interrupted", "diverged", "failed", "died", "damaged"]

TABLES = read_table("llmlab.runs", "metrics")
KEY_METRICS, LOSSES = TABLES["key_metrics"], TABLES["losses"]
SILENT_SECONDS = 600  # a running run that logs seldom may be silent for this long, or
SILENT_GAPS = 5  # for this many times its longest time between two log events
RECENT = 20  # log events that tell the present pace
NOT_SEARCHED = (".", "checkpoint-", "node_modules", "__pycache__", "site-packages")  # beginnings of folders' names


@dataclass(frozen=True)
class RunFolder:
    """A run folder with its record, which is empty where it is damaged (`problem` says why)."""

    folder: Path
    record: dict[str, Any]
    problem: str = ""
    stamp: tuple[tuple[int, int], ...] = ()  # times and sizes of its files before they were read

    @cached_property
    def events(self) -> list[Event]:
        """The health events, oldest first."""
        return read_events(self.folder)

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        return read_metrics(self.folder)

    @cached_property
    def last_line(self) -> dict[str, Any]:
        """The last of `lines`, of which it needs no other."""
        lines = read_metrics(self.folder, last=True) or self.lines
        return lines[-1] if lines else {}

    @property
    def stage(self) -> str:
        return str(self.record.get("stage", ""))

    @property
    def started(self) -> datetime | None:
        return _time(self.record.get("started"))

    @property
    def step(self) -> int | None:
        """The last step that was recorded, or None where there are no steps."""
        return self.record["step"] if "step" in self.record else self.last_line.get("step")

    @property
    def seconds_left(self) -> float | None:
        """The time that a running run still needs, at the pace of its last log events."""
        steps, seconds = ([line.get(key, 0) for line in self.lines[-RECENT:]] for key in ("step", "seconds"))
        if not (self.record.get("steps") and steps and steps[-1] > steps[0] and self.status == "running"):
            return None
        pace = (seconds[-1] - seconds[0]) / (steps[-1] - steps[0])
        return max(pace * (self.record["steps"] - steps[-1]) - self.silence, 0.0)

    @property
    def tokens(self) -> int | None:
        return self.last_line.get("tokens")

    @property
    def seconds(self) -> float | None:
        """The time it trained, without pauses before it was resumed; where no metrics say, from start to end."""
        if "seconds" in self.last_line:
            return float(self.last_line["seconds"])
        started, ended = self.started, _time(self.record.get("ended"))
        return (ended - started).total_seconds() if started and ended else None

    @property
    def silence(self) -> float:
        """Seconds since the folder last changed."""
        changed = [0.0]
        for path in (self.folder / RECORD, self.folder / METRICS, *self.folder.glob("checkpoint-*")):
            with suppress(FileNotFoundError):  # a checkpoint, or the run, that was removed just now
                changed.append(path.stat().st_mtime)
        return max(time.time() - max(changed), 0.0)

    @property
    def status(self) -> Status:
        """As recorded; a run recorded as running that has not logged for long counts as died."""
        if self.problem:
            return "damaged"
        recorded = self.record.get("status", "finished")
        if recorded != "running":
            return recorded
        moments = [0.0, *(line.get("seconds", 0.0) for line in self.lines)]
        longest = max((after - before for before, after in zip(moments, moments[1:], strict=False)), default=0.0)
        return "died" if self.silence > max(SILENT_SECONDS, SILENT_GAPS * longest) else "running"

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric: the recorded result, else the last one logged."""
        return {name: values[-1][1] for name, values in self.curves.items()} | self.result

    @property
    def result(self) -> dict[str, float]:
        """The recorded metrics: all of a finished run, and none of one that is not."""
        return {name: value for name, value in self.record.get("metrics", {}).items() if is_number(value)}

    @cached_property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Metric -> its finite values as (step, value), in order."""
        found: dict[str, list[tuple[int, float]]] = {}
        for line in self.lines:
            for name, value in line.items():
                if name not in ("step", "tokens", "seconds") and is_number(value) and "step" in line:
                    found.setdefault(name, []).append((line["step"], value))
        return found

    @property
    def key_metric(self) -> tuple[str, float] | None:
        """The headline metric of the stage, and its last value."""
        metrics = self.result or self.metrics
        names = (*KEY_METRICS.get(self.stage, ()), *LOSSES)
        return next(((name, metrics[name]) for name in names if name in metrics), None)

    @property
    def parents(self) -> list[str]:
        return [str(parent) for parent in self.record.get("parents", []) if parent]

    def best(self, metric: str) -> tuple[int, float] | None:
        """Returns the (step, value) where a metric was best; None without a curve or a better direction."""
        sign, curve = direction(metric), self.curves.get(metric)
        return max(curve, key=lambda point: sign * point[1]) if curve and sign else None


@dataclass(frozen=True)
class Ancestor:
    """A node of a lineage: a run, or a model that is none, with its parents."""

    name: str
    run: RunFolder | None
    parents: tuple["Ancestor", ...]


def open_run(folder: str | Path) -> RunFolder:
    """Returns the run of a folder; the error where there is none names the nearest."""
    folder = expand(folder)
    if os.path.lexists(folder / RECORD):
        return RunFolder(folder, read_record(folder))
    if not os.path.exists(folder):
        raise missing(str(folder), "run folder")
    holds = f"; did you mean '{folder.parent}', which holds it?" if (folder.parent / RECORD).is_file() else ""
    raise UserError(f"{folder}: this is no run folder of llmlab: it has no {RECORD}{holds}")


def find_runs(folder: str | Path, earlier: Iterable[RunFolder] = (), *, deepest: int | None = None) -> list[RunFolder]:
    """Returns the runs in a folder and below (so many levels, or all), not in hidden folders, environments and
    checkpoints, by their start; of those found `earlier`, unchanged ones are returned again."""
    known = {run.folder: run for run in earlier}
    if not os.path.isdir(expand(folder)):
        raise UserError(f"{folder}: there is no such folder")
    found = []
    for place, inner, files in os.walk(expand(folder)):
        if "pyvenv.cfg" in files:
            inner.clear()
            continue
        inner[:] = [name for name in inner if not name.startswith(NOT_SEARCHED)]
        if RECORD in (*files, *inner):
            paths = [os.path.join(place, name) for name in (RECORD, METRICS, EVENTS)]
            seen = [os.stat(path) for path in paths if os.path.exists(path)]
            stamp, before = tuple((file.st_mtime_ns, file.st_size) for file in seen), known.get(Path(place))
            unchanged = before is not None and before.stamp == stamp
            found.append(before if unchanged else replace(open_or_note(Path(place)), stamp=stamp))
        if deepest is not None and len(Path(place).relative_to(expand(folder)).parts) >= deepest:
            inner.clear()
    return sorted(found, key=lambda run: (str(run.record.get("started", "")), str(run.folder)))


def all_settings(run: RunFolder) -> list[tuple[str, Any, str]]:
    """Returns (key, value, source) of the recorded settings; entries of a mapping have its source."""
    sources, found = run.record.get("sources", {}), []
    for key, value in flatten(run.record.get("settings", {})).items():
        named = key
        while named and named not in sources:
            named = named.rpartition(".")[0]
        found.append((key, value, sources.get(named, "default")))
    return found


def changed_settings(run: RunFolder) -> list[tuple[str, Any, str]]:
    """Returns those of `all_settings` that are not defaults."""
    return [row for row in all_settings(run) if row[2] != "default"]


def ancestors(run: RunFolder) -> Ancestor:
    """Returns the run with what it started from, back to models that are no run folders here."""

    def follow(run: RunFolder | None, name: str, seen: tuple[Path, ...]) -> Ancestor:
        if run is None or run.folder.resolve() in seen:
            return Ancestor(name, run, ())
        seen = (*seen, run.folder.resolve())
        found = [(find_parent(run, parent), parent) for parent in run.parents]
        return Ancestor(name, run, tuple(follow(up, str(up.folder) if up else name, seen) for up, name in found))

    return follow(run, str(run.folder), ())


def differing(runs: Sequence[RunFolder], part: str) -> dict[str, list[Any]]:
    """Returns key -> each run's value (`...` where it has none, unless all others have defaults) where they differ."""
    values = [flatten(run.record.get(part) or {}) for run in runs]
    changed = {key for run in runs for key, _, _ in changed_settings(run)} if part == "settings" else None
    rows: dict[str, list[Any]] = {}
    local = set().union(*(local_names(run.stage) for run in runs)) if part == "settings" else set()
    for key in dict.fromkeys(key for found in values for key in found if key not in local):
        row = [found.get(key, ...) for found in values]
        if any(value != row[0] for value in row) and (... not in row or changed is None or key in changed):
            rows[key] = row
    return rows


def summary(run: RunFolder) -> dict[str, Any]:
    """Returns what a list shows of a run, as plain values."""
    key = run.key_metric
    return {
        "folder": str(run.folder),
        **{name: getattr(run, name) for name in ("stage", "status", "step", "tokens")},
        "key_metric": {"name": key[0], "value": key[1]} if key else None,
        "parents": run.parents,
        **{name: run.record.get(name) for name in ("started", "ended")},
        "seconds": run.seconds,
        **({"problem": run.problem} if run.problem else {}),
    }


def short_names(runs: Sequence[RunFolder]) -> list[str]:
    """Returns the names of the runs' folders, or where two are the same, their paths below what all share."""
    folders = [run.folder.resolve() for run in runs]
    if len({folder.name for folder in folders}) == len(folders):
        return [folder.name for folder in folders]
    return [os.path.relpath(folder, os.path.commonpath([folder.parent for folder in folders])) for folder in folders]


def curve_metric(run: RunFolder) -> str | None:
    """Returns the metric to draw of a run: the stage's own or a loss, the first that has a few values."""
    names = [name for name in (*KEY_METRICS.get(run.stage, ()), *LOSSES) if name in run.curves]
    return max(names, key=lambda name: min(len(run.curves[name]), 3), default=None)


def is_shown(metric: str) -> bool:
    """Whether a metric is one of the model or of the run's speed, and no bookkeeping of the trainer's."""
    return metric == "tokens_per_second" or not metric.endswith(tuple(TABLES["not_shown"]))


def direction(metric: str) -> int:
    """Returns -1 where smaller is better, 1 where larger is, 0 where neither is."""
    name = f"_{metric.replace('/', '_')}_"
    return next((sign for sign, words in TABLES["better"].items() for word in words if f"_{word}_" in name), 0)


def best_of(metric: str, values: Sequence[float | None]) -> float | None:
    """Returns the best of some runs' values of a metric; None where all are equal or no direction is better."""
    sign, present = direction(metric), {value for value in values if value is not None}
    return max(present, key=lambda value: sign * value) if sign and len(present) > 1 else None


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one, under dotted keys; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def brief(value: Any) -> str:
    """Returns a setting's value for a cell: of mappings in a list (data sources, rewards) only what is set."""
    if not (isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value)):
        return show(value)
    shown = []
    for entry in value:
        rest = {k: v for k, v in entry.items() if k != "name" and v not in (None, {}, 1.0, "train")}
        shown.append(f"{entry.get('name', '')} {show(rest) if rest else ''}".strip())
    return "\n".join(shown)


def find_parent(run: RunFolder, parent: str) -> RunFolder | None:
    """Returns the run that a recorded parent (or a checkpoint in it) names, or None where it is no run folder here."""
    folder, here = run.folder.resolve(), Path.cwd()
    for root in (started_in(run.folder, run.record) or here, here):
        place = root / expand(parent)
        for candidate in (place, place.parent):
            if os.path.isfile(candidate / RECORD) and (found := candidate.resolve()) != folder:
                return open_or_note(found.relative_to(here) if found.is_relative_to(here) else found)
    return None


def open_or_note(folder: Path) -> RunFolder:
    """Returns the run of a folder, with a `problem` where its record is damaged."""
    try:
        return open_run(folder)
    except UserError as error:
        return RunFolder(folder, {}, str(error))


def _time(text: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
        return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    except (TypeError, ValueError):
        return None

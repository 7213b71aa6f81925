"""A queue of pipelines in a plain folder: each job is a folder in `waiting`, `running`, `done` or `failed`.

There is no server: one worker at a time holds the queue's lock, and every job runs in a process of its own.
"""

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import psutil

from llmlab.pipeline.reading import read_pipeline
from llmlab.runs.lock import NO_LOCKS, fcntl
from llmlab.runs.signals import handle_signals, interrupt
from llmlab.settings.base import is_group
from llmlab.settings.errors import UserError
from llmlab.settings.files import dump, read_json, read_layer
from llmlab.settings.gates import read_gates
from llmlab.stages import STAGES

STATES = ("running", "waiting", "failed", "done")
JOB, RECIPE, WORKER = "job.json", "recipe.json", ".worker"
POLL = 1.0  # seconds


@dataclass(frozen=True)
class Job:
    """One pipeline of a queue: its folder holds a copy of the recipe, and `job.json` about it."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def state(self) -> str:
        return self.folder.parent.name

    @property
    def recipe(self) -> Path:
        return self.folder / RECIPE

    @property
    def record(self) -> dict[str, Any]:
        """Where the job was added from (`recipe`, `cwd`), and when and how it ended; nothing where it is damaged."""
        with suppress(UserError):
            return read_json(self.folder / JOB)
        return {}

    def move(self, state: str, **record: Any) -> "Job":
        """Returns the job in another state, with more in its record."""
        dump({**self.record, **record}, self.folder / JOB)
        place = self.folder.parents[1] / state / self.name
        place.parent.mkdir(exist_ok=True)
        os.rename(self.folder, place)
        return Job(place)


def find_jobs(queue: Path) -> list[Job]:
    """Returns the jobs of a queue by their states, in the order in which they run."""
    return [Job(path.parent) for state in STATES for path in sorted(queue.glob(f"{state}/*/{JOB}"))]


def copy_recipe(path: Path, *, hardware: str | None, allow_code: bool) -> dict[str, Any]:
    """Returns what a recipe holds and the settings files that it names, once all of it is found to be right."""
    pipeline = read_pipeline(path, hardware=hardware, allow_code=allow_code)
    values = read_layer(path).values
    for name, settings in values["stages"].items():
        kind = str((settings or {}).get("stage", name)).replace("rs_sft", "rs-sft")
        fields = STAGES[kind].settings_class.model_fields
        for key, value in (settings or {}).items():
            if key in fields and is_group(fields[key].annotation) and isinstance(value, str):
                beside = path.parent / value
                settings[key] = read_layer(beside if beside.exists() else value).values
            elif key == "gates":
                settings[key] = read_gates(value)
    # without it, the folder would be named after the file
    return {**values, "output_dir": str(pipeline.output_dir), **({"hardware": hardware} if hardware else {})}


def add(queue: Path, path: Path, values: dict[str, Any]) -> Job:
    """Adds a copy of a recipe behind the jobs that are there; its relative paths count from the present folder."""
    (queue / "waiting").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adding-", dir=queue) as temporary:
        folder = Path(temporary) / "job"
        folder.mkdir()
        dump(values, folder / RECIPE)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        dump({"recipe": str(path.absolute()), "cwd": os.getcwd(), "added": now}, folder / JOB)
        numbers = [job.name.partition("-")[0] for job in find_jobs(queue)]
        number = 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)
        while True:
            place = queue / "waiting" / f"{number:04}-{path.stem}"
            with suppress(OSError):  # another process has just taken this number
                os.rename(folder, place)
                return Job(place)
            number += 1


def take(queue: Path) -> IO[str] | None:
    """Returns the lock of a queue, or None where a worker has it; waits for the job that a killed worker left running.

    Unlike that of a run folder it is inherited by the job's process, which outlives a worker that is killed.
    """
    handle = (queue / WORKER).open("a+", encoding="utf-8")
    while fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in NO_LOCKS:
                break
        handle.seek(0)
        pid, _, host = handle.read().partition(" on ")
        if pid.isdecimal() and (host != socket.gethostname() or psutil.pid_exists(int(pid))):
            handle.close()
            return None
        time.sleep(POLL)
    handle.truncate(0)
    handle.write(f"{os.getpid()} on {socket.gethostname()}")
    handle.flush()
    return handle


def is_worked_on(queue: Path) -> bool:
    """Whether a worker, or a job that a killed one started, is at work."""
    if fcntl is None or not (queue / WORKER).is_file():
        return False
    with (queue / WORKER).open("a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in NO_LOCKS
    return False


def work(queue: Path, command: Sequence[str]) -> Iterator[tuple[Job, int | None]]:
    """Runs every job as `command RECIPE`, interrupted ones first; yields each before it (None) and after (exit code).

    Where another process works on the queue, that one runs what waits, and nothing is yielded.
    """
    while waiting := [job for job in find_jobs(queue) if job.state in STATES[:2]]:
        lock = take(queue)
        if lock is None:
            return
        with lock:
            while waiting := [job for job in find_jobs(queue) if job.state in STATES[:2]]:
                job = waiting[0] if waiting[0].state == "running" else waiting[0].move("running")
                yield job, None
                started = time.time()
                ended: dict[str, Any] = {}
                try:
                    code = run_job(job, command, lock)
                except OSError as error:
                    code, ended = 2, {"problem": f"{error.filename}: {error.strerror}"}
                ended |= {"exit_code": code, "seconds": round(time.time() - started, 1)}
                job = job.move("failed" if code else "done", **ended)
                yield job, code


def run_job(job: Job, command: Sequence[str], lock: IO[str]) -> int:
    """Runs one job in its own folder and returns its exit code; a stop signal ends it first and stays raised."""
    signals: list[int] = []

    def stop(number: int) -> None:
        signals.append(number)
        if process is not None:
            process.send_signal(number)

    process = None
    with handle_signals(stop):
        process = subprocess.Popen(
            [*command, str(job.recipe.absolute())],
            cwd=job.record.get("cwd", f"the folder that {job.folder / JOB} named"),  # damaged: no such folder
            start_new_session=True,  # Ctrl+C reaches it once, through `stop`
            pass_fds=() if fcntl is None else (lock.fileno(),),
        )
        code = process.wait()
    if signals:
        interrupt(signals[0])
    return code

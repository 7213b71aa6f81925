"""A queue of pipelines in a plain folder: each job is a folder in `waiting`, `running`, `done` or `failed`. There is
no server: one worker at a time holds the queue's lock, and every job runs in a process of its own."""

import errno
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from llmlab.pipeline.reading import read_pipeline
from llmlab.runs.checkpoints import locked
from llmlab.runs.signals import handle_signals, interrupt
from llmlab.settings.errors import UserError
from llmlab.settings.files import dump, read_json, read_layer

LEFT = ("running", "waiting")  # the states of jobs that are not over, in the order in which they run
JOB, RECIPE = "job.json", "recipe.json"
POLL = 1.0  # seconds


def find_jobs(queue: Path, states: Sequence[str] = (*LEFT, "failed", "done")) -> list[Path]:
    """Returns the folders of a queue's jobs, `STATE/NUMBER-NAME`, in the order in which they run."""
    return [path.parent for state in states for path in sorted(queue.glob(f"{state}/*/{JOB}"))]


def read_job(job: Path) -> dict[str, Any]:
    """Returns where a job was added from (`recipe`, `cwd`), and how it ended; nothing where that is damaged."""
    with suppress(UserError):
        return read_json(job / JOB)
    return {}


def move(job: Path, state: str, **record: Any) -> Path:
    """Returns the job's folder in another state, with more in its record."""
    dump({**read_job(job), **record}, job / JOB)
    place = job.parents[1] / state / job.name
    place.parent.mkdir(exist_ok=True)
    return job.rename(place)


def copy_recipe(path: Path, *, allow_code: bool) -> dict[str, Any]:
    """Returns what a recipe holds, with the settings files that it names, once all of it is found to be right."""
    pipeline = read_pipeline(path, allow_code=allow_code)
    values = read_layer(path).values
    for settings in filter(None, values["stages"].values()):
        for key in ("model", "reward_config"):
            name = settings.get(key)  # beside the recipe, or in the present folder; or a model of the stage `sample`
            if isinstance(name, str) and name.endswith((".json", ".yaml", ".yml", ".py")):
                settings[key] = read_layer(path.parent / name if (path.parent / name).exists() else name).values
    return {**values, "output_dir": str(pipeline.output_dir)}  # by default it has the file's name


def add(queue: Path, path: Path, values: dict[str, Any]) -> Path:
    """Adds the copy of a recipe behind the jobs that are there; its relative paths count from the present folder."""
    (queue / "waiting").mkdir(parents=True, exist_ok=True)
    # in the order in which jobs pass through the states: one that is moved meanwhile is not missed
    folders = (folder for state in ("waiting", "running", "failed", "done") for folder in queue.glob(f"{state}/*"))
    numbers = [folder.name.partition("-")[0] for folder in folders]
    number = max((int(number) for number in numbers if number.isdecimal()), default=0)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory(prefix=".adding-", dir=queue) as temporary:
        job = Path(temporary) / "job"
        job.mkdir()
        dump(values, job / RECIPE)
        dump({"recipe": str(path.absolute()), "cwd": os.getcwd(), "added": now}, job / JOB)
        while True:
            number += 1
            try:
                return job.rename(queue / "waiting" / f"{number:04}-{path.stem}")
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process has just added one
                    raise


def work(queue: Path, command: Sequence[str]) -> Iterator[tuple[Path, int | None]]:
    """Runs every job as `command RECIPE`, interrupted ones first; yields each before it (None) and after (exit code).
    Where another process works on the queue, that one runs what waits, and nothing is yielded."""
    while find_jobs(queue, LEFT):
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(queue))
            except UserError:  # held by another worker
                return
            while jobs := find_jobs(queue, LEFT):
                job = move(jobs[0], "running") if jobs[0].parent.name == "waiting" else jobs[0]
                yield job, None
                try:
                    code, problem = run_job(job, command), ""
                except OSError as error:
                    code, problem = 2, f"{error.filename}: {error.strerror}"
                yield move(job, "failed" if code else "done", exit_code=code, problem=problem), code


def run_job(job: Path, command: Sequence[str]) -> int:
    """Runs one job where it was added and returns its exit code; a stop signal ends it first and stays raised."""
    signals: list[int] = []
    process: Any = None
    recipe = str((job / RECIPE).resolve())  # one spelling, by which the next worker finds the process

    def stop(number: int) -> None:
        signals.append(number)
        if process is not None:
            process.send_signal(number)

    while any(recipe in (each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"])):
        time.sleep(POLL)  # it outlived a worker that was killed: what is left of it is done next
    place = str(read_job(job).get("cwd", f"the folder that {job / JOB} named"))  # damaged: no such folder
    with handle_signals(stop):
        # a session of its own: Ctrl+C reaches it once, through `stop`
        process = subprocess.Popen([*command, recipe], cwd=place, start_new_session=True)
        if signals:  # before there was a process
            process.send_signal(signals[0])
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL)  # in turns: a signal just before one long wait would be heard after it
        code = process.returncode
    if signals:
        interrupt(signals[0])
    return code

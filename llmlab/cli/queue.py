"""`llmlab queue`: adds pipelines to a queue and runs them one after the other; without files it lists the queue."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column

from llmlab.cli.run import find_pipeline
from llmlab.settings.errors import UserError, reading
from llmlab.terminal import Terminal, make_table, safe

GO_ON = "llmlab queue --work runs what waits, and goes on with what was interrupted"
BUSY = "another process works on this queue, and runs what waits"


def queue(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE]...", help="Pipeline files, or names of shipped ones.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="The folder of the queue.")] = Path("runs/queue"),
    add_only: Annotated[bool, typer.Option("--add-only", help="Add the files, and run nothing now.")] = False,
    work: Annotated[bool, typer.Option("--work", help="Run what is in the queue, without adding anything.")] = False,
    run_options: Annotated[
        str, typer.Option(help="Options of llmlab run for every job: '--allow-code --accelerate ddp'.")
    ] = "",
) -> None:
    """Run pipelines one after the other; without files, list the queue.

    A job is a copy of its file: later changes to that do not change it. Relative paths count from the folder in which
    it was added. A job that fails does not stop the others; one whose process was killed goes on with --work.
    """
    from llmlab.pipeline import queue as jobs

    works = bool(files or work) and not add_only
    if add_only and (work or not files):
        raise UserError("--add-only: expected FILE beside it, and no --work")
    if run_options and not (files or work):
        raise UserError("--run-options: expected FILE or --work beside it; without them the queue is listed")
    with reading("--run-options", "words of a shell"):
        words = shlex.split(run_options)
    console = Terminal()
    allow_code, paths = "--allow-code" in words, [*map(find_pipeline, files or ())]
    copies = [(path, jobs.copy_recipe(path, allow_code=allow_code)) for path in paths]
    for path, values in copies:  # once all of them are right
        console.print(f"added {safe(jobs.add(folder, path, values).name)}", soft_wrap=True)
    ended, failed = 0, []
    for job, code in jobs.work(folder, [sys.executable, "-m", "llmlab", "run", *words]) if works else ():
        if code is None:
            console.rule(f"[bold]{safe(job.name)}[/]", align="left")
            continue
        ended, failed = ended + 1, failed + ([f"{job.name} (exit code {code})"] if code else [])
        console.print(f"[bold]{job.parent.name}[/]", safe(job.name), safe(jobs.read_job(job)["problem"]))
    if failed:
        again = "llmlab queue FILE adds it again, and finished stages are skipped"
        error = UserError(f"{len(failed)} of {ended} jobs failed: {', '.join(failed)}; {again}")
        error.exit_code = 1
        raise error
    if not works and not files:
        table = make_table("job", "state", "exit code", Column("recipe", overflow="fold"))
        for job in jobs.find_jobs(folder):
            record = {"exit_code": "", "recipe": "damaged", **jobs.read_job(job)}
            table.add_row(*(safe(text) for text in (job.name, job.parent.name, record["exit_code"], record["recipe"])))
        console.print(table if table.row_count else f"no jobs in {safe(folder)}")
    if jobs.find_jobs(folder, jobs.LEFT):
        console.print(f"[dim]{BUSY if works else GO_ON}[/]")

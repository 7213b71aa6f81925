"""`llmlab queue`: adds pipelines to a queue and runs them one after the other; without files it lists the queue."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column

from llmlab.cli.launch import Accelerate, NumProcesses, read_launch
from llmlab.cli.options import TrustRemoteCode
from llmlab.cli.run import find_pipeline
from llmlab.settings.errors import UserError
from llmlab.terminal import Terminal, duration, make_table, numeric, safe

STYLES = {"running": "cyan", "interrupted": "yellow", "failed": "red", "done": "green"}


def queue(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE]...", help="Pipeline files, or names of shipped ones.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="The folder of the queue.")] = Path("runs/queue"),
    add_only: Annotated[bool, typer.Option("--add-only", help="Add the files, and run nothing now.")] = False,
    work: Annotated[bool, typer.Option("--work", help="Run what is in the queue, without adding anything.")] = False,
    hardware: Annotated[str | None, typer.Option(help="A machine's values for what the files leave unset.")] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let all jobs run reward functions from Python files.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    accelerate: Accelerate = None,
    num_processes: NumProcesses = None,
) -> None:
    """Run pipelines one after the other; without files, list the queue.

    A job is a copy of its file: later changes to that do not change it. Relative paths count from the folder in which
    it was added. A job that fails does not stop the others; one whose process was killed goes on at the next call.
    """
    from llmlab.pipeline import queue as jobs

    if not files and (add_only or hardware):
        raise UserError(f"{'--add-only' if add_only else '--hardware'}: expected FILE beside it, a pipeline to add")
    running = {"--allow-code": allow_code, "--trust-remote-code": trust_remote_code, "--accelerate": accelerate}
    if not (files or work) and (alone := next((option for option, value in running.items() if value), None)):
        raise UserError(f"{alone}: expected FILE or --work beside it; without them the queue is listed")
    if add_only and work:
        raise UserError("--add-only and --work contradict each other; keep one")
    console = Terminal()
    read_launch(accelerate, num_processes, "")  # what is wrong with it is said now
    paths = [find_pipeline(name) for name in files or ()]
    for path, values in [(p, jobs.copy_recipe(p, hardware=hardware, allow_code=allow_code)) for p in paths]:
        console.print(f"added {safe(jobs.add(folder, path, values).name)}", soft_wrap=True)
    if add_only:
        return
    if not files and not work:
        return _print_jobs(console, folder)
    words = [*(["--allow-code"] if allow_code else []), *(["--trust-remote-code"] if trust_remote_code else [])]
    if accelerate:
        words += ["--accelerate", str(Path(accelerate).absolute()) if Path(accelerate).is_file() else accelerate]
    words += ["--num-processes", str(num_processes)] if num_processes else []
    failed, count = [], 0
    for job, code in jobs.work(folder, [sys.executable, "-m", "llmlab", "run", *words]):
        if code is None:
            console.rule(f"[bold]{safe(job.name)}[/]", align="left")
            continue
        count += 1
        failed += [f"{job.name} (exit code {code})"] if code else []
        console.print(f"[{STYLES[job.state]}]{job.state}[/] {safe(job.name)}", safe(job.record.get("problem", "")))
    if not count and jobs.is_worked_on(folder):
        return console.print("another process works on this queue, and runs what waits")
    if failed:
        again = "llmlab queue FILE adds it again, and finished stages are skipped"
        error = UserError(f"{len(failed)} of {count} jobs failed: {', '.join(failed)}; {again}")
        error.exit_code = 1
        raise error


def _print_jobs(console: Terminal, folder: Path) -> None:
    from llmlab.pipeline import queue as jobs

    found = jobs.find_jobs(folder)
    if not found:
        return console.print(f"no jobs in {safe(folder)}", soft_wrap=True)
    table = make_table("job", "state", Column("recipe", overflow="fold"), "added", numeric("took"), "exit code")
    for job in found:
        record = job.record
        state = "interrupted" if job.state == "running" and not jobs.is_worked_on(folder) else job.state
        style = STYLES.get(state, "none")
        added = str(record.get("added", ""))[:16].replace("T", " ")
        took, code = record.get("seconds"), record.get("exit_code")
        table.add_row(
            *(
                safe(job.name),
                f"[{style}]{state}[/]",
                safe(record.get("recipe", "damaged")),
                safe(added),
                duration(took),
            ),
            "" if code is None else str(code),
        )
    console.print(table)
    if any(job.state in ("running", "waiting") for job in found) and not jobs.is_worked_on(folder):
        console.print("[dim]llmlab queue --work runs what waits, and goes on with what was interrupted[/]")

"""`llmlab run PIPELINE.yaml` shows what each stage will do, then does it; `llmlab queue` runs several pipelines one
after the other, or lists them."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

from rich.table import Column
from typer import Argument, Option

from llmlab.cli.arguments import AllowCode, TrustRemoteCode
from llmlab.cli.launch import Accelerate, LaunchArgs, NumProcesses, read_launch
from llmlab.cli.options import print_warnings
from llmlab.settings.errors import UserError, did_you_mean, reading
from llmlab.settings.presets import RECIPE_FOLDER
from llmlab.terminal import Terminal, safe

GO_ON = "llmlab queue --work runs what waits, and goes on with what was interrupted"
BUSY = "another process works on this queue, and runs what waits"

OVERRIDES_HELP = "Settings that override the file's."
Overrides = Annotated[list[str] | None, Argument(metavar="[STAGE.KEY=VALUE]...", help=OVERRIDES_HELP)]


def run(
    pipeline: Annotated[str, Argument(help="A pipeline file, or the name of a shipped one: quickstart.")],
    overrides: Overrides = None,
    first: Annotated[str | None, Option("--from", metavar="STAGE", help="Rerun this stage and later ones.")] = None,
    only: Annotated[str | None, Option(metavar="STAGE", help="Run it alone; what it needs must be finished.")] = None,
    hardware: Annotated[str | None, Option(help="A machine's values for what the file leaves unset.")] = None,
    allow_code: AllowCode = False,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan and exit.")] = False,
    accelerate: Accelerate = None,
    num_processes: NumProcesses = None,
    launch_args: LaunchArgs = "",
) -> None:
    """Run a pipeline of stages from one YAML file: finished stages are skipped, interrupted ones resume.

    A stage whose settings, input files or library versions changed runs again, and with it every stage that needs it.
    """
    from llmlab.pipeline import execute, plan, read_pipeline, run_stage

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("run: a pipeline launches its stages itself: --accelerate NAME, not accelerate launch")
    launch = read_launch(accelerate, num_processes, launch_args)
    path = find_pipeline(pipeline)
    processes = launch.processes if launch else 1
    parsed = read_pipeline(path, overrides, allow_code=allow_code, hardware=hardware, processes=processes)
    for stage in parsed.stages:
        print_warnings(stage.resolved.warnings)
    steps = plan(parsed, first=first, only=only)
    console = Terminal()
    console.print(f"[bold]Pipeline[/] {safe(f'{path.name} in {parsed.output_dir}')}", soft_wrap=True)
    rows = []
    for step in steps:
        style = {"skip": "dim", "run": "bold", "resume": "bold cyan"}[step.action]
        rows.append([f"[{style}]{safe(cell)}[/]" for cell in (step.stage.name, step.action, step.reason)])
    columns = (Column("stage", no_wrap=True), Column("action", no_wrap=True), Column("why", overflow="fold"))
    console.table(columns, rows, header_style="dim")
    if dry_run:
        return
    # what cannot be launched is found before the first stage starts
    launched = [step.stage for step in steps if launch and step.stage.stage.resumes and step.action != "skip"]
    devices = [stage.resolved.settings.device for stage in launched]
    if any(launch.command((), device, here=True)[1].num_machines > 1 for device in devices):
        raise UserError(f"--accelerate {accelerate}: a pipeline runs on one machine; launch its stages one by one")
    for number, step in enumerate(execute(parsed, steps, launch.run_stage if launch else run_stage), start=1):
        if step.action != "skip":
            console.rule(f"{number}/{len(steps)}  {safe(step.stage.name)}", align="left")


def find_pipeline(name: str) -> Path:
    """Returns the file of a pipeline, or of the shipped recipe of this name."""
    path = Path(name)
    shipped = RECIPE_FOLDER / f"{name}.yaml"
    if path.suffix or path.exists():
        return path
    if not shipped.exists():
        known = sorted(recipe.stem for recipe in RECIPE_FOLDER.glob("*.yaml"))
        raise UserError(f"{name}: there is no such pipeline file or shipped recipe{did_you_mean(name, known)}")
    return shipped


def queue(
    files: Annotated[list[str] | None, Argument(metavar="[FILE]...", help="Pipeline files, or shipped names.")] = None,
    folder: Annotated[Path, Option(help="The folder of the queue.")] = Path("runs/queue"),
    work: Annotated[bool, Option("--work", help="Run what is in the queue, without adding anything.")] = False,
    run_options: Annotated[str, Option(help="Options of llmlab run: '--allow-code --accelerate ddp'.")] = "",
) -> None:
    """Run pipelines one after the other; without files, list the queue.

    A job is a copy of its file: later changes to that do not change it. Relative paths count from the folder in which
    it was added. A job that fails does not stop the others; one whose process was killed goes on with --work.
    """
    from llmlab.pipeline import queue as jobs

    works = bool(files or work)
    if run_options and not works:
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
    if not works:
        rows = []
        for job in jobs.find_jobs(folder):
            record = {"exit_code": "", "recipe": "damaged", **jobs.read_job(job)}
            rows.append(map(safe, (job.name, job.parent.name, record["exit_code"], record["recipe"])))
        if rows:
            console.table(("job", "state", "exit code", Column("recipe", overflow="fold")), rows)
        else:
            console.print(f"no jobs in {safe(folder)}")
    if jobs.find_jobs(folder, jobs.LEFT):
        console.print(f"[dim]{BUSY if works else GO_ON}[/]")

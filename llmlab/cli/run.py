"""`llmlab run PIPELINE.yaml`: shows what each stage will do, then does it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column

from llmlab.cli.launch import Accelerate, LaunchArgs, NumProcesses, read_launch
from llmlab.cli.options import TrustRemoteCode, print_warnings
from llmlab.settings.errors import UserError, did_you_mean
from llmlab.settings.presets import recipe_folder
from llmlab.terminal import Terminal, make_table, safe

if TYPE_CHECKING:
    from llmlab.pipeline import Step

CHANGES_SHOWN = 8  # lines a stage


def run(
    pipeline: Annotated[str, typer.Argument(help="A pipeline file, or the name of a shipped one: quickstart.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[STAGE.KEY=VALUE]...", help="Settings that override the file's.")
    ] = None,
    first: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Rerun this stage and every later one."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="STAGE", help="Run this stage alone; those it needs must be finished."),
    ] = None,
    hardware: Annotated[str | None, typer.Option(help="A machine's values for what the file leaves unset.")] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let stages run reward functions from Python files.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and exit.")] = False,
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
    _print_plan(console, f"{path.name} in {parsed.output_dir}", steps)
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


def _print_plan(console: Terminal, title: str, steps: "list[Step]") -> None:
    console.print(f"[bold]Pipeline[/] {safe(title)}", soft_wrap=True)
    changed = [Column("changed since", overflow="fold")] if any(step.changes for step in steps) else []
    columns = (Column("stage", no_wrap=True), Column("action", no_wrap=True), Column("why", overflow="fold"), *changed)
    table = make_table(*columns, header_style="dim")
    for step in steps:
        more = len(step.changes) - CHANGES_SHOWN
        changes = [*step.changes[:CHANGES_SHOWN], *([f"and {more} more"] if more > 0 else [])]
        cells = (step.stage.name, step.action, step.reason, *(["\n".join(changes)] if changed else []))
        table.add_row(*map(safe, cells), style={"skip": "dim", "run": "bold", "resume": "bold cyan"}[step.action])
    console.print(table)


def find_pipeline(name: str) -> Path:
    """Returns the file of a pipeline, or of the shipped recipe of this name."""
    path = Path(name)
    shipped = recipe_folder() / f"{name}.yaml"
    if path.suffix or path.exists():
        return path
    if not shipped.exists():
        known = sorted(recipe.stem for recipe in recipe_folder().glob("*.yaml"))
        raise UserError(f"{name}: there is no such pipeline file or shipped recipe{did_you_mean(name, known)}")
    return shipped

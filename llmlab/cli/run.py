"""`llmlab run PIPELINE.yaml`: shows what each stage will do, then does it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmlab.cli.options import TrustRemoteCode, print_warnings, recipe_folder
from llmlab.settings.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from llmlab.pipeline import Step

CHANGES_SHOWN = 8  # lines a stage


def run(
    pipeline: Annotated[str, typer.Argument(help="A pipeline file, or the name of a shipped one: quickstart.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[STAGE.KEY=VALUE]...", help="Settings that override the file's.")
    ] = None,
    first: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Run this stage from its beginning, and every one after it."),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="STAGE", help="Run this stage alone; those it needs must be finished."),
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let stages run reward functions from Python files.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and leave.")] = False,
) -> None:
    """Run a pipeline of stages from one YAML file: finished stages are skipped, interrupted ones resume.

    A stage whose settings, input files or library versions changed runs again, and with it every stage that needs it.
    """
    from rich.markup import escape

    from llmlab.pipeline import execute, plan, read_pipeline
    from llmlab.terminal import Terminal

    path = _find(pipeline)
    parsed = read_pipeline(path, overrides, allow_code=allow_code)
    for stage in parsed.stages:
        print_warnings(stage.resolved.warnings)
    steps = plan(parsed, first=first, only=only)
    console = Terminal()
    _print_plan(console, f"{path.name} in {parsed.output_dir}", steps)
    if dry_run:
        return
    for number, step in enumerate(execute(parsed, steps), start=1):
        if step.action != "skip":
            console.rule(f"{number}/{len(steps)}  {escape(step.stage.name)}", align="left")


def _print_plan(console: "Console", title: str, steps: "list[Step]") -> None:
    from rich.markup import escape
    from rich.table import Table

    console.print(f"[bold]Pipeline[/] {escape(title)}", soft_wrap=True)
    changed = any(step.changes for step in steps)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("stage", no_wrap=True)
    table.add_column("action", no_wrap=True)
    table.add_column("why", overflow="fold")
    if changed:
        table.add_column("changed since", overflow="fold")
    for step in steps:
        cells = [escape(step.stage.name), step.action, escape(step.reason)]
        if changed:
            more = len(step.changes) - CHANGES_SHOWN
            shown = [*step.changes[:CHANGES_SHOWN], *([f"and {more} more"] if more > 0 else [])]
            cells.append(escape("\n".join(shown)))
        table.add_row(*cells, style={"skip": "dim", "run": "bold", "resume": "bold cyan"}[step.action])
    console.print(table)


def _find(name: str) -> Path:
    path = Path(name)
    shipped = recipe_folder() / f"{name}.yaml"
    if path.exists() or not shipped.exists():
        if path.suffix or path.exists():
            return path
        known = sorted(recipe.stem for recipe in recipe_folder().glob("*.yaml"))
        raise UserError(f"{name}: there is no such pipeline file or shipped recipe{did_you_mean(name, known)}")
    return shipped

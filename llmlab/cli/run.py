"""`llmlab run PIPELINE.yaml`: shows what each stage will do, then does it."""

from pathlib import Path
from typing import Annotated

import typer

from llmlab.cli.options import print_warnings, recipe_folder
from llmlab.settings.errors import UserError, did_you_mean


def run(
    pipeline: Annotated[str, typer.Argument(help="A pipeline file, or the name of a shipped one: quickstart.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[STAGE.KEY=VALUE]...", help="Settings that override the file's.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and leave.")] = False,
) -> None:
    """Run a pipeline of stages from one YAML file: finished stages are skipped, interrupted ones resume."""
    from rich.console import Console
    from rich.table import Table

    from llmlab.pipeline import execute, plan, read_pipeline

    path = _find(pipeline)
    parsed = read_pipeline(path, overrides)
    for stage in parsed.stages:
        print_warnings(stage.resolved.warnings)
    steps = plan(parsed)
    console = Console()
    table = Table("stage", "", "why", "run folder", title=f"Pipeline {path.name}", title_justify="left", box=None)
    for step in steps:
        style = "dim" if step.action == "skip" else "bold"
        table.add_row(step.stage.name, step.action, step.reason, str(step.stage.folder), style=style)
    console.print(table)
    if dry_run:
        return
    for number, step in enumerate(execute(parsed, steps), start=1):
        if step.action != "skip":
            console.rule(f"{number}/{len(steps)}  {step.stage.name}", align="left")


def _find(name: str) -> Path:
    path = Path(name)
    shipped = recipe_folder() / f"{name}.yaml"
    if path.exists() or not shipped.exists():
        if path.suffix or path.exists():
            return path
        known = sorted(recipe.stem for recipe in recipe_folder().glob("*.yaml"))
        raise UserError(f"{name}: there is no such pipeline file or shipped recipe{did_you_mean(name, known)}")
    return shipped

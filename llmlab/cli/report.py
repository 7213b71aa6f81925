"""`llmlab report`: writes the page of a run or of a pipeline again, and opens it."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from llmlab.terminal import say


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or the folder of a pipeline.")],
    browse: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write report.html of a run or a pipeline again, from its records: curves, health events, settings, lineage."""
    from llmlab.pipeline.page import write_pipeline_page
    from llmlab.pipeline.running import STATE
    from llmlab.runs.history import open_run
    from llmlab.runs.page import write_run_page
    from llmlab.settings.paths import expand

    folder = expand(folder)
    is_pipeline = (folder / STATE).is_file()
    page = write_pipeline_page(folder) if is_pipeline else write_run_page(open_run(folder))
    say(str(page))
    if browse:
        webbrowser.open(page.resolve().as_uri())

"""`llmlab monitor`: the runs in a folder as one table, redrawn while they train. It reads their folders alone, so it
also watches runs of other processes, users and, over a shared disk, machines."""

import os
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Column
from typer import Argument, Option

from llmlab.cli.runs import show_result, show_status
from llmlab.runs.history import RunFolder, curve_metric, find_runs
from llmlab.runs.signals import handle_signals, interrupt
from llmlab.terminal import Terminal, draw_sparkline, duration, make_table, one_line, safe

ROOMY = 110  # columns of a terminal that has room for long names and symptoms
RUNS = Path("runs")


def monitor(
    folder: Annotated[Path, Argument(metavar="[DIR]", help="Where to search for runs, with all below.")] = RUNS,
    refresh: Annotated[float, Option(min=0.2, help="Seconds between two looks at the files.")] = 2.0,
    once: Annotated[bool, Option("--once", help="Print the view once and exit.")] = False,
) -> None:
    """Watch running and finished runs: progress, time left, key metric, health; Ctrl+C leaves.

    Without a terminal it prints the view once. A run that has been silent for long counts as died.
    """
    console, runs = Terminal(whole_rows=True), find_runs(folder)
    if once or not console.is_terminal:
        return console.print(draw(folder, runs, console.width))
    with (
        suppress(KeyboardInterrupt),
        handle_signals(interrupt),
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            live.update(draw(folder, runs, *console.size), refresh=True)
            time.sleep(refresh)
            runs = find_runs(folder, runs)


def draw(folder: Path, runs: list[RunFolder], width: int, height: int | None = None) -> RenderableType:
    """Returns a line for each run, running and then newest ones first, as far as the height of a terminal allows."""
    newest = runs[::-1]
    runs = sorted(newest, key=lambda run: run.record.get("status") != "running")
    counts = Counter(show_status(run) for run in runs)
    found = "  ".join(f"{n} {status}" for status, n in counts.items()) or "no runs yet"
    title = one_line(f"[bold]{safe(folder)}[/]", found)
    shown = runs if height is None else runs[: max(height - 2, 1)]  # below title and headings
    if not shown:
        return title
    roomy = width >= ROOMY
    longest = 40 if roomy else 15
    names = [os.path.relpath(run.folder, folder) for run in shown]
    names = [name if len(name) <= longest else f"…{name[1 - longest :]}" for name in names]
    headings = ("run", "stage", "status", "step", "left", "metric", "", "health" if roomy else "")
    table = make_table(*(Column(each, no_wrap=True, overflow="ellipsis") for each in headings), gap=1)
    table.columns[3].justify = table.columns[4].justify = "right"
    table.columns[0].min_width = max(map(len, names))
    for name, run in zip(names, shown, strict=True):
        steps, curve = run.record.get("steps"), run.curves.get(curve_metric(run) or "", [])
        table.add_row(
            *(safe(name), safe(run.stage or "-"), show_status(run)),
            "-" if run.step is None else f"{run.step:,}" + (f"/{steps:,}" if steps and run.step != steps else ""),
            "" if run.seconds_left is None else duration(run.seconds_left),
            show_result(run),
            draw_sparkline([value for _, value in curve], 12 if roomy else 8),
            _last_event(run, whole=roomy),
        )
    return Group(title, table)


def _last_event(run: RunFolder, *, whole: bool) -> str:
    """Returns a run's last health event as markup: its symptom and step, or a mark alone."""
    if not run.events:
        return ""
    event = run.events[-1]
    style, mark = ("red", "!!") if event.severity == "critical" else ("yellow", "!")
    return f"[{style}]{f'{safe(event.symptom)} at {event.step:,}' if whole else mark}[/]"

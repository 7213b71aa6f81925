"""`llmlab monitor`: the runs in a folder on one screen, redrawn while they train. It reads their folders alone, so it
also watches runs of other processes, users and, over a shared disk, machines."""

import os
import select
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from typer import Argument, Option

from llmlab import terminal
from llmlab.cli.runs import curves_of, show_result, show_status
from llmlab.runs.history import RunFolder, curve_metric, find_runs
from llmlab.runs.signals import handle_signals, interrupt
from llmlab.terminal import Terminal, duration, one_line, safe, short_number

try:
    import termios
    import tty
except ImportError:  # Windows: Ctrl+C quits, and the first run is shown in detail
    termios = None  # type: ignore[assignment]

ROOMY = 110  # columns of a terminal that has room for long names and symptoms; a chart has no more
HIGHEST = 16  # lines of a chart
AROUND = 9  # lines beside rows and chart: title, headings, blank, facts, values, legend, two of the axis, event
POLL = 0.25  # seconds between looks at keys and the size of the terminal
KEYS = {"\x1b[A": -1, "\x1bOA": -1, "k": -1, "\x1b[B": 1, "\x1bOB": 1, "j": 1}
VALUES = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad norm", "kl": "KL", "tokens_per_second": "tok/s"}
RUNS = Path("runs")


def monitor(
    folder: Annotated[Path, Argument(metavar="[DIR]", help="Where to search for runs, with all below.")] = RUNS,
    refresh: Annotated[float, Option(min=0.2, help="Seconds between two looks at the files.")] = 2.0,
    once: Annotated[bool, Option("--once", help="Print the view once and exit.")] = False,
) -> None:
    """Watch running and finished runs: progress, time left, key metric, health; up and down choose one, q quits.

    Without a terminal it prints the view once. A run that has been silent for long counts as died.
    """
    console, screen = Terminal(whole_rows=True), Screen(folder, find_runs(folder))
    if once or not console.is_terminal:
        return console.print(screen.draw(console.width, None))
    looked, size, key = 0.0, None, ""
    with (
        suppress(KeyboardInterrupt),
        handle_signals(interrupt),
        keyboard() as read_key,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while key not in ("q", "Q"):
            if due := time.monotonic() - looked >= refresh:
                screen.runs, looked = find_runs(folder, screen.runs), time.monotonic()
            if due or key or size != console.size:
                screen.choose(KEYS.get(key, 0))
                size = console.size
                live.update(screen.draw(*size), refresh=True)
            key = read_key(POLL)


@contextmanager
def keyboard() -> Iterator[Callable[[float], str]]:
    """Yields a function that waits for so many seconds at most and returns the key that was pressed, or nothing."""
    if termios is None or not sys.stdin.isatty():
        yield lambda seconds: time.sleep(seconds) or ""
        return
    before = termios.tcgetattr(sys.stdin)

    def read(seconds: float) -> str:
        ready = select.select([sys.stdin], [], [], seconds)[0]
        return (os.read(sys.stdin.fileno(), 16).decode(errors="replace") or "q") if ready else ""

    tty.setcbreak(sys.stdin)
    try:
        yield read
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


@dataclass
class Screen:
    """What is on the screen: the runs of a folder, those that run first, and one of them in detail."""

    folder: Path
    runs: list[RunFolder] = field(default_factory=list)
    chosen: Path | None = None  # the run shown in detail; None is the first one, whichever that is

    def sort(self) -> tuple[list[RunFolder], int]:
        """Returns the runs in the order of the screen, and the number of the chosen one."""
        newest = self.runs[::-1]
        runs = sorted(newest, key=lambda run: run.record.get("status") != "running")
        return runs, next((number for number, run in enumerate(runs) if run.folder == self.chosen), 0)

    def choose(self, by: int) -> None:
        """Chooses the run so many rows further down."""
        runs, number = self.sort()
        if by and runs:
            self.chosen = runs[min(max(number + by, 0), len(runs) - 1)].folder

    def draw(self, width: int, height: int | None) -> RenderableType:
        """Returns the view for a terminal of this size, or with every run where there is no height."""
        runs, number = self.sort()
        counts = Counter(show_status(run) for run in runs)
        found = "  ".join(f"{n} {status}" for status, n in counts.items()) or "no runs yet"
        title = one_line(f"[bold]{safe(self.folder)}[/]", found, "[dim]↑ ↓ choose, q quits[/]" if height else "")
        if not runs:
            return title
        rows = len(runs) if height is None else min(len(runs), max((height - AROUND) // 2, 1))
        first = min(max(number - rows // 2, 0), len(runs) - rows)
        table = draw_table(self.folder, runs[first : first + rows], runs[number], width)
        room = HIGHEST if height is None else min(height - AROUND - rows, HIGHEST)
        return Group(title, table, "", *draw_details(runs[number], min(width, ROOMY), room))


def draw_table(folder: Path, runs: list[RunFolder], chosen: RunFolder, width: int) -> Table:
    """Returns a row for each of these runs."""
    roomy = width >= ROOMY
    longest = 40 if roomy else 15
    names = [os.path.relpath(run.folder, folder) for run in runs]
    names = [name if len(name) <= longest else f"…{name[1 - longest :]}" for name in names]
    headings = ("run", "stage", "status", "step", "left", "metric", "", "health" if roomy else "")
    table = terminal.make_table(*(Column(each, no_wrap=True, overflow="ellipsis") for each in headings), gap=1)
    table.columns[3].justify = table.columns[4].justify = "right"
    table.columns[0].min_width = max(map(len, names))
    for name, run in zip(names, runs, strict=True):
        steps, curve = run.record.get("steps"), run.curves.get(curve_metric([run]) or "", [])
        table.add_row(
            *(safe(name), safe(run.stage or "-"), show_status(run)),
            "-" if run.step is None else f"{run.step:,}" + (f"/{steps:,}" if steps and run.step != steps else ""),
            "" if run.seconds_left is None else duration(run.seconds_left),
            show_result(run),
            terminal.draw_sparkline([value for _, value in curve], 12 if roomy else 8),
            _last_event(run, whole=roomy),
            style="reverse" if run is chosen else "",
        )
    return table


def draw_details(run: RunFolder, width: int, height: int) -> list[RenderableType]:
    """Returns the lines about one run, with a chart of so many lines."""
    last = {name: curve[-1][1] for name, curve in run.curves.items()}
    done, steps = run.step, run.record.get("steps")
    full = min(max(12 * (done or 0) // (steps or 1), 0), 12)
    drawn: list[RenderableType] = [
        one_line(
            *(f"[bold]{safe(run.folder)}[/]", safe(run.stage), show_status(run)),
            f"{'█' * full}{'░' * (12 - full)} {done / steps:.0%}" if done is not None and steps else "",
            f"left {duration(run.seconds_left)}" if run.seconds_left is not None else "",
            terminal.human(run.tokens, "tokens") if run.tokens else "",
            f"after {duration(run.seconds)}" if run.seconds is not None else "",
        ),
        one_line(
            f"[red]{safe(run.problem)}[/]" if run.problem else "",
            f"[red]silent for {duration(run.silence)}[/]" if run.status == "died" else "",
            *(f"[dim]{word}[/] {short_number(last[name])}" for name, word in VALUES.items() if name in last),
        ),
    ]
    name = (curve_metric([run]) or "").removeprefix("eval_")
    curves, legend = curves_of(run, name)
    if curves and height >= 3:
        drawn.append(one_line(*legend))
        drawn += terminal.draw_curves(curves, width=width, height=height)
    return [*drawn, one_line(_last_event(run, whole=True), safe(run.events[-1].message) if run.events else "")]


def _last_event(run: RunFolder, *, whole: bool) -> str:
    """Returns a run's last health event as markup: its symptom and step, or a mark alone."""
    if not run.events:
        return ""
    event = run.events[-1]
    style, mark = ("red", "!!") if event.severity == "critical" else ("yellow", "!")
    return f"[{style}]{f'{safe(event.symptom)} at {event.step:,}' if whole else mark}[/]"

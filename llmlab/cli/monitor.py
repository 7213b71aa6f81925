"""`llmlab monitor`: the runs in a folder on one screen, redrawn while they train; what it shows is in their folders.

It reads files alone, so it also watches runs of other processes, users and, over a shared disk, machines.
"""

import os
import select
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from llmlab.cli.runs import CURVE_STYLES, STATUS_STYLES
from llmlab.health.symptoms import Event
from llmlab.runs.history import RunFolder, curve_metric, find_runs
from llmlab.runs.signals import Interrupted, handle_signals, interrupt
from llmlab.terminal import (
    Curve,
    Terminal,
    draw_bar,
    draw_curves,
    draw_sparkline,
    duration,
    human,
    make_table,
    numeric,
    safe,
    short_number,
)

try:
    import termios
    import tty
except ImportError:  # Windows: Ctrl+C quits, and the newest run is shown in detail
    termios = None  # type: ignore[assignment]

ROOMY = 110  # columns of a terminal that has room for bars and symptoms
WIDEST, HIGHEST = 110, 16  # of a chart, in characters
AROUND_CHART = 9  # lines of a screen beside rows and chart: title, headings, blank, facts, values, legend, axis, event
POLL = 0.25  # seconds between looks at keys and the size of the terminal
KEYS = {"\x1b[A": -1, "\x1bOA": -1, "k": -1, "\x1b[B": 1, "\x1bOB": 1, "j": 1}
SHOWN = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad norm", "kl": "KL", "entropy": "entropy"}
SEVERITIES = {"warning": "yellow", "critical": "red"}


def monitor(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to search for runs, with all below.")] = Path(
        "runs"
    ),
    refresh: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks at the files.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print the view once and exit.")] = False,
) -> None:
    """Watch running and finished runs: progress, time left, key metric, health; up and down choose one, q quits.

    Without a terminal it prints the view once. A run that has been silent for long counts as died.
    """
    console = Terminal(whole_rows=True)
    screen = Screen(folder)
    screen.refresh()
    if once or not console.is_terminal:
        return console.print(screen.draw(console.width, None))
    try:
        with (
            handle_signals(interrupt),
            keyboard() as read_key,
            Live(console=console, screen=True, auto_refresh=False) as live,
        ):
            looked, size = time.monotonic(), None
            while True:
                if time.monotonic() - looked >= refresh:
                    screen.refresh()
                    looked, size = time.monotonic(), None
                if size != console.size:
                    size = console.size
                    live.update(screen.draw(size.width, size.height), refresh=True)
                key = read_key(POLL)
                if key in ("q", "Q"):
                    return
                if key in KEYS:
                    screen.choose(KEYS[key])
                    size = None
    except KeyboardInterrupt:
        return
    except Interrupted as stopped:
        raise SystemExit(stopped.code) from None


@contextmanager
def keyboard() -> Iterator[Callable[[float], str]]:
    """Yields a function that waits for so many seconds at most and returns the key that was pressed, or nothing."""
    if termios is None or not sys.stdin.isatty():
        yield lambda seconds: time.sleep(seconds) or ""
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def read(seconds: float) -> str:
        if not select.select([terminal], [], [], seconds)[0]:
            return ""
        return os.read(terminal, 16).decode(errors="replace") or "q"  # nothing to read: the terminal is gone

    tty.setcbreak(terminal)
    try:
        yield read
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


@dataclass
class Screen:
    """What is on the screen: the runs of a folder, those that run first, and one of them in detail."""

    folder: Path
    runs: list[RunFolder] = field(default_factory=list)
    chosen: Path | None = None
    """The run shown in detail; None is the first one, whichever that is."""

    def refresh(self) -> None:
        """Looks for runs again; only files that changed are read."""
        newest = find_runs(self.folder, self.runs)[::-1]
        self.runs = sorted(newest, key=lambda run: run.record.get("status") != "running")

    @property
    def number(self) -> int:
        folders = [run.folder for run in self.runs]
        return folders.index(self.chosen) if self.chosen in folders else 0

    def choose(self, by: int) -> None:
        """Chooses the run so many rows further down."""
        if self.runs:
            self.chosen = self.runs[min(max(self.number + by, 0), len(self.runs) - 1)].folder

    def draw(self, width: int, height: int | None) -> RenderableType:
        """Returns the view for a terminal of this size, or with every run where there is no height."""
        counts = Counter(run.status for run in self.runs)
        found = "  ".join(f"[{STATUS_STYLES[status]}]{n} {status}[/]" for status, n in counts.items())
        keys = "" if height is None else "   [dim]↑ ↓ choose, q quits[/]"
        title = Text.from_markup(f"[bold]{safe(self.folder)}[/]  {found or 'no runs yet'}{keys}")
        title.no_wrap, title.overflow = True, "ellipsis"
        if not self.runs:
            return title
        rows = len(self.runs)
        if height is not None:
            rows = min(rows, max((height - AROUND_CHART) // 2, 1))
        first = min(max(self.number - rows // 2, 0), len(self.runs) - rows)
        table = draw_table(self.folder, self.runs[first : first + rows], self.runs[self.number], width)
        room = HIGHEST if height is None else min(height - AROUND_CHART - rows, HIGHEST)
        return Group(title, table, "", *draw_details(self.runs[self.number], min(width, WIDEST), room))


def draw_table(folder: Path, runs: list[RunFolder], chosen: RunFolder, width: int) -> Table:
    """Returns a row for each of these runs."""
    roomy = width >= ROOMY
    longest = 40 if roomy else 15
    names = [os.path.relpath(run.folder, folder) for run in runs]
    names = [name if len(name) <= longest else f"…{name[1 - longest :]}" for name in names]
    line = {"no_wrap": True, "overflow": "ellipsis"}
    table = make_table(
        Column("run", min_width=max(map(len, names)), **line),
        *(Column(name, **line) for name in ("stage", "status")),
        *(numeric("step"), *([Column("", **line)] if roomy else []), numeric("left")),
        *(Column(name, **line) for name in ("metric", "", "health" if roomy else "")),
        gap=1,
    )
    for name, run in zip(names, runs, strict=True):
        done, steps, left = run.step, run.steps, run.seconds_left
        step = "-" if done is None else f"{done:,}/{steps:,}" if steps and done != steps else f"{done:,}"
        cells = [
            safe(name),
            safe(run.stage or "-"),
            show_status(run),
            step,
            *([draw_bar((done or 0) / steps, 10) if steps else ""] if roomy else []),
            "" if left is None else duration(left),
            f"[dim]{safe(run.key_metric[0])}[/] {short_number(run.key_metric[1])}" if run.key_metric else "",
            draw_sparkline([value for _, value in key_curve(run)], 12 if roomy else 8),
            show_event(run.events[-1], whole=roomy) if run.events else "",
        ]
        table.add_row(*cells, style="reverse" if run is chosen else "")
    return table


def draw_details(run: RunFolder, width: int, height: int) -> list[RenderableType]:
    """Returns the lines about one run, with a chart of so many lines."""
    last = {name: curve[-1][1] for name, curve in run.curves.items()}
    facts = [f"[bold]{safe(run.folder)}[/]", safe(run.stage), show_status(run)]
    if run.steps and run.step is not None:
        facts.append(f"{draw_bar(run.step / run.steps, 12)} {run.step / run.steps:.0%}")
    facts += [f"{human(run.tokens, 'tokens')}"] if run.tokens else []
    facts += [f"took {duration(run.seconds)}"] if run.seconds is not None and run.status != "running" else []
    facts += [f"left {duration(run.seconds_left)}"] if run.seconds_left is not None else []
    values = [f"[dim]{word}[/] {short_number(last[name])}" for name, word in SHOWN.items() if name in last]
    values += [f"{human(last['tokens_per_second'], 'tok/s')}"] if "tokens_per_second" in last else []
    if run.status == "died":
        values.insert(0, f"[red]silent for {duration(run.silence)}[/]")
    lines = [Text.from_markup("  ".join(part)) for part in (facts, values)]
    if run.problem:
        lines.append(Text(run.problem, style="red"))
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    drawn: list[RenderableType] = list(lines)
    name = curve_metric([run])
    name = name.removeprefix("eval_") if name and name.removeprefix("eval_") in run.curves else name
    if name and height >= 3:
        curves = [Curve(run.curves[name], CURVE_STYLES[0])]
        evaluated = run.curves.get(f"eval_{name}")
        curves += [Curve(evaluated, CURVE_STYLES[2], marks=True)] if evaluated else []
        marks = f"   [{CURVE_STYLES[2]}]●[/] eval_{safe(name)}" if evaluated else ""
        drawn += [f"[{CURVE_STYLES[0]}]⠒⠒[/] {safe(name)}{marks}"]
        drawn += draw_curves(curves, width=width, height=height)
    return drawn + [show_event(event, whole=True) + f" [dim]{safe(event.message)}[/]" for event in run.events[-1:]]


def key_curve(run: RunFolder) -> list[tuple[int, float]]:
    """Returns the curve of a run's key metric, or where that was seldom measured, of its training counterpart."""
    name = run.key_metric[0] if run.key_metric else ""
    curve = run.curves.get(name, [])
    return curve if len(curve) > 2 else run.curves.get(name.removeprefix("eval_"), curve)


def show_status(run: RunFolder) -> str:
    return f"[{STATUS_STYLES[run.status]}]{run.status}[/]"


def show_event(event: Event, *, whole: bool) -> str:
    """Returns a health event as markup: its symptom and step, or a mark alone."""
    words = f"{safe(event.symptom)} at {event.step:,}" if whole else "!" if event.severity == "warning" else "!!"
    return f"[{SEVERITIES[event.severity]}]{words}[/]"

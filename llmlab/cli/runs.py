"""`llmlab runs list`, `show` and `compare`: tables and lineage of runs; `llmlab report`: their pages, with curves;
`llmlab monitor`: one table, redrawn while they train; `llmlab advise`: what they show, with the evidence, and the
settings to change. All read run folders alone, so that they also show runs of other processes, users and, over a
shared disk, machines."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Annotated, Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Column
from rich.tree import Tree
from typer import Argument, Option, Typer

from llmlab.cli.arguments import AsJson, Overwrite
from llmlab.health import advice
from llmlab.health.checks import outside_bands
from llmlab.health.symptoms import load_table
from llmlab.runs import history
from llmlab.runs.history import RunFolder
from llmlab.runs.signals import handle_signals, interrupt
from llmlab.settings.base import show as as_yaml
from llmlab.settings.errors import UserError
from llmlab.settings.files import Layer, dump, finite
from llmlab.settings.paths import expand
from llmlab.settings.sources import resolve
from llmlab.stages import STAGES
from llmlab.terminal import (
    Terminal,
    draw_sparkline,
    duration,
    make_table,
    numeric,
    one_line,
    safe,
    say,
    say_json,
    short_number,
)

app = Typer(no_args_is_help=True)

STATUS_STYLES = {
    **{"finished": "green", "running": "cyan", "interrupted": "yellow"},
    **dict.fromkeys(("diverged", "failed", "died", "damaged"), "red"),
}
EVENT_STYLES = {"warning": "yellow", "critical": "red"}
ROOMY = 100  # columns of a terminal that has room for times,
MONITOR_ROOMY = 110  # and for long names and symptoms
CURVE = 24  # characters of a curve
RUNS = Path("runs")
LOOKED_AT = ("loss", "eval_loss", "grad_norm", "reward", "kl", "entropy", "zero_variance_share", "eval_win_rate")
NAMES = Column(style="dim", overflow="fold")


@app.command("list")
def list_runs(
    folder: Annotated[Path, Argument(help="Where to search, with all below.")] = Path(),
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder and below: their status, result and parents."""
    runs = history.find_runs(folder)
    if as_json:
        return say_json(finite([history.summary(run) for run in runs]), indent=2)
    console = Terminal(whole_rows=True)
    if not runs:
        return console.print(f"no runs in {safe(folder)} or below", soft_wrap=True)
    groups: dict[Path, list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(run.folder.resolve().parent, []).append(run)
    for place, group in groups.items():
        columns = ["run", "stage", "status", numeric("steps"), "result", "from"]
        columns += ["started", numeric("took")] if console.width >= ROOMY else []
        console.print(f"[blue]{safe(_path(place))}/[/]", soft_wrap=True)
        rows = ([one_line(cell) for cell in _list_row(run)[: len(columns)]] for run in group)
        console.table(columns, rows, gap=1)
    for run in runs:
        if run.problem:
            console.print(f"[red]damaged[/] {safe(run.problem)}", soft_wrap=True)


@app.command()
def show(run: Annotated[Path, Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Show one run: its lineage, its settings and their sources, its metrics and health."""
    chosen, console = history.open_run(run), Terminal()
    facts = [f"[bold]{safe(chosen.stage)}[/]", show_status(chosen)]
    facts += [f"{number:,} {unit}" for number, unit in ((chosen.step, "steps"), (chosen.tokens, "tokens")) if number]
    facts += [duration(chosen.seconds)] if chosen.seconds is not None else []
    console.print(f"[bold]{safe(_path(chosen.folder))}[/]", soft_wrap=True)
    console.print("  ".join(facts))
    if chosen.started:
        console.print(f"[dim]started {chosen.started.astimezone():%Y-%m-%d %H:%M}[/]")
    if chosen.status == "died":
        console.print(f"[red]It is recorded as running, and has been silent for {duration(chosen.silence)}.[/]")
    for resumed in chosen.record.get("resumed", []):
        console.print(f"[dim]resumed at step {resumed['step']:,}, {safe(resumed['at'])}[/]")
    console.section("Lineage")
    console.print(_tree(history.ancestors(chosen)))
    if settings := [row for row in history.changed_settings(chosen) if row[0] != "output_dir"]:
        console.section("Settings that are not defaults")
        value, source = Column("value", ratio=1, overflow="fold"), Column("source", style="dim", overflow="fold")
        cells = ((safe(key), safe(history.brief(value)), safe(source)) for key, value, source in settings)
        console.table(("setting", value, source), cells, gap=1)
    _print_metrics(console, [chosen], ["last"])
    _print_health(console, chosen)


@app.command()
def compare(
    runs: Annotated[list[Path], Argument(metavar="RUN RUN...", help="Run folders, two or more.")],
    html: Annotated[Path | None, Option(metavar="PAGE", help="Write a page with all curves instead.")] = None,
) -> None:
    """Compare runs: the settings that differ, and the metrics side by side."""
    if len({folder.resolve() for folder in runs}) < len(runs):
        raise UserError("a run is given twice; expected different ones")
    if len(runs) < 2:
        raise UserError("expected two runs or more (llmlab runs show RUN shows one)")
    chosen = [history.open_run(folder) for folder in runs]
    if html is not None:
        from llmlab.runs.page import write_comparison_page

        return say(str(write_comparison_page(chosen, expand(html))))
    console, names = Terminal(), [safe(name) for name in history.short_names(chosen)]
    console.section("Settings that differ")
    rows = [
        (title + safe(key), *("-" if value is ... else safe(history.brief(value)) for value in values))
        for part, title in (("settings", ""), ("versions", "version of "), ("hardware", "hardware "))
        for key, values in history.differing(chosen, part).items()
    ]
    if rows:
        console.table([NAMES.copy(), *(Column(name, ratio=1, overflow="fold") for name in names)], rows, gap=1)
    else:
        console.print("[dim]none[/]")
    _print_metrics(console, chosen, names)


def report(
    folder: Annotated[Path, Argument(metavar="RUN", help="A run folder, or the folder of a pipeline.")],
) -> None:
    """Write report.html of a run or a pipeline again, from its records: curves, health events, settings, lineage."""
    from llmlab.pipeline.running import STATE, write_pipeline_page
    from llmlab.runs.page import write_run_page

    folder = expand(folder)
    is_pipeline = (folder / STATE).is_file()
    say(str(write_pipeline_page(folder) if is_pipeline else write_run_page(history.open_run(folder))))


def monitor(
    folder: Annotated[Path, Argument(metavar="[DIR]", help="Where to search for runs, with all below.")] = RUNS,
    refresh: Annotated[float, Option(min=0.2, help="Seconds between two looks at the files.")] = 2.0,
    once: Annotated[bool, Option("--once", help="Print the view once and exit.")] = False,
) -> None:
    """Watch running and finished runs: progress, time left, key metric, health; Ctrl+C leaves.

    Without a terminal it prints the view once. A run that has been silent for long counts as died.
    """
    console, runs = Terminal(whole_rows=True), history.find_runs(folder)
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
            runs = history.find_runs(folder, runs)


def _cut(path: str, longest: int) -> str:
    """Returns a path of so many characters at most, without its beginning where it is longer."""
    return path if len(path) <= longest else f"…{path[1 - longest :]}"


def draw(folder: Path, runs: list[RunFolder], width: int, height: int | None = None) -> RenderableType:
    """Returns a line for each run, running and then newest ones first, as far as the height of a terminal allows."""
    newest = runs[::-1]
    runs = sorted(newest, key=lambda run: run.record.get("status") != "running")
    counts = Counter(show_status(run) for run in runs)
    found = "  ".join(f"{n} {status}" for status, n in counts.items()) or "no runs yet"
    room = max(width - one_line(found).cell_len - 2, 15)
    title = one_line(f"[bold]{safe(_cut(str(folder), room))}[/]", found)
    shown = runs if height is None else runs[: max(height - 2, 1)]  # below title and headings
    if not shown:
        return title
    roomy = width >= MONITOR_ROOMY
    longest = 40 if roomy else 15
    names = [_cut(os.path.relpath(run.folder, folder), longest) for run in shown]
    headings = ("run", "stage", "status", "step", "left", "metric", "", "health" if roomy else "")
    table = make_table(*(Column(each, no_wrap=True, overflow="ellipsis") for each in headings), gap=1)
    table.columns[3].justify = table.columns[4].justify = "right"
    table.columns[0].min_width = max(map(len, names))
    for name, run in zip(names, shown, strict=True):
        steps, curve = run.record.get("steps"), run.curves.get(history.curve_metric(run) or "", [])
        health = ""
        if run.events:
            event = run.events[-1]
            style, mark = ("red", "!!") if event.severity == "critical" else ("yellow", "!")
            health = f"[{style}]{f'{safe(event.symptom)} at {event.step:,}' if roomy else mark}[/]"
        table.add_row(
            *(safe(name), safe(run.stage or "-"), show_status(run)),
            "-" if run.step is None else f"{run.step:,}" + (f"/{steps:,}" if steps and run.step != steps else ""),
            "" if run.seconds_left is None else duration(run.seconds_left),
            show_result(run),
            draw_sparkline([value for _, value in curve], 12 if roomy else 8),
            health,
        )
    return Group(title, table)


def advise(
    runs: Annotated[list[Path], Argument(metavar="RUN...", help="Run folders.")],
    apply: Annotated[Path | None, Option(help="Write the changed settings into this YAML or JSON file.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Name what a run's metrics, events and settings show, with numbers and steps, and what to change.

    Conditions and actions are those of the RL guide, section 6: underfitting, overfitting, instability, drift,
    reward hacking and more. --apply writes a settings file for the same stage.
    """
    if apply is not None and len(runs) > 1:
        raise UserError("--apply: expected one run, whose settings are changed")
    if apply is not None and apply.exists() and not overwrite:
        raise UserError(f"--apply {apply}: it exists; choose another name, or --overwrite")
    reports = [_advise(history.open_run(folder)) for folder in runs]
    files = [report.pop("file") for report in reports]
    if apply is not None:
        if not reports[0]["changes"]:
            raise UserError(f"--apply {apply}: nothing in {runs[0]} calls for other settings; nothing was written")
        dump(files[0], apply)
    if as_json:
        return say_json(finite(reports), indent=2)
    console = Terminal()
    for report in reports:
        console.print(f"[bold]{safe(report['run'])}[/]  {report['stage']}, {report['status']}", soft_wrap=True)
        for finding in report["findings"]:
            console.print(f"[yellow]{finding['title']}[/]")
            for sentence in finding["evidence"]:
                console.print(f"  {safe(sentence)}", soft_wrap=True)
        if report["healthy"]:
            few = ", but it has too few values for trends" * (report["looked_at"].get("loss", 0) < advice.FEWEST)
            console.print(f"[green]healthy[/]: no condition of the guides shows{few}")
        looked = ", ".join(f"{name} ({count})" for name, count in report["looked_at"].items())
        console.print(f"[dim]looked at (values): {looked}[/]", soft_wrap=True)
        changes = {key: map(safe, map(as_yaml, values)) for key, values in report["changes"].items()}
        if changes:
            rows = ((safe(key), now, "->", f"[bold]{after}[/]") for key, (now, after) in changes.items())
            console.table(("setting", "now", "", "next"), rows)
        for sentence in dict.fromkeys(line for finding in report["findings"] for line in finding["advice"]):
            console.print(sentence, soft_wrap=True)
    if apply is not None:
        command = f"llmlab {reports[0]['stage']} --config {apply}"
        console.print(f"[green]wrote[/] {safe(apply)}: {safe(command)}", soft_wrap=True)


def _list_row(run: RunFolder) -> list[str]:
    """Returns a run's cells in markup."""
    parents = []
    for parent in run.parents:
        found = history.find_parent(run, parent)
        folder = found.folder.resolve() if found else None
        beside = folder is not None and folder.parent == run.folder.resolve().parent
        parents.append(parent if folder is None else folder.name if beside else "/".join(folder.parts[-2:]))
    return [
        safe(run.folder.resolve().name),
        safe(run.stage or "-"),
        show_status(run),
        short_number(run.step),
        show_result(run) or "-",
        safe("+".join(parents) or "-"),
        run.started.astimezone().strftime("%m-%d %H:%M") if run.started else "-",
        duration(run.seconds),
    ]


def show_result(run: RunFolder) -> str:
    return f"[dim]{safe(run.key_metric[0])}[/] {short_number(run.key_metric[1])}" if run.key_metric else ""


def show_status(run: RunFolder) -> str:
    return f"[{STATUS_STYLES.get(run.status, 'none')}]{safe(run.status)}[/]"


def _tree(ancestor: history.Ancestor, tree: Tree | None = None) -> Tree:
    run = ancestor.run
    if run is None:
        label = f"{safe(ancestor.name)}  [dim]not a run folder here[/]"
    else:
        label = "  ".join(filter(None, (safe(_path(run.folder)), f"[dim]{safe(run.stage)}[/]", show_result(run))))
    branch = Tree(label, guide_style="dim") if tree is None else tree.add(label)
    for parent in ancestor.parents:
        _tree(parent, branch)
    return branch


def _print_metrics(console: Terminal, runs: Sequence[RunFolder], headings: Sequence[str]) -> None:
    """Prints the last value of each metric, the best one where that is another, and of a single run the curve."""
    metrics = dict.fromkeys(name for run in runs for name in run.metrics)
    metrics = [name for name in metrics if history.is_shown(name)]
    if not metrics:
        return
    console.section("Metrics")
    table = make_table(NAMES.copy(), *map(numeric, headings), *([""] if len(runs) == 1 else []), gap=1)
    for name in metrics:
        last = [run.metrics.get(name) for run in runs]
        bests = [run.best(name) for run in runs]
        best = history.best_of(name, last)
        cells = [f"[bold]{short_number(v)}[/]" if v is not None and v == best else short_number(v) for v in last]
        curve = [value for _, value in runs[0].curves.get(name, ())]
        table.add_row(safe(name), *cells, *([draw_sparkline(curve, CURVE)] if len(runs) == 1 else []))
        if any(best and best[1] != value for best, value in zip(bests, last, strict=True)):
            cells = [f"{short_number(best[1])} [dim]at {best[0]:,}[/]" if best else "" for best in bests]
            table.add_row("  best", *cells)
    if len(runs) > 1:
        table.add_row("steps", *(short_number(run.step) for run in runs))
        table.add_row("tokens", *(short_number(run.tokens) for run in runs))
        table.add_row("time", *(duration(run.seconds) for run in runs))
        table.add_row("status", *map(show_status, runs))
    console.print(table)


def _print_health(console: Terminal, run: RunFolder) -> None:
    """Prints the health events, and the metrics that end outside the guide's healthy bands."""
    events, outside = run.events, outside_bands(run.curves, run.stage)
    if not events and not outside:
        return
    console.section("Health")
    for event in events:
        done = f"; {event.action}" if event.action else ""
        severity = f"[{EVENT_STYLES[event.severity]}]{event.severity}[/]"
        console.print(f"{severity} {safe(event.message + done)}", soft_wrap=True)
    for name, (value, lowest, highest) in outside.items():
        above = f"above {lowest:g}" if highest == inf else f"{lowest:g} to {highest:g}"
        band = f"below {highest:g}" if lowest <= 0 else above
        console.print(f"[dim]{name} ends at {value:.3g}; the guide's healthy band is {band}[/]")


def _path(folder: Path) -> str:
    """Returns a folder as seen from the working directory, where it lies in that."""
    whole = folder.resolve()
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(folder)


def _advise(run: RunFolder) -> dict[str, Any]:
    """Returns what is known of a run, as plain values; `file` are its settings with the changes."""
    if run.stage not in STAGES or not STAGES[run.stage].resumes:
        trained = ", ".join(name for name, stage in STAGES.items() if stage.resumes)
        raise UserError(f"{run.folder}: nothing is trained in stage '{run.stage}'; expected a run of {trained}")
    kind, record = STAGES[run.stage].settings_class, run.record
    own = advice.own_settings(kind, record.get("settings", {}), record.get("sources", {}))
    settings = resolve(kind, Layer(str(run.folder), own)).settings
    reason = str(record.get("reason", ""))
    past = advice.History(run.stage, settings, run.curves, run.events, run.status, reason, run.metrics)
    found = advice.diagnose(past)
    changes, conditions = advice.propose(kind, own, list(found)), load_table()[1]
    looked_at = [name for name in LOOKED_AT if name in run.curves]
    names = (f"{settings.output_dir}-{number}" for number in range(2, 10**6))
    new = {key: after for key, (_, after) in changes.items()}
    new["output_dir"] = next(name for name in names if not Path(name).exists())
    return {
        "run": str(run.folder),
        "stage": run.stage,
        "status": run.status,
        "step": run.step,
        "healthy": not found,
        "looked_at": {**{name: len(run.curves[name]) for name in looked_at}, "events": len(run.events)},
        "findings": [
            {"condition": name, "title": (of := conditions[name]).title, "evidence": lines, "advice": list(of.advice)}
            for name, lines in found.items()
        ],
        "changes": {key: list(values) for key, values in changes.items()},
        "file": {"stage": run.stage, **advice.changed(own, new)},
    }

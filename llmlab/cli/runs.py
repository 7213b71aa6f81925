"""`llmlab runs list`, `show` and `compare`: tables, lineage and curves of runs; `llmlab report`: their pages."""

import webbrowser
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Annotated, Any

from rich.segment import Segments
from rich.table import Column
from rich.text import Text
from rich.tree import Tree
from typer import Argument, Option, Typer

from llmlab.cli.arguments import AsJson
from llmlab.health.checks import outside_bands
from llmlab.runs import history
from llmlab.runs.history import RunFolder
from llmlab.runs.record import read_hardest_rows
from llmlab.settings.base import show as written
from llmlab.settings.errors import UserError
from llmlab.settings.files import finite, is_number
from llmlab.settings.paths import expand
from llmlab.terminal import Curve, Terminal, duration, make_table, numeric, one_line, safe, say, say_json, short_number

app = Typer(no_args_is_help=True)

STATUS_STYLES = {
    **{"finished": "green", "running": "cyan", "interrupted": "yellow"},
    **dict.fromkeys(("diverged", "failed", "died", "damaged"), "red"),
}
EVENT_STYLES = {"warning": "yellow", "critical": "red"}
CURVE_STYLES = ("cyan", "magenta", "yellow", "green", "blue", "red")
LEFT_OUT = ("started", "took")  # first on a narrow terminal
SHRINKING = {"run": 12, "from": 12}  # then, down to so many characters
NAMES = Column(style="dim", overflow="fold")

Metric = Annotated[str | None, Option(help="Draw this metric; none is the loss, or the stage's own.")]


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
    _print_list(console, runs)
    for run in runs:
        if run.problem:
            console.print(f"[red]damaged[/] {safe(run.problem)}", soft_wrap=True)


@app.command()
def show(
    run: Annotated[Path, Argument(metavar="RUN", help="A run folder.")],
    metric: Metric = None,
    rows: Annotated[bool, Option("--rows", help="Show the validation rows with the highest loss.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show one run: its lineage, its settings and their sources, its data, metrics and curve."""
    chosen = history.open_run(run)
    if rows:
        return _show_rows(chosen, as_json)
    curve_name = history.curve_metric([chosen], metric) or ""
    if metric is None and curve_name.removeprefix("eval_") in chosen.curves:
        curve_name = curve_name.removeprefix("eval_")  # the evaluations are marked on it
    if as_json:
        return say_json(finite(history.details(chosen)), indent=2)
    console = Terminal()
    _print_heading(console, chosen)
    console.section("Lineage")
    console.print(_tree(history.ancestors(chosen)))
    if settings := [row for row in history.changed_settings(chosen) if row[0] != "output_dir"]:
        console.section("Settings that are not defaults")
        value, source = Column("value", ratio=1, overflow="fold"), Column("source", style="dim", overflow="fold")
        cells = ((safe(key), safe(history.brief(value)), safe(source)) for key, value, source in settings)
        console.table(("setting", value, source), cells, gap=1)
    _print_data(console, chosen)
    _print_metrics(console, [chosen], ["last"])
    _print_health(console, chosen)
    if curve_name:
        console.section(curve_name)
        curves, legend = curves_of(chosen, curve_name)
        console.chart(curves)
        if curves[1:]:
            console.print("   ".join(legend))
    _print_surroundings(console, chosen)


@app.command()
def compare(
    runs: Annotated[list[Path], Argument(metavar="RUN RUN...", help="Run folders, two or more.")],
    metric: Metric = None,
    as_json: AsJson = False,
    html: Annotated[Path | None, Option(metavar="PAGE", help="Write a page with all curves instead.")] = None,
) -> None:
    """Compare runs: the settings that differ, the metrics side by side, the curves on one scale."""
    if len({folder.resolve() for folder in runs}) < len(runs):
        raise UserError("a run is given twice; expected different ones")
    if len(runs) < 2:
        raise UserError("expected two runs or more (llmlab runs show RUN shows one)")
    chosen = [history.open_run(folder) for folder in runs]
    if html is not None:
        if metric is not None or as_json:
            raise UserError("--html: the page has all curves; leave --metric and --json out")
        from llmlab.runs.page import write_comparison_page

        return say(str(write_comparison_page(chosen, expand(html))))
    curve_name = history.curve_metric(chosen, metric)
    if as_json:
        return say_json(finite(history.comparison(chosen)), indent=2)
    console = Terminal()
    styles = [CURVE_STYLES[number % len(CURVE_STYLES)] for number in range(len(chosen))]
    names = [f"[{style}]{safe(name)}[/]" for name, style in zip(history.short_names(chosen), styles, strict=True)]
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
    if curve_name is None:
        return
    console.section(curve_name)
    curves = [Curve(run.curves.get(curve_name, []), style) for run, style in zip(chosen, styles, strict=True)]
    logged = [name if curve.points else f"{name} (none logged)" for name, curve in zip(names, curves, strict=True)]
    if not console.plain:
        console.chart(curves)
        return console.print("   ".join(f"[{style}]⠒⠒[/] {name}" for style, name in zip(styles, logged, strict=True)))
    for name, curve in zip(logged, curves, strict=True):  # lines of one color would be one line
        console.print(name)
        if curve.points:
            console.chart([curve], scale=[point for each in curves for point in each.points])


def report(
    folder: Annotated[Path, Argument(metavar="RUN", help="A run folder, or the folder of a pipeline.")],
    browse: Annotated[bool, Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write report.html of a run or a pipeline again, from its records: curves, health events, settings, lineage."""
    from llmlab.pipeline.running import STATE, write_pipeline_page
    from llmlab.runs.page import write_run_page

    folder = expand(folder)
    is_pipeline = (folder / STATE).is_file()
    page = write_pipeline_page(folder) if is_pipeline else write_run_page(history.open_run(folder))
    say(str(page))
    if browse:
        webbrowser.open(page.resolve().as_uri())


def _show_rows(run: RunFolder, as_json: bool) -> None:
    """Prints the validation rows with the highest loss at the last evaluation."""
    found = read_hardest_rows(run.folder)
    if as_json:
        return say_json(found, indent=2)
    if not found:
        raise UserError(f"{run.folder}: no hardest rows are recorded; pretrain and sft record them at evaluations")
    console = Terminal()
    console.print(f"[bold]rows with the highest loss[/] at step {found[0].get('step', '?')}, nats a token")
    columns = (numeric("loss"), numeric("tokens"), "source", numeric("row"), Column("begins", ratio=1))
    names = ("loss", "tokens", "source", "row")
    cells = ((*(_cell(row.get(name)) for name in names), " ".join(str(row.get("text", "")).split())) for row in found)
    console.table(columns, ((*row, safe(text)) for *row, text in cells), gap=1)


def _print_list(console: Terminal, runs: Sequence[RunFolder]) -> None:
    """Prints one table, with a line of its own above the runs of each folder."""
    groups: dict[Path, list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(run.folder.resolve().parent, []).append(run)
    rows = [_list_row(run) for group in groups.values() for run in group]
    widths = {name: max(len(name), *(Text.from_markup(row[name]).cell_len for row in rows)) for name in rows[0]}
    for name in LEFT_OUT:
        if sum(min(width, SHRINKING.get(name, width)) + 1 for name, width in widths.items()) - 1 > console.width:
            del widths[name]
    table = make_table(gap=1)
    for name in widths:
        justify = "right" if name in ("steps", "took") else "left"
        table.add_column(name, justify=justify, no_wrap=name not in SHRINKING)
    for row in rows:
        table.add_row(*(one_line(row[name]) for name in widths))
    heading, *lines = console.render_lines(table, pad=False, new_lines=True)
    console.print(Segments(heading))
    for folder, group in groups.items():
        console.print(f"[blue]{safe(_path(folder))}/[/]", soft_wrap=True)
        for _ in group:
            console.print(Segments(lines.pop(0)))


def _list_row(run: RunFolder) -> dict[str, str]:
    """Returns a run's cells by their column, in markup."""
    parents = []
    for parent in run.parents:
        found = history.find_parent(run, parent)
        folder = found.folder.resolve() if found else None
        beside = folder is not None and folder.parent == run.folder.resolve().parent
        parents.append(parent if folder is None else folder.name if beside else "/".join(folder.parts[-2:]))
    return {
        "run": safe(run.folder.resolve().name),
        "stage": safe(run.stage or "-"),
        "status": show_status(run),
        "steps": "-" if run.step is None else f"{run.step:,}",
        "result": show_result(run) or "-",
        "from": safe("+".join(parents) or "-"),
        "started": run.started.astimezone().strftime("%m-%d %H:%M") if run.started else "-",
        "took": duration(run.seconds),
    }


def curves_of(run: RunFolder, name: str) -> tuple[list[Curve], list[str]]:
    """Returns the curve of a metric, with marks at its evaluations, and what the chart's legend says of each."""
    curves = [Curve(run.curves[name], CURVE_STYLES[0])] if name in run.curves else []
    legend = [f"[{CURVE_STYLES[0]}]⠒⠒[/] {safe(name)}"]
    if evaluated := run.curves.get(f"eval_{name}"):
        curves.append(Curve(evaluated, CURVE_STYLES[2], marks=True))
        legend.append(f"[{CURVE_STYLES[2]}]●[/] eval_{safe(name)}")
    return curves, legend


def show_result(run: RunFolder) -> str:
    return f"[dim]{safe(run.key_metric[0])}[/] {short_number(run.key_metric[1])}" if run.key_metric else ""


def show_status(run: RunFolder) -> str:
    return f"[{STATUS_STYLES.get(run.status, 'none')}]{safe(run.status)}[/]"


def _print_heading(console: Terminal, run: RunFolder) -> None:
    facts = [f"[bold]{safe(run.stage)}[/]", show_status(run)]
    facts += [f"{number:,} {unit}" for number, unit in ((run.step, "steps"), (run.tokens, "tokens")) if number]
    facts += [duration(run.seconds)] if run.seconds is not None else []
    console.print(f"[bold]{safe(_path(run.folder))}[/]", soft_wrap=True)
    console.print("  ".join(facts))
    if run.started:
        console.print(f"[dim]started {run.started.astimezone():%Y-%m-%d %H:%M}[/]")
    if run.status == "died":
        console.print(f"[red]It is recorded as running, and has been silent for {duration(run.silence)}.[/]")
    for resumed in run.record.get("resumed", []):
        console.print(f"[dim]resumed at step {resumed['step']:,}, {safe(resumed['at'])}[/]")


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


def _print_data(console: Terminal, run: RunFolder) -> None:
    """Prints a line for each source, and one for the rest, of the values that are numbers and text."""
    data = run.record.get("data") or {}
    lines = []
    for part in (*run.data_sources, {key: value for key, value in data.items() if key != "sources"}):
        values = {key: value for key, value in history.flatten(part).items() if isinstance(value, (str, int, float))}
        name = [safe(values.pop("name"))] if "name" in values else []
        lines.append("  ".join([*name, *(f"[dim]{safe(key)}[/] {_cell(value)}" for key, value in values.items())]))
    if any(lines):
        console.section("Data")
        console.print("\n".join(line for line in lines if line))


def _print_metrics(console: Terminal, runs: Sequence[RunFolder], headings: Sequence[str]) -> None:
    """Prints the last value of each metric, and the best one where that is another."""
    metrics = dict.fromkeys(name for run in runs for name in run.metrics)
    metrics = [name for name in metrics if history.is_shown(name)]
    if not metrics:
        return
    console.section("Metrics")
    table = make_table(NAMES.copy(), *map(numeric, headings), gap=1)
    for name in metrics:
        last = [run.metrics.get(name) for run in runs]
        bests = [run.best(name) for run in runs]
        best = history.best_of(name, last)
        table.add_row(safe(name), *(f"[bold]{_cell(v)}[/]" if v is not None and v == best else _cell(v) for v in last))
        if any(best and best[1] != value for best, value in zip(bests, last, strict=True)):
            cells = (f"{short_number(best[1])} [dim]at {best[0]:,}[/]" if best else "" for best in bests)
            table.add_row("  best", *cells)
    if len(runs) > 1:
        table.add_row("steps", *(_cell(run.step) for run in runs))
        table.add_row("tokens", *(_cell(run.tokens) for run in runs))
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


def _print_surroundings(console: Terminal, run: RunFolder) -> None:
    hardware, git = run.record.get("hardware") or {}, run.record.get("git")
    console.section("Made with")
    if hardware:
        memory = f", {hardware['memory'] / 1e9:.0f} GB" if hardware.get("memory") else ""
        processes = f", {hardware['processes']} processes" if hardware.get("processes", 1) != 1 else ""
        device = f"{hardware.get('name', '')} ({hardware.get('device', '')}{memory}{processes})"
        console.print(safe(f"{device}, {hardware.get('dtype', '')}: {hardware.get('reason', '')}"))
    versions = run.record.get("versions") or {}
    console.print(safe("  ".join(f"{name} {number}" for name, number in versions.items())), style="dim")
    if git:
        console.print(f"[dim]git {safe(git['revision'][:12])}[/]")


def _path(folder: Path) -> str:
    """Returns a folder as seen from the working directory, where it lies in that."""
    whole = folder.resolve()
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(folder)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return short_number(value) if is_number(value) else safe(written(value))

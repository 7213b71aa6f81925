"""`llmlab runs list`, `show` and `compare`: what was run, from what, with what result, as tables, trees and curves.

Only how runs look is here; what they are is read by `llmlab/runs/history.py`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmlab.cli.curves import Curve, draw, short_number
from llmlab.runs.history import (
    Ancestor,
    RunFolder,
    ancestors,
    comparison,
    curve_metric,
    details,
    differing,
    direction,
    find_parent,
    find_runs,
    flatten,
    given_settings,
    open_run,
    short_names,
    summary,
)
from llmlab.settings.base import show as written
from llmlab.settings.errors import UserError, printable
from llmlab.settings.files import finite
from llmlab.terminal import say_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.tree import Tree

app = typer.Typer(no_args_is_help=True)

STATUS_STYLES = {
    **{"finished": "green", "running": "cyan", "interrupted": "yellow"},
    **dict.fromkeys(("diverged", "failed", "died", "damaged"), "red"),
}
CURVE_STYLES = ("cyan", "magenta", "yellow", "green", "blue", "red")
OF_THE_MACHINE = ("_runtime", "_per_second", "total_flos", "epoch", "num_tokens", "step", "train_loss")
LIST_COLUMNS = ("run", "stage", "status", "steps", "result", "from", "started", "took")
RIGHT = {name: {"justify": "right"} for name in ("steps", "took")}
# what gives way on a narrow terminal, one after the other, down to so many characters; 0 leaves it out
GIVE_WAY = (("from", 9), ("run", 20), ("started", 0), ("took", 0), ("result", 12), ("run", 9))
WIDEST, HEIGHT = 100, 9  # of a chart, in characters

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]
Metric = Annotated[str | None, typer.Option(help="Draw this metric; none is the loss, or the stage's own.")]


@app.command("list")
def list_runs(
    folder: Annotated[
        Path | None, typer.Argument(help="Where to search, with all below; none is the current folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder and below: how they went, how good they became, what they started from."""
    runs = find_runs(folder or Path())
    if as_json:
        return _print_json([summary(run) for run in runs])
    console = _console(whole_rows=True)
    if not runs:
        console.print(f"no runs in {_safe(str(folder or 'this folder'))} or below", soft_wrap=True)
        return
    _print_list(console, runs)
    for run in runs:
        if run.problem:
            console.print(f"[red]damaged[/] {_safe(run.problem)}", soft_wrap=True)


@app.command()
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    metric: Metric = None,
    as_json: AsJson = False,
) -> None:
    """Show one run: its settings and their sources, where it comes from, its data, results and curve."""
    chosen = open_run(run)
    drawn = curve_metric([chosen], metric) or ""
    if metric is None and drawn.removeprefix("eval_") in chosen.curves:
        drawn = drawn.removeprefix("eval_")  # the evaluations are marked on it
    if as_json:
        return _print_json(details(chosen))
    console = _console()
    _print_heading(console, chosen)
    _section(console, "Lineage")
    console.print(_tree(ancestors(chosen)))
    settings = [row for row in given_settings(chosen) if row[0] != "output_dir"]
    if settings:
        _section(console, "Settings that are not defaults")
        table = _table(("setting", {}), ("value", {"ratio": 1}), ("source", {"style": "dim"}))
        for key, value, source in settings:
            table.add_row(_safe(key), _safe(_brief(value)), _safe(source))
        console.print(table)
    _print_data(console, chosen)
    _print_metrics(console, [chosen], ["last"])
    if drawn:
        _section(console, drawn)
        curves = [Curve(chosen.curves[drawn], CURVE_STYLES[0])]
        evaluated = chosen.curves.get(f"eval_{drawn}")
        if evaluated:
            curves.append(Curve(evaluated, CURVE_STYLES[2], marks=True))
        _print_chart(console, curves)
        if evaluated:
            console.print(f"[{CURVE_STYLES[0]}]⠒⠒[/] {_safe(drawn)}   [{CURVE_STYLES[2]}]●[/] eval_{_safe(drawn)}")
    _print_surroundings(console, chosen)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders, two or more.")],
    metric: Metric = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs: the settings that differ, the metrics side by side, the curves on one scale."""
    if len({folder.resolve() for folder in runs}) < len(runs):
        raise UserError("a run is given twice; expected different ones")
    if len(runs) < 2:
        raise UserError("expected two runs or more (llmlab runs show RUN shows one)")
    chosen = [open_run(folder) for folder in runs]
    drawn = curve_metric(chosen, metric)
    if as_json:
        return _print_json(comparison(chosen))
    console = _console()
    names = short_names(chosen)
    styles = [CURVE_STYLES[number % len(CURVE_STYLES)] for number in range(len(chosen))]
    headings = [f"[{style}]{_safe(name)}[/]" for name, style in zip(names, styles, strict=True)]
    _section(console, "Settings that differ")
    table = _table(("", {"style": "dim"}), *((heading, {"ratio": 1}) for heading in headings))
    rows = 0
    for part, title in (("settings", ""), ("versions", "version of "), ("hardware", "hardware ")):
        for key, values in differing(chosen, part).items():
            table.add_row(title + _safe(key), *("-" if value is ... else _safe(_brief(value)) for value in values))
            rows += 1
    console.print(table if rows else "[dim]none[/]")
    _print_metrics(console, chosen, headings)
    curves = [(run.curves.get(drawn or "", []), style) for run, style in zip(chosen, styles, strict=True)]
    if drawn is None:
        return
    _section(console, drawn)
    if console.color_system is None or console.no_color:  # lines of one color would be one line
        whole = [point for points, _ in curves for point in points]
        for name, (points, style) in zip(names, curves, strict=True):
            console.print(_safe(name) if points else f"{_safe(name)}: logged no {_safe(drawn)}")
            if points:
                _print_chart(console, [Curve(points, style)], scale=whole)
        return
    _print_chart(console, [Curve(points, style) for points, style in curves if points])
    legend = [
        f"[{style}]⠒⠒[/] {_safe(name)}{'' if points else ' (none logged)'}"
        for name, (points, style) in zip(names, curves, strict=True)
    ]
    console.print("   ".join(legend))


# Parts of what is printed -----------------------------------------------------------------------------------------


def _print_list(console: "Console", runs: Sequence[RunFolder]) -> None:
    """Prints one table, with a line of its own for each folder that runs lie in."""
    from rich.text import Text

    groups: dict[Path, list[tuple[str, ...]]] = {}
    for run in runs:
        groups.setdefault(run.folder.resolve().parent, []).append(_list_row(run))
    rows = [LIST_COLUMNS, *(row for group in groups.values() for row in group)]
    widths = [
        max(Text.from_markup(line).cell_len for row in rows for line in row[column].splitlines())
        for column in range(len(LIST_COLUMNS))
    ]
    for name, narrowest in GIVE_WAY:
        column = LIST_COLUMNS.index(name)
        missing = sum(widths) + sum(width > 0 for width in widths) - 1 - console.width
        if missing > 0:
            widths[column] = min(max(widths[column] - missing, narrowest), widths[column]) if narrowest else 0
    shown = [number for number, width in enumerate(widths) if width]
    whole = {"no_wrap": True, "overflow": "ellipsis"}
    columns = [
        (LIST_COLUMNS[number], {"width": widths[number], **whole, **RIGHT.get(LIST_COLUMNS[number], {})})
        for number in shown
    ]
    console.print(_table(*columns))
    for folder, group in groups.items():
        table = _table(*columns)
        table.show_header = False
        for row in group:
            cells, origin = list(row), LIST_COLUMNS.index("from")
            limit = widths[origin]
            lines = (line if len(line) <= limit else f"…{line[1 - limit :]}" for line in cells[origin].splitlines())
            cells[origin] = "\n".join(lines)  # of a parent's path the end is kept
            table.add_row(*(cells[number] for number in shown))
        console.print(f"[blue]{_safe(_path(folder))}/[/]", soft_wrap=True)
        console.print(table)


def _list_row(run: RunFolder) -> tuple[str, ...]:
    key, parents = run.key_metric, []
    for parent in run.parents:
        found = find_parent(run, parent)
        beside = found is not None and found.folder.resolve().parent == run.folder.resolve().parent
        parents.append(found.folder.name if found and beside else _path(found.folder) if found else parent)
    return (
        _safe(run.folder.resolve().name),
        _safe(run.stage or "-"),
        _status(run),
        "-" if run.step is None else f"{run.step:,}",
        f"[dim]{_safe(key[0])}[/] {short_number(key[1])}" if key else "-",
        _safe("\n".join(parents) or "-"),
        run.started.astimezone().strftime("%m-%d %H:%M") if run.started else "-",
        _duration(run.seconds),
    )


def _status(run: RunFolder) -> str:
    return f"[{STATUS_STYLES.get(run.status, 'none')}]{_safe(run.status)}[/]"


def _print_heading(console: "Console", run: RunFolder) -> None:
    facts = [f"[bold]{_safe(run.stage)}[/]", _status(run)]
    if run.step is not None:
        facts.append(f"{run.step:,} steps")
    if run.tokens:
        facts.append(f"{run.tokens:,} tokens")
    if run.seconds is not None:
        facts.append(_duration(run.seconds))
    console.print(f"[bold]{_safe(_path(run.folder))}[/]", soft_wrap=True)
    console.print("  ".join(facts))
    if run.started:
        console.print(f"[dim]started {run.started.astimezone():%Y-%m-%d %H:%M}[/]")
    if run.status == "died":
        console.print(f"[red]It says that it is running, and has been silent for {_duration(run.silence)}.[/]")
    for resumed in run.record.get("resumed", []):
        console.print(f"[dim]resumed at step {resumed['step']:,}, {_safe(str(resumed['at']))}[/]")


def _tree(ancestor: Ancestor, tree: "Tree | None" = None) -> "Tree":
    from rich.tree import Tree

    run = ancestor.run
    if run is None:
        label = f"{_safe(ancestor.name)}  [dim]not a run folder here[/]"
    else:
        key = run.key_metric
        result = f"  [dim]{_safe(key[0])}[/] {short_number(key[1])}" if key else ""
        label = f"{_safe(_path(run.folder))}  [dim]{_safe(run.stage)}[/]{result}"
    branch = Tree(label, guide_style="dim") if tree is None else tree.add(label)
    for parent in ancestor.parents:
        _tree(parent, branch)
    return branch


def _print_data(console: "Console", run: RunFolder) -> None:
    data = run.record.get("data") or {}
    sources = [source for source in data.get("sources", []) if isinstance(source, dict)]
    rest = {key: value for key, value in flatten(data).items() if key != "sources" and _plain_value(value)}
    if not sources and not rest:
        return
    _section(console, "Data")
    flat = [
        {key: value for key, value in flatten(source).items() if value != {} and _plain_value(value)}
        for source in sources
    ]
    for source in flat:
        name = source.pop("name", "")
        console.print(f"{_safe(str(name))}  " + "  ".join(f"[dim]{_safe(k)}[/] {_cell(v)}" for k, v in source.items()))
    if rest:
        console.print("  ".join(f"[dim]{_safe(key)}[/] {_cell(value)}" for key, value in rest.items()))


def _print_metrics(console: "Console", runs: Sequence[RunFolder], headings: Sequence[str]) -> None:
    """Prints the last value of each metric, and the best one where one direction is better."""
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    named = [name for name in names if name == "tokens_per_second" or not name.endswith(OF_THE_MACHINE)]
    if not named:
        return
    _section(console, "Metrics")
    one = len(runs) == 1
    right = {"justify": "right", "no_wrap": True}
    has_best = one and any(runs[0].best(name) for name in named)
    table = _table(
        ("", {"style": "dim"}), *((heading, right) for heading in headings), *([("best", right)] * has_best)
    )
    for name in named:
        last = [run.metrics.get(name) for run in runs]
        bests = [run.best(name) for run in runs]
        if one:
            table.add_row(_safe(name), _cell(last[0]), *([_best_cell(bests[0])] * has_best))
            continue
        table.add_row(_safe(name), *_marked(name, last))
        if any(best and best[1] != value for best, value in zip(bests, last, strict=True)):
            cells = (_best_cell(best) for best in bests)
            table.add_row("  best", *cells)
    if not one:
        table.add_row("steps", *(_cell(run.step) for run in runs))
        table.add_row("tokens", *(_cell(run.tokens) for run in runs))
        table.add_row("time", *(_duration(run.seconds) for run in runs))
        table.add_row("status", *(_status(run) for run in runs))
    console.print(table)


def _print_surroundings(console: "Console", run: RunFolder) -> None:
    hardware, git = run.record.get("hardware") or {}, run.record.get("git")
    _section(console, "Made with")
    if hardware:
        memory = f", {hardware['memory'] / 1e9:.0f} GB" if hardware.get("memory") else ""
        processes = f", {hardware['processes']} processes" if hardware.get("processes", 1) != 1 else ""
        device = f"{hardware.get('name', '')} ({hardware.get('device', '')}{memory}{processes})"
        console.print(_safe(f"{device}, {hardware.get('dtype', '')}: {hardware.get('reason', '')}"))
    versions = run.record.get("versions") or {}
    console.print(_safe("  ".join(f"{name} {number}" for name, number in versions.items())), style="dim")
    if git:
        console.print(f"[dim]git {_safe(git['revision'][:12])}{', with changes' if git.get('changed') else ''}[/]")


def _marked(name: str, values: Sequence[float | None]) -> list[str]:
    """Returns the values as text, the best one bold where one direction is better."""
    sign = direction(name)
    present = [value for value in values if value is not None]
    best = max(present, key=lambda value: sign * value) if sign and len(set(present)) > 1 else None
    return [f"[bold]{_cell(value)}[/]" if value is not None and value == best else _cell(value) for value in values]


def _best_cell(best: tuple[int, float] | None) -> str:
    return f"{short_number(best[1])} [dim]at {best[0]:,}[/]" if best else ""


def _print_chart(
    console: "Console", curves: Sequence[Curve], scale: Sequence[tuple[int, float]] | None = None
) -> None:
    for line in draw(curves, width=min(console.width, WIDEST), height=HEIGHT, scale=scale):
        console.print(line, soft_wrap=True)


# Words and numbers ------------------------------------------------------------------------------------------------


def _print_json(values: Any) -> None:
    say_json(finite(values), indent=2)


def _console(whole_rows: bool = False) -> "Console":
    """Returns the terminal; with `whole_rows`, a pipe is so wide that no row is folded."""
    from llmlab.terminal import Terminal

    console = Terminal()
    if whole_rows and not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 1000
    return console


def _table(*columns: tuple[str, dict[str, Any]]) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name, options in columns:
        table.add_column(name, **{"overflow": "fold", **options})
    return table


def _section(console: "Console", title: str) -> None:
    console.print(f"\n[bold]{_safe(title)}[/]")


def _safe(text: str) -> str:
    from rich.markup import escape

    return escape(printable(text))  # what columns are measured by is what is printed


def _path(folder: Path) -> str:
    return (
        str(folder.resolve().relative_to(Path.cwd())) if folder.resolve().is_relative_to(Path.cwd()) else str(folder)
    )


def _brief(value: Any) -> str:
    """Returns a value for a cell: of mappings in a list (data sources, rewards) only what is set."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        shown = []
        for entry in value:
            rest = {k: v for k, v in entry.items() if k != "name" and v not in (None, {}, 1.0, "train")}
            shown.append(f"{entry.get('name', '')} {written(rest) if rest else ''}".strip())
        return "\n".join(shown)
    return written(value)


def _plain_value(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return (
        short_number(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool)
        else _safe(written(value))
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.0f}s" if seconds >= 10 or seconds == int(seconds) else f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest:02}s"

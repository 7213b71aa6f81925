"""The pages of runs: `report.html` in a run folder, and one over several runs side by side.

What they say comes from `history` (record, metrics) and the folder's health events; how it looks is `llmlab.report`.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from llmlab.report.charts import Chart, Curve, Mark, group_curves, make_chart
from llmlab.report.page import link, write_page
from llmlab.runs import history
from llmlab.runs.history import Ancestor, RunFolder
from llmlab.runs.record import RECORD, is_number, read_completions, read_events
from llmlab.settings.errors import reason_of, shorten
from llmlab.terminal import duration, human, safe, say, short_number

PAGE = "report.html"
SAMPLES = "samples.jsonl"
MOST_SAMPLES = 12  # of a page: the first and last ones of a run
LINES_READ = 32  # of samples.jsonl, which may be large
LONGEST_SAMPLE = 1500  # characters


@contextmanager
def report_at_end(run: Any) -> Iterator[None]:
    """Writes the page of a `Run` however it ends, where its settings want one and it left a record."""
    try:
        yield
    finally:
        if run.settings.report and run.process.is_main_process and (run.folder / RECORD).is_file():
            page = try_writing(lambda: write_run_page(history.open_run(run.folder)))
            if page and sys.exc_info()[0] is None:
                run.console.print(f"[green]report[/green] {safe(page)}", soft_wrap=True)


def try_writing(write: Callable[[], Path]) -> Path | None:
    """Writes a page and returns its path; what goes wrong is said, and does not end a run that trained for hours."""
    try:
        return write()
    except Exception as error:
        say(f"note: no {PAGE} was written: {reason_of(error)}", error=True)
        return None


def write_run_page(run: RunFolder) -> Path:
    """Writes `report.html` into a run folder, and returns its path."""
    events = read_events(run.folder)
    data = run.record.get("data") or {}
    sources = [history.flatten(each) for each in data.get("sources", []) if isinstance(each, dict)]
    columns = [key for key in dict.fromkeys(key for each in sources for key in each) if _fills_column(key, sources)]
    facts = history.flatten({key: value for key, value in data.items() if key != "sources"})
    page = run.folder / PAGE
    return write_page(
        page,
        "run.html",
        run=run,
        title=run.folder.resolve().name,
        started=run.started and f"{run.started:%Y-%m-%d %H:%M} UTC",
        resumed=run.record.get("resumed", []),
        reason=str(run.record.get("reason", "")),
        tiles=_tiles(run, len(events)),
        events=events,
        charts=charts_of(run),
        samples=_samples(run.folder),
        lineage=_node(history.ancestors(run), page),
        data={
            "columns": [column.removeprefix("counts.").replace("_", " ") for column in columns],
            "rows": [[each.get(column) for column in columns] for each in sources],
            "facts": [(key.replace("_", " "), value) for key, value in facts.items() if is_number(value)],
        },
        changed=_brief(history.changed_settings(run)),
        settings=_brief(history.all_settings(run)),
        environment=_environment(run),
        metrics=[(name, value, run.best(name)) for name, value in run.metrics.items() if history.is_shown(name)],
    )


def write_comparison_page(runs: Sequence[RunFolder], page: Path) -> Path:
    """Writes a page with the curves of several runs over each other, and what differs between them."""
    names = history.short_names(runs)
    by_metric: dict[str, dict[str, Any]] = {}
    for run, name in zip(runs, names, strict=True):
        for metric, points in run.curves.items():
            by_metric.setdefault(metric, {})[name] = points
    metrics = {metric: group.log for group in group_curves(by_metric) for metric in group.metrics}
    parts = (("settings", ""), ("versions", "version of "), ("hardware", "hardware "))
    differences = [
        (title + key, ["–" if value is ... else history.brief(value) for value in values])
        for part, title in parts
        for key, values in history.differing(runs, part).items()
    ]
    rows = []
    for metric in dict.fromkeys(name for run in runs for name in run.metrics if history.is_shown(name)):
        values = [run.metrics.get(metric) for run in runs]
        sign = history.direction(metric)
        best = max((value for value in values if value is not None), key=lambda value: sign * value)
        rows.append((metric, values, best if sign and len(set(values)) > 1 else None))
    return write_page(
        page,
        "comparison.html",
        runs=[
            {"run": run, "name": name, "reference": link(page, run.folder / PAGE), "curve": Curve(name, (), number)}
            for number, (run, name) in enumerate(zip(runs, names, strict=True))
        ],
        charts=[
            Chart(metric, [Curve(name, by_run[name], names.index(name)) for name in by_run], log=log)
            for metric, log in metrics.items()
            for by_run in [by_metric[metric]]
        ],
        differences=differences,
        metrics=rows,
    )


def charts_of(
    run: RunFolder, only: Sequence[str] | None = None, *, title: str = "", small: bool = False
) -> list[Chart]:
    """Returns the charts of a run's metrics, or of `only` some, each with the health events of its metrics, and the
    loss with all."""
    events = [Mark(event.step, event.severity, number) for number, event in enumerate(read_events(run.folder), 1)]
    metrics = [event.metric for event in read_events(run.folder)]
    charts = []
    for group in group_curves(run.curves):
        if only is None or set(group.metrics) & set(only):
            concerned = {*group.metrics, *(metrics if "loss" in group.metrics else ())}
            marks = [mark for mark, metric in zip(events, metrics, strict=True) if metric in concerned]
            curves = {name: run.curves[name] for name in group.metrics}
            name = f"{title}: {group.title}" if title else group.title
            charts.append(make_chart(name, curves, marks=marks, small=small, log=group.log))
    return charts


def _tiles(run: RunFolder, events: int) -> list[tuple[str, str]]:
    tiles = []
    if run.key_metric:
        name, value = run.key_metric
        best = run.best(name)
        tiles.append((name, short_number(value)))
        if best and best[1] != value:
            tiles.append((f"best, at step {best[0]:,}", short_number(best[1])))
    tiles += [("steps", f"{run.step:,}")] if run.step is not None else []
    tiles += [("tokens", human(run.tokens) if run.tokens >= 1e4 else f"{run.tokens:,}")] if run.tokens else []
    tiles += [("time", duration(run.seconds))] if run.seconds is not None else []
    return [*tiles, ("health events", str(events))]


def _brief(rows: list[tuple[str, Any, str]]) -> list[tuple[str, str, str]]:
    return [(key, history.brief(value), source) for key, value, source in rows]


def _fills_column(key: str, rows: list[dict[str, Any]]) -> bool:
    """Whether a column of the data table says something: a number or text that is neither empty nor 0 everywhere."""
    values = [row.get(key) for row in rows]
    return any(isinstance(value, str) or (is_number(value) and value) for value in values)


def _node(ancestor: Ancestor, page: Path) -> dict[str, Any]:
    """Returns a lineage as nested mappings, with references to the pages of runs that have one."""
    run, parents = ancestor.run, [_node(parent, page) for parent in ancestor.parents]
    if run is None:
        return {"name": ancestor.name, "reference": "", "note": "not a run folder here", "parents": parents}
    metric = f"{run.key_metric[0]} {short_number(run.key_metric[1])}" if run.key_metric else ""
    note = " · ".join(filter(None, (run.stage, metric)))
    reference = "" if run.folder / PAGE == page else link(page, run.folder / PAGE)
    return {"name": str(run.folder), "reference": reference, "note": note, "parents": parents}


def _environment(run: RunFolder) -> list[tuple[str, str]]:
    hardware = history.flatten(run.record.get("hardware") or {})
    if is_number(hardware.get("memory")):
        hardware["memory"] = human(hardware["memory"], "B")
    rows = [*hardware.items(), *(run.record.get("versions") or {}).items()]
    revision = (run.record.get("git") or {}).get("revision")
    rows += [("git revision", revision)] if revision else []
    return [(name.replace("_", " "), str(value)) for name, value in rows if value is not None]


def _samples(folder: Path) -> list[dict[str, str]]:
    """Returns completions that the run recorded on its way, or those that it trained on."""
    found = read_completions(folder)
    half = MOST_SAMPLES // 2
    chosen = found if len(found) <= MOST_SAMPLES else [*found[:half], *found[-half:]]
    if not found and (folder / SAMPLES).is_file():
        with (folder / SAMPLES).open(encoding="utf-8", errors="replace") as lines:
            chosen = [_parse(line) for line in islice(lines, LINES_READ)]
        firsts: dict[str, dict[str, Any]] = {}
        for each in chosen:
            firsts.setdefault(str(each.get("prompt_id", each.get("prompt"))), each)
        chosen = list(firsts.values())[:half]
    return [_sample(each) for each in chosen if "completion" in each]


def _parse(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _sample(values: dict[str, Any]) -> dict[str, str]:
    rewards = values.get("rewards") if isinstance(values.get("rewards"), dict) else {}
    facts = [f"step {values['step']:,}"] if is_number(values.get("step")) else []
    facts += [f"reward {short_number(values['reward'])}"] if is_number(values.get("reward")) else []
    facts += [
        f"{name} {short_number(value)}" for name, value in rewards.items() if is_number(value) and "/" not in name
    ]
    prompt, completion = (shorten(_text(values.get(key)), LONGEST_SAMPLE) for key in ("prompt", "completion"))
    return {"heading": " · ".join(facts), "prompt": prompt, "completion": completion}


def _text(messages: Any) -> str:
    """Returns a text, or messages with their roles and tool calls, as a reader sees them."""
    if not isinstance(messages, list):
        return str(messages)
    lines = []
    for message in messages:
        values = message if isinstance(message, dict) else {"content": message}
        calls = [json.dumps(call, ensure_ascii=False) for call in values.get("tool_calls") or []]
        lines.append(
            f"{values.get('role', '')}: " + "\n".join([*filter(None, [str(values.get("content") or "")]), *calls])
        )
    return "\n".join(lines)

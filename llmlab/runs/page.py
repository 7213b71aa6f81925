"""The pages of runs: `report.html` in a run folder, and one over several runs side by side. What they say comes from
`history` (record, metrics) and the folder's health events; how it looks is `llmlab.report`."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from llmlab.report.page import Chart, Curve, Mark, group_curves, write_page
from llmlab.runs import history
from llmlab.runs.history import RunFolder
from llmlab.runs.record import RECORD, is_number, parse_lines, read_completions, read_hardest_rows
from llmlab.settings.errors import reason_of
from llmlab.terminal import safe, say

PAGE = "report.html"
SAMPLES = "samples.jsonl"
MOST_SAMPLES = 12  # of a page: the first and last ones of a run
LINES_READ = 32  # of samples.jsonl, which may be large


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
    found = (run.record.get("data") or {}).get("sources")
    sources = [history.flatten(each) for each in found if isinstance(each, dict)] if isinstance(found, list) else []
    # of numbers and text that are neither empty nor 0 everywhere
    filled = {key for row in sources for key, v in row.items() if isinstance(v, str) or (is_number(v) and v)}
    columns = list(dict.fromkeys(key for source in sources for key in source if key in filled))
    values = {"run": run, "history": history, "text_of": text_of, "sources": sources, "columns": columns}
    values |= {"events": run.events, "charts": charts_of(run), "samples": _samples(run.folder)}
    return write_page(run.folder / PAGE, "run.html", hardest_rows=read_hardest_rows(run.folder), **values)


def write_comparison_page(runs: Sequence[RunFolder], page: Path) -> Path:
    """Writes a page with the curves of several runs over each other, and what differs between them."""
    names = history.short_names(runs)
    charts = []
    for group in group_curves({metric: None for run in runs for metric in run.curves}):
        for metric in group.metrics:
            logged = [number for number, run in enumerate(runs) if metric in run.curves]
            curves = [Curve(names[number], runs[number].curves[metric], number) for number in logged]
            charts.append(Chart(metric, curves, log=group.log))
    rows = []
    for metric in filter(history.is_shown, dict.fromkeys(name for run in runs for name in run.metrics)):
        values = [run.metrics.get(metric) for run in runs]
        rows.append((metric, values, history.best_of(metric, values)))
    curves = [Curve(name, (), number) for number, name in enumerate(names)]
    values = {"runs": runs, "curves": curves, "charts": charts, "metrics": rows, "history": history, "file": PAGE}
    return write_page(page, "comparison.html", **values)


def charts_of(run: RunFolder, only: str | None = None) -> list[Chart]:
    """Returns the charts of a run's metrics, or the one of `only` a metric, each with the health events of its
    metrics, and the loss with all."""
    events = list(enumerate(run.events, start=1))
    charts = []
    for group in group_curves(run.curves):
        if only is None or only in group.metrics:
            concerned = {*group.metrics, *(event.metric for _, event in events if "loss" in group.metrics)}
            marks = [Mark(each.step, each.severity, number) for number, each in events if each.metric in concerned]
            curves = [Curve(name, run.curves[name], number) for number, name in enumerate(group.metrics)]
            charts.append(Chart(group.title, curves, marks, group.log))
    return charts


def text_of(messages: Any) -> str:
    """Returns a sample's prompt or completion as text: of messages, a line for each with its role and tool calls."""
    lines = []
    for message in messages if isinstance(messages, list) else [messages]:
        if isinstance(message, dict) and "role" in message:
            calls = message.get("tool_calls")
            parts = [message.get("reasoning_content"), message.get("content")]
            parts += calls if isinstance(calls, list) else [calls]
            shown = (part if isinstance(part, str) else json.dumps(part, ensure_ascii=False) for part in parts if part)
            message = f"{message['role']}: {' '.join(shown)}"
        lines.append(str(message or ""))
    return "\n".join(lines)


def _samples(folder: Path) -> list[dict[str, Any]]:
    """Returns completions that the run recorded on its way, or one for each of the prompts that it trained on."""
    found = read_completions(folder)
    if not found and (folder / SAMPLES).is_file():
        with (folder / SAMPLES).open(encoding="utf-8", errors="replace") as lines:
            rows = reversed(parse_lines(islice(lines, LINES_READ)))
        found = list({str(row.get("prompt_id", row.get("prompt"))): row for row in rows}.values())[::-1]
    half = MOST_SAMPLES // 2
    return found if len(found) <= MOST_SAMPLES else [*found[:half], *found[-half:]]

"""The page of a pipeline: its stages with their results and curves, and references to their own pages."""

from pathlib import Path
from typing import Any

from llmlab.pipeline.state import StageState, read_state
from llmlab.report.page import link, write_page
from llmlab.runs.history import RunFolder, curve_metric, find_runs
from llmlab.runs.page import PAGE, charts_of
from llmlab.runs.record import read_events
from llmlab.terminal import duration


def write_pipeline_page(folder: Path) -> Path:
    """Writes `report.html` into a pipeline's folder, and returns its path."""
    page, runs = folder / PAGE, {run.folder.name: run for run in find_runs(folder) if run.folder.parent == folder}
    stages = [_stage(page, name, entry, runs.get(name)) for name, entry in read_state(folder).items()]
    stages.sort(key=lambda stage: stage["started"])
    seconds = [stage["seconds"] for stage in stages if stage["seconds"] is not None]
    finished = sum(stage["status"] == "finished" for stage in stages)
    return write_page(
        page,
        "pipeline.html",
        title=folder.resolve().name,
        folder=folder,
        stages=stages,
        tiles=[
            ("stages finished", f"{finished} of {len(stages)}"),
            ("time of all", duration(sum(seconds))),
            ("health events", str(sum(stage["events"] for stage in stages))),
        ],
        charts=[chart for stage in stages for chart in stage["charts"]],
    )


def _stage(page: Path, name: str, entry: StageState, run: RunFolder | None) -> dict[str, Any]:
    """Returns what the page says of one stage, which may have ended before it wrote a record."""
    found = run or RunFolder(page.parent / name, {})
    metric = curve_metric([found])
    sparklines = charts_of(found, [metric], small=True) if metric else []
    ended = entry["status"] if entry["status"] == "finished" else "failed"
    return {
        "name": name,
        "kind": found.stage or str(entry["inputs"].get("kind", {}).get("stage", name)),
        "reference": link(page, found.folder / PAGE),
        "status": found.status if run else ended,
        "metric": found.key_metric,
        "chart": sparklines[0] if sparklines else None,
        "charts": charts_of(found, [metric], title=name) if metric else [],
        "steps": found.step,
        "tokens": found.tokens,
        "seconds": found.seconds,
        "started": str(found.record.get("started", "~")),  # those without a record last
        "events": len(read_events(found.folder)),
        "needs": list(entry["needed_runs"]),
    }

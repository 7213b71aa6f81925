"""The page of a pipeline: its stages with their results and curves, and references to their own pages."""

from pathlib import Path

from llmlab.pipeline.running import read_state
from llmlab.report.page import write_page
from llmlab.runs.history import RunFolder, curve_metric, open_or_note
from llmlab.runs.page import PAGE, charts_of
from llmlab.runs.record import RECORD, read_events


def write_pipeline_page(folder: Path) -> Path:
    """Writes `report.html` into a pipeline's folder, and returns its path."""
    stages = []
    for name, entry in read_state(folder).items():
        place = folder / name
        recorded = (place / RECORD).is_file()  # it may have ended before it wrote a record
        run = open_or_note(place) if recorded else RunFolder(place, {})
        metric = curve_metric([run])
        charts = charts_of(run, metric) if metric else []
        stage = {
            "name": name,
            "kind": run.stage or entry["inputs"].get("kind", {}).get("stage", name),
            "status": run.status if recorded or entry["status"] == "finished" else "failed",
            "run": run,
            "sparklines": charts_of(run, metric, small=True) if metric else [],
            "charts": charts_of(run, metric, title=f"{name}: {charts[0].title}") if charts else [],
            "events": len(read_events(run.folder)),
            "needs": list(entry["needed_runs"]),
        }
        stages.append(stage)
    stages.sort(key=lambda stage: str(stage["run"].record.get("started", "~")))  # those without a record last
    return write_page(folder / PAGE, "pipeline.html", folder=folder, stages=stages)

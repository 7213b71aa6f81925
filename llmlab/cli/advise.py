"""`llmlab advise RUN...`: what finished or running runs show, with the evidence, and the settings to change."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from llmlab.cli.arguments import AsJson, Overwrite
from llmlab.health import advice
from llmlab.health.symptoms import load_table
from llmlab.runs import history
from llmlab.runs.history import RunFolder
from llmlab.runs.record import read_events
from llmlab.settings.base import show
from llmlab.settings.errors import UserError
from llmlab.settings.files import Layer, dump, finite
from llmlab.settings.sources import resolve
from llmlab.stages import STAGES
from llmlab.terminal import Terminal, safe, say_json

LOOKED_AT = ("loss", "eval_loss", "grad_norm", "reward", "kl", "entropy", "zero_variance_share", "eval_win_rate")


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
    reports = [_report(history.open_run(folder)) for folder in runs]
    files = [report.pop("file") for report in reports]
    if apply is not None:
        if not reports[0]["changes"]:
            raise UserError(f"--apply {apply}: nothing in {runs[0]} calls for other settings; nothing was written")
        dump(files[0], apply)
    if as_json:
        return say_json(finite(reports), indent=2)
    console = Terminal()
    for report in reports:
        _print_report(console, report)
    if apply is not None:
        command = f"llmlab {reports[0]['stage']} --config {apply}"
        console.print(f"[green]wrote[/] {safe(apply)}: {safe(command)}", soft_wrap=True)


def _report(run: RunFolder) -> dict[str, Any]:
    """Returns what is known of a run, as plain values; `file` are its settings with the changes."""
    if run.stage not in STAGES or not STAGES[run.stage].resumes:
        trained = ", ".join(name for name, stage in STAGES.items() if stage.resumes)
        raise UserError(f"{run.folder}: nothing is trained in stage '{run.stage}'; expected a run of {trained}")
    kind, record = STAGES[run.stage].settings_class, run.record
    own = advice.own_settings(kind, record.get("settings", {}), record.get("sources", {}))
    settings = resolve(kind, Layer(str(run.folder), own)).settings
    events, reason = read_events(run.folder), str(record.get("reason", ""))
    found = advice.diagnose(advice.History(run.stage, settings, run.curves, events, run.status, reason, run.metrics))
    changes, conditions = advice.propose(kind, own, list(found)), load_table()[1]
    names = (f"{settings.output_dir}-{number}" for number in range(2, 10**6))
    new = {key: after for key, (_, after) in changes.items()}
    new["output_dir"] = next(name for name in names if not Path(name).exists())
    return {
        "run": str(run.folder),
        "stage": run.stage,
        "status": run.status,
        "step": run.step,
        "healthy": not found,
        "looked_at": {name: len(run.curves[name]) for name in LOOKED_AT if name in run.curves}
        | {"events": len(events)},
        "findings": [
            {"condition": name, "title": (of := conditions[name]).title, "evidence": lines, "advice": list(of.advice)}
            for name, lines in found.items()
        ],
        "changes": {key: list(values) for key, values in changes.items()},
        "file": {"stage": run.stage, **advice.changed(own, new)},
    }


def _print_report(console: Terminal, report: dict[str, Any]) -> None:
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
    changes = report["changes"].items()
    rows = [(safe(key), safe(show(now)), "->", f"[bold]{safe(show(after))}[/]") for key, (now, after) in changes]
    if rows:
        console.table(("setting", "now", "", "next"), rows)
    for sentence in dict.fromkeys(line for finding in report["findings"] for line in finding["advice"]):
        console.print(sentence, soft_wrap=True)

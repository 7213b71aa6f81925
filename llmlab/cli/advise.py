"""`llmlab advise RUN...`: what finished or running runs show, with the evidence, and the settings to change."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from llmlab.health import advice
from llmlab.runs import history
from llmlab.runs.history import RunFolder
from llmlab.runs.record import read_events
from llmlab.settings.base import show
from llmlab.settings.errors import UserError
from llmlab.settings.files import Layer, dump, finite
from llmlab.settings.sources import resolve
from llmlab.stages import STAGES
from llmlab.terminal import Terminal, make_table, safe, say_json, short_number

LOOKED_AT = ("loss", "eval_loss", "grad_norm", "reward", "kl", "entropy", "zero_variance_share", "eval_win_rate")


def advise(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    apply: Annotated[
        Path | None, typer.Option(help="Write the run's settings with the changes into this YAML or JSON file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With --apply: replace the file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")] = False,
) -> None:
    """Name what a run's metrics, events and settings show, with numbers and steps, and what to change.

    Conditions and actions are those of the RL guide, section 6: underfitting, overfitting, instability, drift,
    reward hacking and more. --apply writes a settings file for the same stage.
    """
    if apply is not None and len(runs) > 1:
        raise UserError("--apply: expected one run, whose settings are changed")
    if apply is not None and apply.exists() and not overwrite:
        raise UserError(f"--apply {apply}: it exists; choose another name, or --overwrite")
    chosen = [history.open_run(folder) for folder in runs]
    reports = [_report(run) for run in chosen]
    if apply is not None:
        if not reports[0]["changes"]:
            raise UserError(f"--apply {apply}: nothing in {runs[0]} calls for other settings; nothing was written")
        dump({"stage": chosen[0].stage, **reports[0].pop("file")}, apply)
    if as_json:
        shown = [{name: value for name, value in report.items() if name != "file"} for report in reports]
        return say_json(finite(shown), indent=2)
    console = Terminal()
    for run, report in zip(chosen, reports, strict=True):
        _print_report(console, run, report)
    _print_best(console, chosen)
    if apply is not None:
        console.print(
            f"\n[green]wrote[/] {safe(apply)}: llmlab {chosen[0].stage} --config {safe(apply)}", soft_wrap=True
        )


def _report(run: RunFolder) -> dict[str, Any]:
    """Returns what is known of a run, as plain values; `file` are its settings with the changes."""
    if run.stage not in STAGES or not STAGES[run.stage].resumes:
        trained = ", ".join(name for name, stage in STAGES.items() if stage.resumes)
        raise UserError(f"{run.folder}: nothing is trained in stage '{run.stage}'; expected a run of {trained}")
    kind, sources = STAGES[run.stage].settings_class, run.record.get("sources", {})
    own = advice.own_settings(kind, run.record.get("settings", {}), sources)
    settings = resolve(kind, Layer(str(run.folder), own)).settings
    past = advice.History(
        run.stage,
        settings,
        run.curves,
        read_events(run.folder),
        run.status,
        str(run.record.get("reason", "")),
        run.metrics,
    )
    findings = advice.diagnose(past)
    changes = advice.propose(kind, own, findings)
    looked = {name: len(run.curves[name]) for name in run.curves if name in LOOKED_AT or name.startswith("gate/")}
    new = {key: after for key, (_, after) in changes.items()} | {"output_dir": _next_folder(settings.output_dir)}
    return {
        "run": str(run.folder),
        "stage": run.stage,
        "status": run.status,
        "step": run.step,
        "healthy": not findings,
        "looked_at": looked | {"events": len(past.events)},
        "findings": [
            {"condition": each.condition, "title": each.title, "evidence": each.evidence, "advice": list(each.advice)}
            for each in findings
        ],
        "changes": {key: list(values) for key, values in changes.items()},
        "file": advice.changed(own, new),
    }


def _next_folder(folder: str) -> str:
    """Returns the first name after a run folder's that is free."""
    return next(name for number in range(2, 10**6) if not Path(name := f"{folder}-{number}").exists())


def _print_report(console: Terminal, run: RunFolder, report: dict[str, Any]) -> None:
    steps = "no steps" if run.step is None else f"{run.step:,} steps"
    console.print(f"[bold]{safe(run.folder)}[/]  {safe(run.stage)}, {safe(run.status)}, {steps}", soft_wrap=True)
    looked = ", ".join(f"{safe(name)} ({count})" for name, count in report["looked_at"].items())
    for finding in report["findings"]:
        console.print(f"[yellow]{safe(finding['title'])}[/]")
        for sentence in finding["evidence"]:
            console.print(f"  {safe(sentence)}", soft_wrap=True)
    if report["healthy"]:
        few = "" if len(run.curves.get("loss", ())) >= advice.FEWEST else ", but it has too few values for trends"
        console.print(f"[green]healthy[/]: no condition of the guides shows{few}")
    console.print(f"[dim]looked at (values): {looked}[/]", soft_wrap=True)
    if report["changes"]:
        console.print("[bold]change[/]")
        table = make_table("  setting", "now", "", "next", show_header=False)
        for key, (before, after) in report["changes"].items():
            table.add_row(f"  {safe(key)}", safe(show(before)), "->", f"[bold]{safe(show(after))}[/]")
        console.print(table)
    for sentence in dict.fromkeys(line for finding in report["findings"] for line in finding["advice"]):
        console.print(f"  {safe(sentence)}", soft_wrap=True)


def _print_best(console: Terminal, runs: Sequence[RunFolder]) -> None:
    """Prints which of several runs of one stage is best, and by which settings they differ."""
    metric = runs[0].key_metric
    if len(runs) < 2 or metric is None or len({run.stage for run in runs}) > 1:
        return
    name, sign = metric[0], history.direction(metric[0])
    scored = [run for run in runs if name in run.metrics]
    best = max(scored, key=lambda run: sign * run.metrics[name])
    console.print(f"\n[bold]best of these[/]: {safe(best.folder)}, {name} {short_number(best.metrics[name])}")
    for key, values in history.differing(scored, "settings").items():
        cells = ", ".join("-" if value is ... else show(value) for value in values)
        console.print(f"  {safe(key)}: {safe(cells)}", soft_wrap=True)

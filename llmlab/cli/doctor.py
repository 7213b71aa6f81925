"""`llmlab doctor`: what this machine can do, as a table or JSON; what is tried is `llmlab/doctor.py`'s."""

from dataclasses import asdict
from itertools import groupby
from typing import Annotated

import typer

from llmlab.terminal import Terminal, make_table, safe, say_json

STYLES = {"ok": "green", "limited": "yellow", "broken": "bold red", "absent": "dim"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Try what this machine can do: versions, devices, memory, folders, hub, optional packages."""
    from llmlab.doctor import examine

    with Terminal(stderr=True).status("starting") as status:
        checks, preset, problem = examine(lambda text: status.update(safe(text)))
    if as_json:
        say_json({"checks": [asdict(check) for check in checks], "preset": preset, "problem": problem}, indent=2)
        raise typer.Exit(1 if problem else 0)
    console = Terminal(whole_rows=True)
    for section, rows in groupby(checks, key=lambda check: check.section):
        table = make_table("", "", "", show_header=False)
        for check in rows:
            table.add_row("  " + safe(check.name), f"[{STYLES[check.status]}]{check.status}[/]", safe(check.detail))
        console.print(f"[bold]{section.capitalize()}[/bold]")
        console.print(table)
    if preset:
        console.print(f"[bold]Preset[/bold] for this machine: --hardware {safe(preset)}")
    bad = f"[bold red]nothing can be trained here[/]: {safe(problem)}"
    console.print(bad if problem else "[green]this machine can train[/]")
    raise typer.Exit(1 if problem else 0)

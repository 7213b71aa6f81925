"""`llmlab doctor`: what this machine can do, as a table or JSON; what is tried is `llmlab/doctor.py`'s."""

from dataclasses import asdict
from itertools import groupby
from typing import Annotated

import typer

from llmlab.terminal import Terminal, make_table, safe, say_json

STYLES = {"ok": "green", "limited": "yellow", "broken": "bold red", "absent": "dim"}
TITLES = {
    "versions": "Versions",
    "device": "Devices",
    "folders": "Folders",
    "hub": "Hugging Face hub",
    "packages": "Optional packages",
}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Try what this machine can do: versions, devices, memory, folders, hub, optional packages."""
    from llmlab.doctor import examine

    with Terminal(stderr=True).status("starting") as status:
        checkup = examine(lambda text: status.update(safe(text)))
    if as_json:
        say_json(asdict(checkup), indent=2)
    else:
        console = Terminal(whole_rows=True)
        for section, checks in groupby(checkup.checks, key=lambda check: check.section):
            table = make_table("", "", "", show_header=False)
            for check in checks:
                mark = f"[{STYLES[check.status]}]{check.status}[/]"
                table.add_row("  " + safe(check.name), mark, safe(check.detail))
            console.print(f"[bold]{TITLES[section]}[/bold]")
            console.print(table)
        if checkup.preset:
            console.print(f"[bold]Preset[/bold] for this machine: --hardware {safe(checkup.preset)}")
        if checkup.problem:
            console.print(f"[bold red]nothing can be trained here[/]: {safe(checkup.problem)}")
        else:
            console.print("[green]this machine can train[/]")
    raise typer.Exit(1 if checkup.problem else 0)

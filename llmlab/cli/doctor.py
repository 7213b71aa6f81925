"""`llmlab doctor`: what this machine can do, as a table or JSON; what is tried is `llmlab/doctor.py`'s."""

from dataclasses import asdict
from itertools import groupby

from typer import Exit

from llmlab.cli.arguments import AsJson
from llmlab.terminal import Terminal, safe, say_json

STYLES = {"ok": "green", "limited": "yellow", "broken": "bold red", "absent": "dim"}


def doctor(as_json: AsJson = False) -> None:
    """Try what this machine can do: versions, devices, memory, folders, hub, optional packages."""
    from llmlab.doctor import examine

    with Terminal(stderr=True).status("trying this machine, at most a few minutes"):
        checks, preset, problem = examine()
    if as_json:
        say_json({"checks": [asdict(check) for check in checks], "preset": preset, "problem": problem}, indent=2)
        raise Exit(1 if problem else 0)
    console = Terminal(whole_rows=True)
    for section, rows in groupby(checks, key=lambda check: check.section):
        console.print(f"[bold]{section.capitalize()}[/bold]")
        cells = ((f"  {safe(c.name)}", f"[{STYLES[c.status]}]{c.status}[/]", safe(c.detail)) for c in rows)
        console.table(("", "", ""), cells, show_header=False)
    if preset:
        console.print(f"[bold]Preset[/bold] for this machine: --hardware {safe(preset)}")
    bad = f"[bold red]nothing can be trained here[/]: {safe(problem)}"
    console.print(bad if problem else "[green]this machine can train[/]")
    raise Exit(1 if problem else 0)

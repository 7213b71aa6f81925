"""`llmlab plan STAGE`: what a run will take, by its own command's words, on this machine or another."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llmlab.settings.errors import UserError, did_you_mean
from llmlab.stages import STAGES
from llmlab.terminal import Terminal, duration, make_table, numeric, safe, say_json

if TYPE_CHECKING:
    from llmlab.runs.plan import Plan

PLANNED = [name for name, stage in STAGES.items() if stage.resumes]  # those that train


def plan(
    context: typer.Context,
    stage: Annotated[str, typer.Argument(help=f"Stage: {', '.join(PLANNED)}; its settings follow, as its command's.")],
    hardware: Annotated[
        str | None, typer.Option(help="Plan for this hardware preset, with its values; all compares them.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="Training rows, for steps, tokens and time where epochs are set.", min=1)
    ] = None,
    mean: Annotated[
        float | None, typer.Option(help="Tokens of a row in the mean; none is the longest.", min=1)
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="Processes that train together, a device each; by default the preset's.", min=1)
    ] = None,
    sharding: Annotated[
        Literal["none", "zero2", "zero3", "fsdp2"] | None,
        typer.Option(help="What the processes share; none is DDP; by default the preset's."),
    ] = None,
    utilization: Annotated[
        float | None, typer.Option(help="Share of the device's peak FLOP/s; none is a usual one.", min=0.001, max=1)
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Take real steps with random weights here, for memory and time.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan a stage's run before anything is downloaded or made: memory by part, steps, tokens, time and disk.

    Rows are as long as the settings allow. An epoch's last batch is a step of its own, as Transformers counts: 1000
    rows, 16 a step, 3 epochs are 189 steps (3000 / 16 rounded down, as the RL guide counts, are 187).
    """
    if stage not in PLANNED:
        raise UserError(f"plan {stage}: expected one of {', '.join(PLANNED)}{did_you_mean(stage, PLANNED)}")
    from llmlab.hardware import describe_machine, probe, recommend_preset
    from llmlab.runs.plan import fitting_changes, make_plan, measure_plan
    from llmlab.settings.presets import hardware_presets, launch_of

    if sharding not in (None, "none") and processes == 1:
        raise UserError(f"--sharding {sharding}: one process has nothing to share; set --processes")
    options = {"rows": rows, "mean": mean, "utilization": utilization}
    plans: dict[str, Any] = {}
    for name in hardware_presets() if hardware == "all" else [hardware]:
        settings = resolve_words("plan", stage, context.args, name, processes).settings
        machine = describe_machine(name, settings.dtype) if name else probe(settings.device, settings.dtype)
        own, config = launch_of(recommend_preset(probe()) if name == "auto" else name) if name else (1, None)
        shared = sharding or ("fsdp2" if config == "fsdp2" else "none")
        chosen = {**options, "processes": processes or own, "sharding": shared}
        function = STAGES[stage].function
        made = make_plan(function, settings, machine, **chosen)
        if measure:
            made = measure_plan(made, function, settings, machine)
        changes = [] if made.fits else fitting_changes(function, settings, machine, **chosen)
        plans[name or machine.name] = (made, machine, changes)
    if json:
        values = {name: {**made.record(), "changes": changes} for name, (made, _, changes) in plans.items()}
        say_json(values if hardware == "all" else next(iter(values.values())))
    elif hardware == "all":
        _print_table(stage, plans)
    else:
        _print_plan(stage, *next(iter(plans.values())))


# what is not the plan's own goes to the stage's command
plan.context_settings = {"allow_extra_args": True, "ignore_unknown_options": True}  # type: ignore[attr-defined]


def resolve_words(command: str, stage: str, words: list[str], hardware: str | None, processes: int | None) -> Any:
    """Returns the resolved settings that a stage's command has with these words, for another command."""
    from llmlab.cli.options import PlainHelp, stage_command

    found: list[Any] = []
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command(stage, cls=PlainHelp)(stage_command(stage, use=found.append, processes=processes))
    words = [*words, *(["--hardware", hardware] if hardware else [])]
    typer.main.get_command(app)(words, prog_name=f"llmlab {command} {stage}", standalone_mode=False)
    if not found:
        raise typer.Exit  # --help, --show-config
    return found[0]


def _print_plan(stage: str, plan: "Plan", machine: Any, changes: list[str]) -> None:
    from llmlab.runs.progress import print_plan

    rows = [("device", f"{machine.name} ({machine.device}), {machine.dtype}"), *plan.summary()]
    rows += [("note", note) for note in plan.notes]
    if not plan.fits:
        gpus = ", nor are 16 such GPUs with --accelerate fsdp2" if machine.device == "cuda" else ""
        rows.append(("does not fit", "; or ".join(changes) or f"no change that was tried is enough{gpus}"))
    print_plan(Terminal(), f"{stage}: planned", rows)


def _print_table(stage: str, plans: dict[str, Any]) -> None:
    names = ("GB", "of")
    table = make_table("hardware", *map(numeric, names), "fits", "time", "first to change", title=f"{stage}: planned")
    for name, (made, _, changes) in plans.items():
        sizes = (f"{made.total / 1e9:.1f}", f"{made.memory / 1e9:.1f}")
        time = duration(made.seconds) if made.seconds else "?"
        table.add_row(name, *sizes, "yes" if made.fits else "no", time, safe(changes[0] if changes else ""))
    Terminal(whole_rows=True).print(table)

"""`llmlab plan STAGE`: what a run will take, by its own command's words, on this machine or another;
`llmlab tune lr STAGE`: a learning-rate range test through the stage itself, its chart and a suggestion."""

from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Context, Exit, Option, Typer
from typer.main import get_command

from llmlab.cli.arguments import AsJson, Overwrite
from llmlab.settings.errors import UserError, did_you_mean
from llmlab.stages import STAGES
from llmlab.terminal import Terminal, duration, numeric, safe, say_json

PLANNED = [name for name, stage in STAGES.items() if stage.resumes]  # those that train
Sharding = Literal["none", "zero2", "zero3", "fsdp2"]
FLOPS_HELP = "Share of the device's peak FLOP/s; none is a usual one."
REST = {"allow_extra_args": True, "ignore_unknown_options": True}  # they go to the stage's command

tune = Typer(no_args_is_help=True, help="Find settings by short trials.")

TESTED = ("pretrain", "sft", "dpo", "orpo", "reward", "rs-sft", "awr")
NO_LOSS = "its loss is no measure of progress: it is near 0 however high the reward; compare rewards of short runs"


def plan(
    context: Context,
    stage: Annotated[str, Argument(help=f"Stage: {', '.join(PLANNED)}; its settings follow, as its command's.")],
    hardware: Annotated[str | None, Option(help="Plan for this preset, with its values; all compares them.")] = None,
    rows: Annotated[int | None, Option(help="Training rows, for runs that count in epochs.", min=1)] = None,
    mean: Annotated[float | None, Option(help="Tokens of a row in the mean; none is the longest.", min=1)] = None,
    processes: Annotated[int | None, Option(help="Processes that train together; else the preset's.", min=1)] = None,
    sharding: Annotated[Sharding | None, Option(help="What processes share, none is DDP; else the preset's.")] = None,
    utilization: Annotated[float | None, Option(help=FLOPS_HELP, min=0.001, max=1)] = None,
    measure: Annotated[bool, Option("--measure", help="Take real steps here, with random weights.")] = False,
    json: AsJson = False,
) -> None:
    """Plan a stage's run before anything is downloaded or made: memory by part, steps, tokens, time and disk.

    Rows are as long as the settings allow. An epoch's last batch is a step of its own, as Transformers counts: 1000
    rows, 16 a step, 3 epochs are 189 steps (3000 / 16 rounded down, as the RL guide counts, are 187).
    """
    if stage not in PLANNED:
        raise UserError(f"plan {stage}: expected one of {', '.join(PLANNED)}{did_you_mean(stage, PLANNED)}")
    from llmlab.hardware import describe_machine, probe, recommend_preset
    from llmlab.runs.plan import fitting_changes, make_plan, measure_plan
    from llmlab.runs.progress import print_plan
    from llmlab.settings.presets import HARDWARE_PRESETS, launch_of

    if sharding not in (None, "none") and processes == 1:
        raise UserError(f"--sharding {sharding}: one process has nothing to share; set --processes")
    options = {"rows": rows, "mean": mean, "utilization": utilization}
    plans: dict[str, Any] = {}
    for name in HARDWARE_PRESETS if hardware == "all" else [hardware]:
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
        return say_json(values if hardware == "all" else next(iter(values.values())))
    rows: list[Any] = []
    if hardware == "all":
        for name, (made, _, changes) in plans.items():
            sizes = (f"{made.total / 1e9:.1f}", f"{made.memory / 1e9:.1f}", "yes" if made.fits else "no")
            time = duration(made.seconds) if made.seconds else "?"
            rows.append((name, *sizes, time, safe(changes[0] if changes else "")))
        columns = ("hardware", numeric("GB"), numeric("of"), "fits", "time", "first to change")
        return Terminal(whole_rows=True).table(columns, rows, title=f"{stage}: planned")
    ((made, machine, changes),) = plans.values()
    rows = [("device", f"{machine.name} ({machine.device}), {machine.dtype}"), *made.summary()]
    rows += [("note", note) for note in made.notes]
    if not made.fits:
        gpus = ", nor are 16 such GPUs with --accelerate fsdp2" if machine.device == "cuda" else ""
        rows.append(("does not fit", "; or ".join(changes) or f"no change that was tried is enough{gpus}"))
    print_plan(Terminal(), f"{stage}: planned", rows)


plan.context_settings = REST  # type: ignore[attr-defined]


def resolve_words(command: str, stage: str, words: list[str], hardware: str | None, processes: int | None) -> Any:
    """Returns the resolved settings that a stage's command has with these words, for another command."""
    from llmlab.cli.options import PlainHelp, stage_command

    found: list[Any] = []
    app = Typer(pretty_exceptions_enable=False)
    app.command(stage, cls=PlainHelp)(stage_command(stage, use=found.append, processes=processes))
    words = [*words, *(["--hardware", hardware] if hardware else [])]
    get_command(app)(words, prog_name=f"llmlab {command} {stage}", standalone_mode=False)
    if not found:
        raise Exit  # --help, --show-config
    return found[0]


@tune.command("lr", context_settings=REST)
def tune_lr(
    context: Context,
    stage: Annotated[str, Argument(help=f"Stage: {', '.join(TESTED)}; its settings follow, as its command's.")],
    low: Annotated[float, Option(help="Lowest rate, of the first step.", min=1e-12)] = 1e-7,
    high: Annotated[float, Option(help="Highest rate, of the last step.", min=1e-12)] = 1.0,
    steps: Annotated[int, Option(help="Optimizer steps.", min=20)] = 100,
    plot: Annotated[Path | None, Option(help="Image, .png or .svg; none is lr_STAGE.png.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Raise the learning rate exponentially over a few steps, and suggest one.

    The stage's own model, data and trainer are used, in a temporary folder that is removed. It stops early where the
    smoothed loss exceeds 4 x its lowest. Source: Smith 2017 (arXiv:1506.01186).
    """
    if stage not in TESTED:
        reason = f"not supported: {NO_LOSS}" if stage in ("grpo", "ppo") else f"expected one of {', '.join(TESTED)}"
        raise UserError(f"tune lr {stage}: {reason}{did_you_mean(stage, TESTED)}")
    if low >= high:
        raise UserError(f"--low {low:g}: expected less than --high {high:g}")
    plot = plot or Path(f"lr_{stage}.png")
    if plot.suffix not in (".png", ".svg") or not plot.absolute().parent.is_dir():
        raise UserError(f"--plot {plot}: expected a name that ends in .png or .svg, in a folder that exists")
    if plot.exists() and not overwrite:
        raise UserError(f"--plot {plot}: it exists; choose another name, or --overwrite")
    from llmlab.settings.base import spellings_of
    from llmlab.settings.paths import check_inputs

    resolved = resolve_words("tune lr", stage, context.args, None, 1)
    if getattr(resolved.settings, "samples", "") is None:
        raise UserError(f"tune lr {stage}: it would draw samples first; name those of an earlier run: samples=RUN")
    check_inputs(resolved.settings, resolved.sources)
    from llmlab.runs.lr_range import RangeTest, run_range_test

    console, test = Terminal(), RangeTest(low, high, steps)
    run_range_test(stage, STAGES[stage].function, resolved, test, console)
    if len(test.losses) < 5:
        raise UserError(f"--low {low:g}: the loss exploded after {len(test.losses)} steps; start lower")
    suggestion, smooth = test.suggest(), test.smooth().tolist()
    test.draw(plot, f"{stage}: learning-rate range test")
    setting = spellings_of(type(resolved.settings))["learning_rate"]
    key, now = setting.key, setting.of(resolved.settings)
    lowest = min(smooth)
    at = f"{lowest:.4g} at {test.rates[smooth.index(lowest)]:.1e}, from {smooth[0]:.4g}"
    console.print(f"lowest loss {at}; ended after {len(smooth)} of {steps} steps", soft_wrap=True)
    console.print(f"wrote {safe(plot)}", soft_wrap=True)
    if suggestion is None:
        console.print("no suggestion: the loss never fell by 1 %; try --high, more --steps, or look at the data")
    else:
        how = f"midway between its steepest fall, {test.landmarks()[0]:.1e}, and its lowest (now {now:g})"
        console.print(f"[bold]{key}: {suggestion:g}[/]  [dim]# {how}[/]", soft_wrap=True)

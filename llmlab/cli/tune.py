"""`llmlab tune lr STAGE`: a learning-rate range test through the stage itself, its chart and a suggestion."""

from pathlib import Path
from typing import Annotated

import typer

from llmlab.settings.errors import UserError, did_you_mean
from llmlab.stages import STAGES
from llmlab.terminal import Curve, Terminal, draw_curves, make_table, safe, say_json

app = typer.Typer(no_args_is_help=True)

TESTED = ("pretrain", "sft", "dpo", "orpo", "reward", "rs-sft", "awr")
NO_LOSS = "its loss is no measure of progress: it is near 0 however high the reward; compare rewards of short runs"
HEIGHT, WIDEST = 12, 100  # of the chart, in characters


@app.callback()
def tune() -> None:
    """Find settings by short trials."""


@app.command("lr", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def tune_lr(
    context: typer.Context,
    stage: Annotated[str, typer.Argument(help=f"Stage: {', '.join(TESTED)}; its settings follow, as its command's.")],
    low: Annotated[float, typer.Option(help="Lowest rate, of the first step.", min=1e-12)] = 1e-7,
    high: Annotated[float, typer.Option(help="Highest rate, of the last step.", min=1e-12)] = 1.0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=20)] = 100,
    plot: Annotated[
        Path | None, typer.Option(help="Image to write, .png or .svg, a .csv beside it; none is lr_STAGE.png.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace these files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Raise the learning rate exponentially over a few steps, and suggest the one where the loss falls steepest.

    The stage's own model, data and trainer are used, in a temporary folder that is removed. It stops early where the
    smoothed loss exceeds 4 x its lowest. Source: Smith 2017 (arXiv:1506.01186).
    """
    if stage in ("grpo", "ppo"):
        raise UserError(f"tune lr {stage}: not supported: {NO_LOSS}")
    if stage not in TESTED:
        raise UserError(f"tune lr {stage}: expected one of {', '.join(TESTED)}{did_you_mean(stage, TESTED)}")
    if low >= high:
        raise UserError(f"--low {low:g}: expected less than --high {high:g}")
    plot = plot or Path(f"lr_{stage}.png")
    table = plot.with_suffix(".csv")
    if plot.suffix not in (".png", ".svg"):
        raise UserError(f"--plot {plot}: expected a name that ends in .png or .svg")
    if taken := [path for path in (plot, table) if path.exists() and not overwrite]:
        raise UserError(f"--plot {plot}: {taken[0]} exists; choose another name, or --overwrite")
    if not plot.absolute().parent.is_dir():
        raise UserError(f"--plot {plot}: there is no such folder")
    from llmlab.cli.plan import resolve_words
    from llmlab.settings.base import spellings_of
    from llmlab.settings.paths import check_inputs

    resolved = resolve_words("tune lr", stage, context.args, None, 1)
    check_inputs(resolved.settings, resolved.sources)
    if hasattr(resolved.settings, "samples") and resolved.settings.samples is None:
        raise UserError(f"tune lr {stage}: it would draw samples first; name those of an earlier run: samples=RUN")
    from llmlab.runs.lr_range import RangeTest, draw, run_range_test

    console = Terminal(stderr=as_json)
    test = RangeTest(low, high, steps)
    run_range_test(stage, STAGES[stage].function, resolved, test, console=console)
    if len(test.losses) < 5:
        raise UserError(f"--low {low:g}: the loss exploded after {len(test.losses)} steps; start lower")
    suggestion, smooth = test.suggest(), test.smooth().tolist()
    test.write_csv(table)
    draw(test, plot, stage, suggestion)
    setting = spellings_of(type(resolved.settings))["learning_rate"]
    key, now = setting.key, setting.of(resolved.settings)
    if as_json:
        rows = list(zip(test.rates.tolist(), test.losses, strict=True))
        return say_json({"setting": key, "now": now, "suggestion": suggestion, "curve": rows})
    ends = (f"{low:.0e}", f"learning rate {test.rates[-1]:.1e}, logarithmic")
    lowest, start = min(smooth), smooth[0]
    shown = [(step, min(value, 2 * start - lowest)) for step, value in enumerate(smooth)]
    for line in draw_curves([Curve(shown, "cyan")], width=min(console.width, WIDEST), height=HEIGHT, ends=ends):
        console.print(line, soft_wrap=True)
    facts = make_table("", "", show_header=False)
    facts.add_row("lowest loss", f"{lowest:.4g} at {test.rates[smooth.index(lowest)]:.1e}, from {start:.4g}")
    facts.add_row("ended", f"after {len(test.losses)} of {steps} steps, at {test.rates[-1]:.1e}")
    facts.add_row("wrote", safe(f"{plot}, {table}"))
    console.print(facts)
    if suggestion is None:
        console.print("no suggestion: the loss never fell by 1 %; try --high, more --steps, or look at the data")
        return
    how = "where the smoothed loss falls steepest per decade, before its lowest"
    console.print(f"[bold]{key}: {suggestion:g}[/]  [dim]# {how} (now {now:g})[/]", soft_wrap=True)

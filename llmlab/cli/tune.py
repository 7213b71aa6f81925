"""`llmlab tune lr STAGE`: a learning-rate range test through the stage itself, its chart and a suggestion."""

from pathlib import Path
from typing import Annotated

import typer

from llmlab.settings.errors import UserError, did_you_mean
from llmlab.stages import STAGES
from llmlab.terminal import Curve, Terminal, draw_curves, safe, say_json

app = typer.Typer(no_args_is_help=True, help="Find settings by short trials.")

TESTED = ("pretrain", "sft", "dpo", "orpo", "reward", "rs-sft", "awr")
NO_LOSS = "its loss is no measure of progress: it is near 0 however high the reward; compare rewards of short runs"
HEIGHT, WIDEST = 12, 100  # of the chart, in characters


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
    if taken := [path for path in (plot, plot.with_suffix(".csv")) if path.exists() and not overwrite]:
        raise UserError(f"--plot {plot}: {taken[0]} exists; choose another name, or --overwrite")
    from llmlab.cli.plan import resolve_words
    from llmlab.settings.base import spellings_of
    from llmlab.settings.paths import check_inputs

    resolved = resolve_words("tune lr", stage, context.args, None, 1)
    if getattr(resolved.settings, "samples", "") is None:
        raise UserError(f"tune lr {stage}: it would draw samples first; name those of an earlier run: samples=RUN")
    check_inputs(resolved.settings, resolved.sources)
    from llmlab.runs.lr_range import RangeTest, run_range_test

    console, test = Terminal(stderr=as_json), RangeTest(low, high, steps)
    run_range_test(stage, STAGES[stage].function, resolved, test, console)
    if len(test.losses) < 5:
        raise UserError(f"--low {low:g}: the loss exploded after {len(test.losses)} steps; start lower")
    suggestion, smooth = test.suggest(), test.smooth().tolist()
    test.write(plot, plot.with_suffix(".csv"), f"{stage}: learning-rate range test")
    setting = spellings_of(type(resolved.settings))["learning_rate"]
    key, now = setting.key, setting.of(resolved.settings)
    if as_json:
        curve = list(zip(test.rates.tolist(), test.losses, strict=True))
        return say_json({"setting": key, "now": now, "suggestion": suggestion, "curve": curve})
    lowest, last = min(smooth), test.rates[-1]
    shown = [(step, min(value, 2 * smooth[0] - lowest)) for step, value in enumerate(smooth)]
    ends = (f"{low:.0e}", f"learning rate {last:.1e}, logarithmic")
    for line in draw_curves([Curve(shown, "cyan")], width=min(console.width, WIDEST), height=HEIGHT, ends=ends):
        console.print(line, soft_wrap=True)
    at = f"{lowest:.4g} at {test.rates[smooth.index(lowest)]:.1e}, from {smooth[0]:.4g}"
    console.print(f"lowest loss {at}; ended after {len(smooth)} of {steps} steps", soft_wrap=True)
    console.print(f"wrote {safe(plot)}, {safe(plot.with_suffix('.csv'))}", soft_wrap=True)
    if suggestion is None:
        console.print("no suggestion: the loss never fell by 1 %; try --high, more --steps, or look at the data")
    else:
        how = f"midway between its steepest fall, {test.landmarks()[0]:.1e}, and its lowest (now {now:g})"
        console.print(f"[bold]{key}: {suggestion:g}[/]  [dim]# {how}[/]", soft_wrap=True)

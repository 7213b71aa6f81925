"""Learning-rate range test: the stage's own trainer on its own data while the rate rises exponentially, step by step.

Nothing of the run is kept: it happens in a temporary folder, without evaluation and checkpoints.
Source: Smith 2017 (arXiv:1506.01186), section 3.3; the exponential rise and the stop are those of its later users.
"""

import csv
import io
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback, set_seed

from llmlab.runs.callbacks import SaveSchedule
from llmlab.runs.failures import explain_out_of_memory
from llmlab.runs.progress import ProgressLine, print_plan, quiet_libraries
from llmlab.runs.start import begin
from llmlab.settings.base import spellings_of
from llmlab.settings.errors import Diverged
from llmlab.settings.files import write_atomically
from llmlab.settings.sources import Resolved

SMOOTHING = 0.9  # weight of the past in the running mean that decides about the stop
TOO_HIGH = 4.0  # times the lowest running mean
WINDOW = 0.5  # decades of the rate over which the loss is averaged, and twice that its slope taken
LEAST_FALL = 0.01  # of the loss, relative, for a suggestion


@dataclass(eq=False)
class RangeTest(TrainerCallback):
    """The losses of a test, one a step, at rates from `low` to `high`; it ends training when the loss is too high.

    Each is relative to the loss on the same rows before the test (`before`), since rows differ more than rates do.
    """

    low: float
    high: float
    steps: int
    before: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    mean: float = 0.0
    lowest: float = math.inf

    @property
    def rates(self) -> np.ndarray:
        """The learning rate of each step that was taken, (steps,)."""
        return self.low * (self.high / self.low) ** (np.arange(len(self.losses)) / max(self.steps - 1, 1))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if not math.isfinite(logs.get("loss", math.nan)):
            return
        loss = logs["loss"]
        if self.before[len(self.losses) :]:
            loss *= statistics.fmean(self.before) / max(self.before[len(self.losses)], 1e-9)
        self.losses.append(loss)
        self.mean = SMOOTHING * self.mean + (1 - SMOOTHING) * loss
        smooth = self.mean / (1 - SMOOTHING ** len(self.losses))
        self.lowest = min(self.lowest, smooth)
        control.should_training_stop |= smooth > TOO_HIGH * self.lowest

    def smooth(self) -> np.ndarray:
        """Returns the loss averaged over half a decade of rates around each step, (steps,)."""
        reach = max(round(self.per_decade * WINDOW / 2), 1)
        padded = np.pad(self.losses, reach, mode="edge")
        return np.convolve(padded, np.full(2 * reach + 1, 1 / (2 * reach + 1)), mode="valid")

    @property
    def per_decade(self) -> float:
        return (self.steps - 1) / math.log10(self.high / self.low)

    def suggest(self) -> float | None:
        """Returns the rate at which the smoothed loss falls steepest in log(rate), before its lowest; None where it
        never falls."""
        smooth = self.smooth()
        lowest = int(smooth.argmin())
        if smooth[lowest] > (1 - LEAST_FALL) * smooth[: lowest + 1].max():
            return None
        reach = max(round(self.per_decade * WINDOW), 1)
        offsets = np.arange(-reach, reach + 1)
        padded = np.pad(smooth, reach, mode="edge")
        slopes = np.convolve(padded, -offsets / (offsets**2).sum(), mode="valid")[: lowest + 1]  # least squares
        return float(f"{self.rates[int(slopes.argmin())]:.1e}")

    def write_csv(self, path: Path) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("step", "learning_rate", "loss", "smoothed_loss"))
        rows = zip(self.rates.tolist(), self.losses, self.smooth().tolist(), strict=True)
        writer.writerows((step, f"{rate:.6g}", loss, mean) for step, (rate, loss, mean) in enumerate(rows, start=1))
        write_atomically(path, text.getvalue())


class _Tested:
    """Mixin of a stage's run: its trainer takes the steps of a range test, and nothing is saved."""

    test: RangeTest

    def train(self, trainer: Any, *, plan: Sequence[Any], **options: Any) -> None:
        test = self.test
        args, growth = trainer.args, (test.high / test.low) ** (1 / max(test.steps - 1, 1))
        args.eval_on_start, args.eval_strategy, args.save_strategy = False, "no", "no"
        trainer.create_optimizer()
        untrained = RangeTest(test.low, test.high, test.steps)
        trainer.lr_scheduler = LambdaLR(trainer.optimizer, lambda step: 0.0)
        unwanted = (PrinterCallback, SaveSchedule, *(() if self.console.is_terminal else (ProgressLine,)))  # type: ignore[attr-defined]
        callbacks = trainer.callback_handler.callbacks
        trainer.callback_handler.callbacks = [each for each in callbacks if not isinstance(each, unwanted)]
        print_plan(self.console, f"{self.stage}: learning-rate range test", plan)  # type: ignore[attr-defined]
        try:
            with quiet_libraries():
                trainer.add_callback(untrained)
                trainer.accelerator.backward = lambda *args, **kwargs: None
                trainer.train()
                del trainer.accelerator.backward
                trainer.remove_callback(untrained)
                test.before = untrained.losses
                trainer.add_callback(test)
                trainer.lr_scheduler = LambdaLR(trainer.optimizer, lambda step: growth**step)
                set_seed(args.seed)  # the same rows again
                trainer.train()
        except Diverged:
            pass  # what was looked for
        finally:
            self.progress.stop()  # type: ignore[attr-defined]


def run_range_test(
    stage: str, function: Callable[..., Any], resolved: Resolved[Any], test: RangeTest, *, console: Console
) -> None:
    """Takes the steps of a test with a stage's settings and data, in a temporary run folder."""
    with tempfile.TemporaryDirectory(prefix="llmlab-lr-") as folder:
        resolved = function.prepare(resolved)  # type: ignore[attr-defined]
        kind = type(resolved.settings)
        rate, fields = spellings_of(kind)["learning_rate"].name, kind.model_fields
        changes = {"output_dir": f"{folder}/run", rate: test.low, "max_steps": test.steps, "warmup_steps": 0}
        changes |= {"epochs": None, "scheduler": "none", "log_every": 1, "eval_every": 10**6, "save_every": 10**6}
        changes |= {"gates": [], "gate_every": None, "metric_for_best_model": None, "save_best_only": False}
        changes = {name: value for name, value in changes.items() if name in fields}
        resolved = replace(resolved, settings=resolved.settings.model_copy(update=changes))
        run_class = type("RangeTestRun", (_Tested, function.run_class), {"test": test})  # type: ignore[attr-defined]
        starting = begin(
            run_class, stage, resolved, resume=None, load_optimizer=True, allow_changed_data=False, console=console
        )
        with starting as run, explain_out_of_memory(run):
            run.function = function
            function.function(run)  # type: ignore[attr-defined]


def draw(test: RangeTest, path: Path, stage: str, suggestion: float | None) -> None:
    """Writes the chart of a test as an image, PNG or SVG by the file's ending."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.semilogx(test.rates, test.losses, color="0.75", linewidth=1, label="loss")
    axes.semilogx(test.rates, test.smooth(), color="tab:blue", label="smoothed")
    if suggestion is not None:
        axes.axvline(suggestion, color="tab:orange", linestyle="--", label=f"steepest fall: {suggestion:g}")
    smooth = test.smooth()
    axes.set_ylim(top=min(max(test.losses), 2 * smooth[0] - smooth.min()) + 0.05 * abs(smooth[0]))
    axes.set(xlabel="learning rate", ylabel="training loss", title=f"{stage}: learning-rate range test")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)

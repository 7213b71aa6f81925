"""Learning-rate range test: a stage's own trainer on its own data while the rate rises exponentially, step by step. It
happens in a temporary folder, without evaluation and checkpoints. Source: Smith 2017 (arXiv:1506.01186)."""

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
from llmlab.settings.optimizer import OWN_RATES
from llmlab.settings.sources import Resolved
from llmlab.settings.trust import leaves_machine

SMOOTHING = 0.9  # weight of the past in the running mean that decides about the stop
TOO_HIGH = 4.0  # times the lowest running mean
WINDOW = 0.25  # decades of the rate before and after a step whose losses are averaged; for its slope, twice that
LEAST_FALL = 0.01  # of the loss, relative, for a suggestion


@dataclass(eq=False)
class RangeTest(TrainerCallback):
    """The losses of a test, one a step, at rates from `low` to `high`; it ends training when the loss is too high.
    Each is relative to the loss on the same rows before the test (`before`), since rows differ more than rates do."""

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
        return self.low * (self.high / self.low) ** (np.arange(len(self.losses)) / (self.steps - 1))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        loss, number = logs.get("loss", math.nan), len(self.losses)
        if not math.isfinite(loss):
            return
        if number < len(self.before):
            loss *= statistics.fmean(self.before) / max(self.before[number], 1e-9)
        self.losses.append(loss)
        self.mean = SMOOTHING * self.mean + (1 - SMOOTHING) * loss
        smooth = self.mean / (1 - SMOOTHING ** (number + 1))
        self.lowest = min(self.lowest, smooth)
        control.should_training_stop |= smooth > TOO_HIGH * self.lowest

    def _filter(self, values: Any, decades: float, weigh: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Returns weighted sums of the values so many decades around each step, (steps,)."""
        reach = max(round(decades * (self.steps - 1) / math.log10(self.high / self.low)), 1)
        return np.correlate(np.pad(values, reach, mode="edge"), weigh(np.arange(-reach, reach + 1)), mode="valid")

    def smooth(self) -> np.ndarray:
        """Returns the moving mean of the losses, (steps,)."""
        return self._filter(self.losses, WINDOW, lambda at: np.full(len(at), 1 / len(at)))

    def landmarks(self) -> tuple[float, float] | None:
        """Returns the rates where the smoothed loss falls steepest in log(rate), by least squares, and where it is
        lowest; None where it never falls."""
        smooth = self.smooth()
        lowest = int(smooth.argmin())
        if smooth[lowest] > (1 - LEAST_FALL) * smooth[0]:
            return None
        slopes = self._filter(smooth, 2 * WINDOW, lambda at: at / (at**2).sum())[: lowest + 1]
        return float(self.rates[int(slopes.argmin())]), float(self.rates[lowest])

    def suggest(self) -> float | None:
        """Returns the rate midway, on a logarithmic scale, between the steepest fall and the lowest loss: the first is
        often too careful, and at the second a whole run is about to diverge."""
        found = self.landmarks()
        return float(f"{math.sqrt(found[0] * found[1]):.1e}") if found else None

    def draw(self, chart: Path, title: str) -> None:
        """Writes the curve as an image, PNG or SVG by the file's ending."""
        from matplotlib.figure import Figure

        smooth, suggestion = self.smooth(), self.suggest()
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.semilogx(self.rates, self.losses, color="0.75", label="loss")
        axes.semilogx(self.rates, smooth, color="tab:blue", label="smoothed")
        if suggestion is not None:
            axes.axvline(suggestion, color="tab:orange", linestyle="--", label=f"suggestion: {suggestion:g}")
        axes.set_ylim(top=min(max(self.losses), 2 * smooth[0] - smooth.min()) + 0.05 * smooth[0])
        axes.set(xlabel="learning rate", ylabel="training loss", title=title)
        axes.legend()
        figure.savefig(chart, dpi=120)


class _Tested:
    """Mixin of a stage's run: its trainer takes the steps of a range test, and nothing is saved."""

    test: RangeTest

    def train(self: Any, trainer: Any, *, plan: Sequence[Any], **options: Any) -> None:
        test, args, handler = self.test, trainer.args, trainer.callback_handler
        growth, before = (test.high / test.low) ** (1 / (test.steps - 1)), RangeTest(test.low, test.high, test.steps)
        args.eval_on_start, args.eval_strategy, args.save_strategy = False, "no", "no"
        unwanted = (PrinterCallback, SaveSchedule, *(() if self.console.is_terminal else (ProgressLine,)))
        handler.callbacks = [each for each in handler.callbacks if not isinstance(each, unwanted)]
        print_plan(self.console, f"{self.stage}: learning-rate range test", plan)
        optimizer = trainer.create_optimizer()
        try:
            with quiet_libraries():
                for recorder, factor in ((before, 0.0), (test, growth)):  # at rate 0 only the losses are wanted
                    set_seed(args.seed)  # the same rows
                    trainer.add_callback(recorder)
                    trainer.lr_scheduler = LambdaLR(optimizer, lambda step, factor=factor: factor**step * bool(factor))
                    if recorder is before:
                        trainer.accelerator.backward = lambda *args, **kwargs: None
                    trainer.train()
                    if recorder is before:
                        del trainer.accelerator.backward
                        trainer.remove_callback(before)
                        test.before = before.losses
        except Diverged:
            pass  # what was looked for
        finally:
            self.progress.stop()


def run_range_test(stage: str, function: Any, resolved: Resolved[Any], test: RangeTest, console: Console) -> None:
    """Takes the steps of a test with a stage's settings and data, in a temporary run folder."""
    with tempfile.TemporaryDirectory(prefix="llmlab-lr-") as folder:
        resolved, kind = function.prepare(resolved), type(resolved.settings)
        changes = {"output_dir": f"{folder}/run", spellings_of(kind)["learning_rate"].name: test.low}
        changes |= {"max_steps": test.steps, "epochs": None, "warmup_steps": 0, "scheduler": "none", "log_every": 1}
        lower = test.low / spellings_of(kind)["learning_rate"].of(resolved.settings)
        own_rates = ((name, getattr(resolved.settings, name)) for name in OWN_RATES)
        changes |= {name: rate * lower for name, rate in own_rates if rate is not None}
        changes |= {"gates": [], "gate_every": None, "metric_for_best_model": None, "save_best_only": False}
        arguments = resolved.settings.trainer_args.items()
        kept = {name: value for name, value in arguments if not leaves_machine(name, value)}  # no repository is made
        changes |= {"report_to": [], "trainer_args": kept, "skip_spikes": None}
        changes = {name: value for name, value in changes.items() if name in kind.model_fields}
        resolved = replace(resolved, settings=resolved.settings.model_copy(update=changes))
        run_class = type("RangeTestRun", (_Tested, function.run_class), {"test": test})
        start = {"resume": None, "load_optimizer": True, "allow_changed_data": False, "console": console}
        with begin(run_class, stage, resolved, **start) as run, explain_out_of_memory(run):
            run.function = function
            function.function(run)

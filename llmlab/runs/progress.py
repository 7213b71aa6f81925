"""Console output of a run: the plan, a line while it trains, a line for each evaluation, and the result. On a terminal
the progress line is redrawn in place; elsewhere every log event prints a line of its own."""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from rich import progress as bars
from rich.console import Console
from rich.table import Column
from rich.text import Text
from transformers import TrainerCallback
from transformers.utils import logging

from llmlab.runs.callbacks import is_better
from llmlab.terminal import human, make_table, safe

ROOM_FOR_BAR = 100  # columns of a terminal that has room for a bar beside the values


def print_plan(console: Console, title: str, rows: Sequence[tuple[str, str | Text]]) -> None:
    """Prints the short plan of a run: what will be trained, on what, for how long."""
    table = make_table(Column(style="dim", no_wrap=True), Column(overflow="fold"), show_header=False)
    for name, text in rows:
        table.add_row(name, safe(text) if isinstance(text, str) else text)
    console.print(f"[bold]{safe(title)}[/]", soft_wrap=True)
    console.print(table)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps the libraries' notices and progress bars off the screen: llmlab's own line replaces them."""
    level, bars, data_quiet = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of one library about another
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if not data_quiet:
            enable_progress_bars()


class ValuesColumn(bars.TextColumn):
    """A column that gives way to the others on a narrow terminal, and stays one line."""

    def render(self, task: bars.Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


@dataclass(eq=False)
class ProgressLine(TrainerCallback):
    """Shows step, loss, learning rate, gradient norm, tokens per second, MFU and the time. `tokens_per_step` (None:
    the trainer's count) and `peak_flops` are of all processes, `flops_per_token` of both passes."""

    console: Console
    tokens_per_step: int | None = None
    flops_per_token: float | None = None
    peak_flops: float | None = None
    _training_seconds: float = 0.0
    _logged: tuple[int, float, float] = (0, 0.0, 0.0)  # step, training seconds and tokens at the last log event
    _step_began: float = 0.0
    _best: float | None = None
    _progress: bars.Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._logged = (state.global_step, *self._logged[1:])
        self._best = state.best_metric
        self._began, self._first_step = time.monotonic(), state.global_step
        if self.console.is_terminal:
            whole = Column(no_wrap=True)
            self._progress = bars.Progress(
                bars.TextColumn("[bold]step"),
                bars.MofNCompleteColumn(table_column=whole.copy()),
                *([bars.BarColumn(bar_width=16)] if self.console.width >= ROOM_FOR_BAR else []),
                ValuesColumn("{task.description}", table_column=Column()),
                bars.TimeElapsedColumn(table_column=whole.copy()),
                bars.TextColumn("left"),
                bars.TimeRemainingColumn(elapsed_when_finished=True, table_column=whole.copy()),
                console=self.console,
            )
            self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step)
            self._progress.start()

    def on_step_begin(self, args, state, control, **kwargs):
        self._step_began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self._training_seconds += time.monotonic() - self._step_began
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args, state, control, logs: dict[str, Any], **kwargs):
        if "loss" not in logs:
            return
        step, seconds, total = self._logged
        steps = state.global_step - step
        counted = logs.get("num_tokens", total)  # steps that a rollback passed over have none
        tokens = steps * self.tokens_per_step if self.tokens_per_step else counted - total
        rate = tokens / max(self._training_seconds - seconds, 1e-9)
        self._logged = (state.global_step, self._training_seconds, total + tokens)
        logs["tokens_per_second"] = round(rate, 1)
        parts = [
            f"reward {logs['reward']:.3f}" if logs.get("reward") is not None else "",
            f"loss {logs['loss']:.4f}",
            f"lr {logs['learning_rate']:.2e}",
            f"grad {logs['grad_norm']:.2f}" if "grad_norm" in logs else "",
            f"{human(rate, 'tok/s')}" if tokens else "",
        ]
        if self.flops_per_token and self.peak_flops:
            logs["mfu"] = round(rate * self.flops_per_token / self.peak_flops, 4)
            parts.append(f"MFU {logs['mfu']:.1%}")
        text = "  ".join(part for part in parts if part)
        if self._progress is not None:
            self._progress.update(self._task, description=text)
        else:
            elapsed = time.monotonic() - self._began
            done = max(state.global_step - self._first_step, 1)
            left = elapsed / done * (state.max_steps - state.global_step)
            times = f"{timedelta(seconds=int(elapsed))} left {timedelta(seconds=int(left))}"
            self.say(f"step {state.global_step}/{state.max_steps}  {text}  {times}")

    def on_evaluate(self, args, state, control, metrics: dict[str, float], **kwargs):
        name = args.metric_for_best_model.removeprefix("eval_")
        if f"eval_{name}" not in metrics:  # a gate before the first step
            name = "reward" if "eval_reward" in metrics else "loss"
        value, best = metrics[f"eval_{name}"], self._best
        better = is_better(value, best, args.greater_is_better)
        self._best = value if better else best
        note = "  [green]best so far[/green]" if better else f"  (best {best:.4f})" if best is not None else ""
        note = note if state.global_step else "  before the first step"
        self.say(f"step {state.global_step}  validation {name} [bold]{value:.4f}[/bold]{_perplexity(metrics)}{note}")

    def on_train_end(self, args, state, control, **kwargs):
        self.stop()

    def say(self, text: str) -> None:
        """Prints a line, in markup, above the progress line."""
        self.console.print(text, soft_wrap=True)

    def stop(self) -> None:
        """Stops the live display, keeping its last state."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def print_result(
    console: Console, folder: Path, metrics: dict[str, float], *, before: dict[str, float] | None = None
) -> None:
    """Prints where a run was saved and its validation metrics, with those `before` training where they are known."""
    parts = [f"[green]saved[/green] {safe(folder)}"]
    for kind in ("reward",) if "eval_reward" in metrics else ("loss", "win_rate"):
        name = f"eval_{kind}"
        if name in metrics:
            start = f"{before[name]:.4f} -> " if before and name in before else ""
            more = _perplexity(metrics) if kind == "loss" else ""
            parts.append(f"validation {kind.replace('_', ' ')} {start}[bold]{metrics[name]:.4f}[/bold]{more}")
    if "unigram_entropy" in metrics:
        parts.append(f"(unigram entropy: {metrics['unigram_entropy']:.4f})")
    console.print("  ".join(parts), soft_wrap=True)


def _perplexity(metrics: dict[str, float]) -> str:
    return f", perplexity {metrics['eval_perplexity']:.4g}" if "eval_perplexity" in metrics else ""

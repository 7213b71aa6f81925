"""Which checkpoints of a run stay on disk: the best on the validation data, and the last one."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmlab.training.checkpoints import checkpoints, step_of


class KeepBest(TrainerCallback):
    """Removes checkpoints that are neither the last nor among the best; Transformers' own rotation keeps the newest.

    Args:
        keep: how many of the best stay beside the last; None keeps all.
    """

    def __init__(self, keep: int | None):
        self.keep = keep

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.keep is None or not args.should_save:
            return
        found = {step_of(path) or 0: path for path in checkpoints(Path(args.output_dir))}
        metric, larger = args.metric_for_best_model or "", bool(args.greater_is_better)
        scores = {line["step"]: line[metric] for line in state.log_history if metric in line}
        for step in spare_steps(list(found), scores, self.keep, larger_is_better=larger):
            if str(found[step]) != state.best_model_checkpoint:
                shutil.rmtree(found[step])


def spare_steps(steps: Sequence[int], scores: dict[int, float], keep: int, *, larger_is_better: bool) -> list[int]:
    """Returns the steps whose checkpoints go, so that so many of the best and the last stay.

    Args:
        steps: of the checkpoints on disk.
        scores: step -> value on the validation data; without one (or with NaN) the newest count as best.
        keep: how many of the best.
        larger_is_better: whether the best score is the largest.
    """

    def rank(step: int) -> tuple[bool, float]:
        score = scores.get(step, math.nan)
        if not math.isfinite(score):
            return True, -step
        return False, -score if larger_is_better else score

    kept = {*sorted(steps, key=rank)[:keep], max(steps, default=0)}
    return [step for step in steps if step not in kept]
